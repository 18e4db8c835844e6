"""When training tells what, and what it tells."""

import logging

import pytest
import torch
from torch import nn

from engine.guard import FiniteGuard, NonFiniteError
from engine.meters import Meters, Readout
from engine.progress import Progress
from modeling import ReIDOutput

CPU = torch.device("cpu")


class Records(list):
    """Stands for a MetricsWriter."""

    def scalars(self, step, epoch, values, kind="train"):
        self.append((kind, step, epoch, values))


class Rates:
    def __init__(self):
        self.rate = 0.0

    def rates(self):
        return {"heads": self.rate}


@pytest.fixture
def run(tiny_cfg, caplog):
    """A `Progress` that tells every second step of five, its records, and what takes a step of a loss."""
    caplog.set_level(logging.INFO)
    model, rates, records = nn.Linear(2, 1), Rates(), Records()
    guard = FiniteGuard(model, torch.optim.SGD(model.parameters()), torch.amp.GradScaler("cpu", enabled=False))
    cfg = tiny_cfg("SOLVER.LOG_PERIOD", "2")
    progress = Progress(cfg, rates, guard, records, Meters(), CPU)
    progress.begin(3, 5, 0)

    def step(number, loss):
        rates.rate = number / 10
        progress.update(number, 100 + number, {"loss": torch.tensor(loss), "acc": torch.tensor(0.5)}, ReIDOutput())

    return progress, records, step


def test_a_look_is_told_once_the_next_step_is_launched(run, caplog):
    progress, records, step = run
    step(1, 1.0)
    progress.probe = {"backbone_total": torch.tensor(7.0)}
    step(2, 3.0)
    assert not records and not caplog.messages
    step(3, 9.0)
    (probe, train), records[:] = records[:], []
    assert probe == ("probe", 102, 3, {"backbone_total": 7.0})
    kind, number, epoch, values = train
    assert (kind, number, epoch) == ("train", 102, 3) and values["loss"] == 2.0 and values["acc"] == 0.5
    assert values["lr/heads"] == 0.2 and values["samples_per_second"] > 0
    assert caplog.messages == ["Epoch[3] Iteration[2/5] Loss: 2.000, Acc: 0.500, Base Lr: 2.00e-01"]
    step(4, 1.0)
    assert not records
    step(5, 11.0)  # the last of the epoch waits for none
    assert [(kind, number, values["loss"]) for kind, number, _, values in records] == [
        ("train", 104, 5.0),
        ("train", 105, 11.0),
    ]
    assert caplog.messages[-1] == "Epoch[3] Iteration[5/5] Loss: 5.000, Acc: 0.500, Base Lr: 5.00e-01"
    progress.end(105)
    assert records[-1] == ("epoch", 105, 3, {"loss": 5.0, "acc": 0.5})


def test_what_was_not_told_can_be_asked_for_once(run):
    progress, records, step = run
    step(1, 1.0)
    step(2, 1.0)
    progress.tell()
    progress.tell()
    assert [kind for kind, *_ in records] == ["train"]


def test_a_run_that_stops_tells_what_it_has_seen(run):
    progress, records, step = run
    step(1, 1.0)
    step(2, 1.0)
    progress.probe = {"backbone_total": torch.tensor(7.0)}
    step(3, 1.0)
    progress.leave(103)
    progress.leave(103)
    assert [(kind, number) for kind, number, *_ in records] == [("train", 102), ("probe", 103)]


@pytest.mark.parametrize("broken", [False, True])
def test_an_error_in_the_next_step_does_not_keep_it_from_telling(run, monkeypatch, broken):
    """Nor does an error while it tells hide the one that counts."""
    progress, records, step = run
    if broken:
        monkeypatch.setattr(Readout, "read", lambda readout: 1 // 0)
    with pytest.raises(OSError, match="no such image"), progress:
        step(1, 1.0)
        step(2, 1.0)
        raise OSError("no such image")
    assert [number for _, number, *_ in records] == ([] if broken else [102])


def test_a_verdict_of_the_guard_comes_before_what_is_told(run):
    progress, records, step = run
    step(1, 1.0)
    progress.guard.step(2, {"loss": torch.tensor(float("nan"))}, torch.zeros(2))
    step(2, float("nan"))
    with pytest.raises(NonFiniteError, match="Not finite in step 2: the loss terms loss"):
        step(3, 1.0)
    assert not records


def test_a_readout_keeps_the_moment_s_values():
    value = torch.tensor(1.5)
    readout = Readout({"a": {"x": value, "flag": torch.tensor(True)}, "none": {}})
    value.fill_(2.0)
    assert readout.read() == {"a": {"x": 1.5, "flag": 1.0}, "none": {}}
