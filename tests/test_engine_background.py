"""Checkpoints written in the background: what lies on the disk, and what happens when it cannot be written."""

import logging
import threading
import time
from collections import OrderedDict

import pytest
import torch
from torch import nn

from engine import background
from engine.background import CheckpointWriter
from utils.checkpoint import read_file, save_file
from utils.errors import UserError


def make_state(step=1):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    return model, {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict()["state"],
        "half": torch.arange(6).bfloat16().view(2, 3).T,
        "best": {"both": {"mAP": 0.5}},
        "rng": [torch.get_rng_state(), (1, None, "x")],
        "step": step,
    }


def assert_equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b) and all(assert_equal(a[k], b[k]) is None for k in a)
        assert getattr(a, "_metadata", None) == getattr(b, "_metadata", None)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b) and all(assert_equal(x, y) is None for x, y in zip(a, b, strict=True))
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    else:
        assert a == b


@pytest.fixture
def gate(monkeypatch):
    """Holds every write back until it is set."""
    gate = threading.Event()

    def slow(state, path):
        assert gate.wait(30)
        save_file(state, path)

    monkeypatch.setattr(background, "save_file", slow)
    return gate


@pytest.fixture
def broken(monkeypatch):
    """`broken(n)`: the next n writes fail as on a full disk; a list of the steps whose write was tried."""
    tried = []

    def fail(times):
        def write(state, path):
            tried.append(state["step"])
            if len(tried) <= times:
                raise UserError(f"{path}: cannot be written: No space left on device.")
            save_file(state, path)

        monkeypatch.setattr(background, "save_file", write)
        return tried

    return fail


def checkpoint_threads():
    return [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


def test_the_file_holds_the_moment_of_the_call(tmp_path, gate):
    """Whatever changes afterwards: weights, moments, random states, metrics."""
    model, state = make_state()
    save_file(state, tmp_path / "foreground.pth")
    with CheckpointWriter() as writer:
        writer.save(state, tmp_path / "last.pth", tmp_path / "best.pth")
        with torch.no_grad():
            for tensor in [*model.state_dict().values(), *state["optimizer"][0].values(), state["half"]]:
                tensor.add_(1)
        state["rng"][0].zero_()
        state["best"]["both"]["mAP"] = 0.75
        state["model"]["new"] = torch.ones(1)
        assert not (tmp_path / "last.pth").exists()
        gate.set()
    expected = read_file(tmp_path / "foreground.pth")
    assert isinstance(expected["model"], OrderedDict)
    for name in ("last.pth", "best.pth"):
        assert_equal(read_file(tmp_path / name), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pth", "foreground.pth", "last.pth"]
    assert not checkpoint_threads()


def test_one_write_at_a_time_and_none_is_left_out(tmp_path, gate):
    with CheckpointWriter() as writer:
        assert not writer.busy
        writer.save(make_state(1)[1], tmp_path / "last.pth", tmp_path / "DeMo_1.pth")
        assert writer.busy
        begin = time.perf_counter()
        threading.Timer(0.2, gate.set).start()
        writer.save(make_state(2)[1], tmp_path / "last.pth", tmp_path / "DeMo_2.pth")
        assert time.perf_counter() - begin > 0.15  # it waited for the first
        writer.save(make_state(3)[1], tmp_path / "last.pth")
        assert len(checkpoint_threads()) <= 1
        writer.finish()
        assert not writer.busy
    assert [read_file(tmp_path / f"{name}.pth")["step"] for name in ("DeMo_1", "DeMo_2", "last")] == [1, 2, 3]


def test_the_snapshot_uses_its_memory_again(tmp_path):
    with CheckpointWriter() as writer:
        writer.save(make_state(1)[1], tmp_path / "last.pth")
        writer.finish()
        first = {name: buffer.data_ptr() for name, buffer in writer._buffers.items()}
        writer.save(make_state(2)[1] | {"half": torch.ones(4)}, tmp_path / "last.pth")
        second = {name: buffer.data_ptr() for name, buffer in writer._buffers.items()}
    assert first.keys() == second.keys()
    assert {name for name in first if first[name] != second[name]} <= {"/half"}
    assert torch.equal(read_file(tmp_path / "last.pth")["half"], torch.ones(4))


def test_a_disk_that_was_full_for_a_while_loses_nothing(tmp_path, broken, caplog):
    tried = broken(1)
    with CheckpointWriter() as writer:
        writer.save(make_state(1)[1], tmp_path / "last.pth", tmp_path / "best.pth")
        while checkpoint_threads():
            time.sleep(0.01)
        assert "No space left on device. Training goes on" in caplog.text
        assert caplog.records[-1].levelno == logging.ERROR
        writer.save(make_state(2)[1], tmp_path / "last.pth")
    assert tried == [1, 1, 2]
    assert [read_file(tmp_path / name)["step"] for name in ("best.pth", "last.pth")] == [1, 2]


@pytest.mark.parametrize("by", ["save", "finish", "leaving"])
def test_a_disk_that_stays_full_stops_the_run(tmp_path, broken, by):
    broken(2)
    with pytest.raises(UserError, match=r"last\.pth: cannot be written"), CheckpointWriter() as writer:
        writer.save(make_state(1)[1], tmp_path / "last.pth")
        if by == "save":
            writer.save(make_state(2)[1], tmp_path / "last.pth")
        elif by == "finish":
            writer.finish()
    assert not checkpoint_threads() and not list(tmp_path.iterdir())


def test_what_is_no_fault_of_the_disk_is_raised(tmp_path):
    with pytest.raises(TypeError, match="would run code"), CheckpointWriter() as writer:
        writer.save({"when": time.struct_time(range(9))}, tmp_path / "last.pth")


def test_an_exception_waits_for_the_file_and_stays_what_it_was(tmp_path, gate, broken, caplog):
    threading.Timer(0.1, gate.set).start()
    with pytest.raises(ZeroDivisionError), CheckpointWriter() as writer:
        writer.save(make_state(1)[1], tmp_path / "last.pth")
        raise ZeroDivisionError
    assert read_file(tmp_path / "last.pth")["step"] == 1 and not checkpoint_threads()
    broken(2)
    with pytest.raises(ZeroDivisionError), CheckpointWriter() as writer:
        writer.save(make_state(2)[1], tmp_path / "last.pth")
        raise ZeroDivisionError
    assert caplog.text.count("No space left on device") == 2
    assert read_file(tmp_path / "last.pth")["step"] == 1


def test_a_second_signal_does_not_wait(tmp_path, gate):
    with pytest.raises(KeyboardInterrupt), CheckpointWriter() as writer:
        writer.save(make_state(1)[1], tmp_path / "last.pth")
        raise KeyboardInterrupt
    threads = checkpoint_threads()
    assert len(threads) == 1 and threads[0].daemon
    gate.set()
    threads[0].join()


def test_the_surplus_goes_after_the_new_one_is_safe(tmp_path, gate, broken, caplog):
    old, stuck, gone = tmp_path / "DeMo_1.pth", tmp_path / "DeMo_2.pth", tmp_path / "DeMo_3.pth"
    old.write_bytes(b"")
    stuck.mkdir()
    with CheckpointWriter() as writer:
        writer.save(make_state(4)[1], tmp_path / "last.pth", surplus=[gone, stuck, old])
        assert old.exists()
        gate.set()
    assert not old.exists() and "DeMo_2.pth: an old checkpoint that could not be removed" in caplog.text
    old.write_bytes(b"")
    broken(2)
    with pytest.raises(UserError), CheckpointWriter() as writer:
        writer.save(make_state(5)[1], tmp_path / "last.pth", surplus=[old])
    assert old.exists()
