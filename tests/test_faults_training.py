"""Numbers that are not finite, data workers that are killed, and runs that must be alike."""

import importlib
import json
import math
import multiprocessing
import os
import signal

import pytest
from faults.sigkill import difference
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_net
from engine import processor
from engine.guard import FiniteGuard, NonFiniteError
from utils.checkpoint import read_file
from utils.errors import UserError
from utils.logging import read_metrics

EPOCHS, STEPS = 3, 2
"""Of a run here; its epochs have two or three steps."""


def train(config, out, *opts):
    epochs = ["SOLVER.MAX_EPOCHS", str(EPOCHS), "SOLVER.CHECKPOINT_PERIOD", "1"]
    train_net.main(str(config), [*epochs, "OUTPUT_DIR", str(out), *opts])


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(n, change)`: calls `change(model, optimizer)` before the forward pass of the n-th step of a run."""
    init, before_forward = FiniteGuard.__init__, FiniteGuard.before_forward
    state = {"step": 0}

    def remember(guard, model, *args):
        guard.model = model
        init(guard, model, *args)

    def install(number, change):
        def told(guard):
            state["step"] += 1
            if state["step"] == number:
                change(guard)
            before_forward(guard)

        monkeypatch.setattr(FiniteGuard, "__init__", remember)
        monkeypatch.setattr(FiniteGuard, "before_forward", told)

    return install


def spoil_image(monkeypatch, step, value):
    loaders = importlib.import_module("data.make_dataloader")
    batches, seen = loaders.TrainLoader.batches, [0]

    def spoilt(self, device):
        for batch in batches(self, device):
            seen[0] += 1
            if seen[0] == step:
                batch.images["NI"][3, 1, 5, 7] = value
            yield batch

    monkeypatch.setattr(loaders.TrainLoader, "batches", spoilt)


def spoil_gradient(guard, value):
    parameter = guard.model.get_parameter("backbone.vit.blocks.1.mlp.fc1.bias")

    def spoil(gradient):
        gradient = gradient.clone()
        gradient[3] = value
        return gradient

    parameter.register_hook(spoil)


def nothing_bad_was_kept(out, epochs):
    """All that a run left is finite, and of the epochs before the bad step."""
    for path in out.glob("*.pth"):
        state = read_file(path)
        assert state["epoch"] <= epochs
        assert all(t.isfinite().all() for t in state["model"].values())
        moments = [t for moment in state["optimizer"]["moments"].values() for t in moment.values()]
        assert all(t.isfinite().all() for t in moments)
    metrics = json.loads((out / "metrics.json").read_text())
    assert all(
        math.isfinite(v) for part in metrics.values() for k, b in part.items() if k != "epoch" for v in b.values()
    )
    lines = [line for line in read_metrics(out / "metrics.jsonl") if line["kind"] in ("epoch", "eval")]
    assert lines and all(line["epoch"] <= epochs and None not in line.values() for line in lines)
    assert not list(out.glob(".*.tmp"))


@pytest.mark.parametrize(("step", "value"), [(1, math.nan), (2, math.inf), (3, math.nan), (6, math.nan)])
@pytest.mark.parametrize("where", ["image", "weight", "gradient"])
def test_what_is_not_finite_is_told_at_its_step_and_never_kept(
    tiny_yaml, tmp_path, at_step, monkeypatch, where, step, value
):
    if where == "image":
        spoil_image(monkeypatch, step, value)
    elif where == "weight":
        at_step(step, lambda guard: guard.model.backbone.vit.cls_token.data.view(-1)[:1].fill_(value))
    else:
        at_step(step, lambda guard: spoil_gradient(guard, value))
    told = "the gradients of backbone.vit.blocks.1.mlp.fc1.bias" if where == "gradient" else "the loss terms loss"
    with pytest.raises(NonFiniteError, match=rf"Not finite in step {step}: .*{told}"):
        train(tiny_yaml, tmp_path / "run")
    nothing_bad_was_kept(tmp_path / "run", epochs=(step - 1) // STEPS)


def test_a_weight_spoilt_before_the_evaluation_is_no_metric(tiny_yaml, tmp_path, monkeypatch):
    evaluate, calls = processor.evaluate, [0]

    def spoilt(cfg, model, *args, **kwargs):
        calls[0] += 1
        if calls[0] == 3:  # before training, after epoch 1, after epoch 2
            model.backbone.vit.cls_token.data.view(-1)[0] = float("nan")
        return evaluate(cfg, model, *args, **kwargs)

    monkeypatch.setattr(processor, "evaluate", spoilt)
    with pytest.raises(UserError, match=r"Not finite in the evaluation: the features of ori, sdtps, both for 12 of 12"):
        train(tiny_yaml, tmp_path / "run")
    out = tmp_path / "run"
    assert read_file(out / "last.pth")["epoch"] == 1
    assert [line["epoch"] for line in read_metrics(out / "metrics.jsonl") if line["kind"] == "eval"] == [0, 1]


def test_what_was_told_before_a_run_broke_off_is_there(tiny_yaml, tmp_path, at_step):
    """The pictures and numbers of the evaluations before, also where only a closed writer has them on disk."""
    at_step(STEPS + 1, lambda guard: spoil_gradient(guard, math.nan))
    with pytest.raises(NonFiniteError):
        train(tiny_yaml, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run" / "pictures").iterdir()}
    assert names == {f"{tag}_epoch_00{epoch}.png" for tag in ("selection", "kept_share") for epoch in (0, 1)}
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert len(board.Images("selection")) == len(board.Scalars("eval/both/mAP")) == 2


def test_one_seed_gives_one_run(tiny_yaml, tmp_path):
    for name, workers in (("one", "0"), ("two", "2")):
        train(tiny_yaml, tmp_path / name, "DATALOADER.NUM_WORKERS", workers)
    assert difference(tmp_path / "one", tmp_path / "two") == ""
    train(tiny_yaml, tmp_path / "three", "SOLVER.SEED", "5")
    assert difference(tmp_path / "one", tmp_path / "three")


@pytest.mark.parametrize("step", [1, 4])
def test_a_killed_data_worker_ends_the_run_which_goes_on(tiny_yaml, tmp_path, at_step, step):
    opts = ("DATALOADER.NUM_WORKERS", "2")
    train(tiny_yaml, tmp_path / "whole", *opts)

    def kill(guard):
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)

    at_step(step, kill)
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"data loading process ended unexpectedly.*NUM_WORKERS"):
        train(tiny_yaml, out, *opts)
    go_on = ("TEST.WEIGHT", str(out / "last.pth")) if (out / "last.pth").exists() else ()
    train(tiny_yaml, out, *opts, *go_on)
    assert difference(tmp_path / "whole", out) == ""
