"""A run that is killed, or whose disk fails, loses nothing; tests/faults holds the longer versions."""

import errno
import os
import threading
from pathlib import Path

import pytest
from faults.sigkill import difference, survive

import train_net
from utils.checkpoint import read_file
from utils.errors import UserError


def test_two_kills_are_survived(tmp_path):
    kills = survive(2, tmp_path)
    assert len(kills) == 2 and [kill.fault for kill in kills] == ["", ""]


@pytest.fixture
def fail_writes(monkeypatch):
    """`fail_writes(2, 3)`: the second and third write of a checkpoint find no room on the disk."""
    fsync, count = os.fsync, [0]

    def install(*numbers):
        def full(descriptor):
            count[0] += 1
            if count[0] in numbers:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", full)

    return install


def train(config: Path, out: Path, *opts: str) -> None:
    train_net.main(
        str(config), ["SOLVER.MAX_EPOCHS", "3", "SOLVER.CHECKPOINT_PERIOD", "1", "OUTPUT_DIR", str(out), *opts]
    )


def test_training_on_a_full_disk(tiny_yaml, tmp_path, fail_writes, caplog):
    train(tiny_yaml, tmp_path / "whole")
    fail_writes(2, 5, 6)
    train(tiny_yaml, tmp_path / "once")  # the second checkpoint fails, and is written before the third
    assert difference(tmp_path / "whole", tmp_path / "once") == ""
    assert "last.pth: cannot be written: [Errno 28] No space left on device" in caplog.text
    with pytest.raises(UserError, match=r"last\.pth: cannot be written.*No space left"):
        train(tiny_yaml, tmp_path / "twice")  # its first checkpoint is the fifth write
    assert not [p.name for p in (tmp_path / "twice").iterdir() if p.suffix in (".pth", ".tmp")]


def test_metrics_that_cannot_be_written_do_not_stop_training(tiny_yaml, tmp_path, caplog, monkeypatch):
    replace, threads = os.replace, []

    def read_only(source, target):
        if Path(target).name == "metrics.json":
            threads.append(threading.current_thread())
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        replace(source, target)

    monkeypatch.setattr(os, "replace", read_only)
    train(tiny_yaml, tmp_path / "run")
    assert caplog.text.count("metrics.json cannot be written") == 1
    assert threads and threading.main_thread() not in threads  # training does not wait for the disk
    assert read_file(tmp_path / "run" / "last.pth")["epoch"] == 3
    assert not list((tmp_path / "run").glob(".*"))
