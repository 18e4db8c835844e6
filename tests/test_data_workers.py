"""Data worker processes: their number, and what fits into shared memory."""

import logging
import os
from types import SimpleNamespace

import data.workers as module


def test_workers_are_limited_with_a_notice(monkeypatch, caplog):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4), raising=False)
    with caplog.at_level(logging.INFO):
        assert [module.count_workers(n) for n in (-1, 0, 3, 4)] == [3, 0, 3, 4]
        assert not caplog.records
        assert module.count_workers(8) == 4
    assert "4 workers instead of 8" in caplog.text


def test_ranks_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(6), raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert module.count_workers(-1) == 2 and module.count_workers(8) == 3


def test_workers_fit_into_shared_memory(monkeypatch, caplog):
    usage = SimpleNamespace(free=64 * 2**20)  # a container's default
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(module.os.path, "isdir", lambda path: True)
    small = module.worker_options(4, batch_bytes=2**20)
    assert small["num_workers"] == 4
    large = module.worker_options(4, batch_bytes=72 * 2**20)
    assert large["num_workers"] == 0 and large["prefetch_factor"] is None
    assert "--shm-size" in caplog.text
