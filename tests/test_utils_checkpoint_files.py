import itertools
import os
import pickle
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file as save_safetensors
from torch import nn

from utils import checkpoint
from utils.checkpoint import read_file, save_file
from utils.errors import UserError

STATE = {
    "model": {"weight": torch.arange(6.0).view(2, 3), "half": torch.ones(2, dtype=torch.bfloat16)},
    "epoch": 3,
    "best": 0.5,
    "names": ["a", ("b", None, True)],
}


class Opener:
    """Unpickling it would create a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_round_trip_creates_the_folder_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "run" / "last.pth"
    save_file(STATE, path)
    state = read_file(path)
    assert torch.equal(state["model"]["weight"], STATE["model"]["weight"])
    assert state["model"]["half"].dtype == torch.bfloat16
    assert [state[key] for key in ("epoch", "best", "names")] == [3, 0.5, ["a", ("b", None, True)]]
    assert [p.name for p in path.parent.iterdir()] == ["last.pth"]


def test_optimizer_and_generator_state_can_be_read_back(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_file({"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}, tmp_path / "a.pth")
    state = read_file(tmp_path / "a.pth")
    assert torch.equal(state["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert torch.equal(state["rng"], torch.get_rng_state())


@pytest.mark.parametrize("takes_advice", [True, False])
def test_the_disk_begins_before_all_is_packed_where_it_takes_advice(tmp_path, monkeypatch, takes_advice):
    begun: list[tuple[int, int]] = []

    def advise(file, start, length, advice):
        assert advice == os.POSIX_FADV_DONTNEED and os.fstat(file).st_size == start + length  # not still in a buffer
        begun.append((start, start + length))
        if not takes_advice:
            raise OSError("not supported")

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(checkpoint, "BEGIN_AFTER", 100_000)
    state = {str(i): torch.rand(300) for i in range(500)}  # small ones, of which the file's buffer holds a few
    save_file(state, tmp_path / "a.pth")
    assert len(begun) > 5 and begun[0][0] == 0 and all(a[1] == b[0] for a, b in itertools.pairwise(begun))
    read = read_file(tmp_path / "a.pth")
    assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)


def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "last.pth"
    save_file(STATE, path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(UserError, match=r"last\.pth: cannot be written.*free space"):
            save_file({"big": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert read_file(path)["epoch"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth"]


def test_a_crash_before_the_replacement_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pth"
    save_file(STATE, path)

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save_file({"epoch": 4}, path)
    assert read_file(path)["epoch"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth"]


def test_writing_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_file(STATE, tmp_path / "file" / "last.pth")


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    with pytest.raises(TypeError, match="numpy"):
        save_file({"rng": np.random.default_rng(0).bit_generator.state, "best": np.float64(0.5)}, tmp_path / "a.pth")
    assert not list(tmp_path.iterdir())


def test_safetensors(tmp_path):
    save_safetensors({"weight": torch.ones(2)}, tmp_path / "a.safetensors")
    assert torch.equal(read_file(tmp_path / "a.safetensors")["weight"], torch.ones(2))


def test_the_old_format_of_torch(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_file(tmp_path / "a.pth")["weight"], torch.ones(2))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_runs_code_is_refused(tmp_path, zipped):
    victim = tmp_path / "victim"
    path = tmp_path / "a.pth"
    torch.save({"weight": torch.ones(2), "x": Opener(str(victim))}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        UserError, match=r"a\.pth: refused, because reading it would run code \((_?io|builtins)\.open\)"
    ):
        read_file(path)
    assert not victim.exists()


def test_a_whole_model_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"run code \(torch\.nn\.modules\.linear\.Linear\).*save its state dict"):
        read_file(tmp_path / "a.pth")


def truncated(source: Path, path: Path, share: float) -> None:
    content = source.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated(tmp_path, name, share):
    save_file({"weight": torch.ones(1000)}, tmp_path / "whole.pth")
    save_safetensors({"weight": torch.ones(1000)}, tmp_path / "whole.safetensors")
    path = tmp_path / name
    truncated(tmp_path / f"whole{path.suffix}", path, share)
    with pytest.raises(UserError, match=f"{name}: damaged or not a checkpoint .{path.stat().st_size} bytes"):
        read_file(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_cut_short_at_any_byte_is_recognised_and_named(tmp_path, zipped):
    whole, cut = tmp_path / "whole.bin", tmp_path / "cut.pth"
    torch.save({"w": torch.arange(9.0), "epoch": 3}, whole, _use_new_zipfile_serialization=zipped)
    assert read_file(whole)["epoch"] == 3
    content = whole.read_bytes()
    # the old format may end in the middle of a class's name, which then is a class that is not allowed
    told = "damaged or not a checkpoint .{}.bytes.*Fetch or copy" + ("" if zipped else "|refused")
    ends = {*range(40), *range(len(content) - 40, len(content))}
    for size in sorted(ends | set(range(0, len(content), 3))):
        cut.write_bytes(content[:size])
        with pytest.raises(UserError, match=rf"cut\.pth: ({told.format(size)})"):
            read_file(cut)


def test_beside_a_damaged_checkpoint_the_newest_whole_one_is_offered(tmp_path):
    run = {"optimizer": {}, "model": {"weight": torch.ones(3)}}
    for age, (name, state) in enumerate(
        [("last", run), ("DeMo_30", run), ("weights", {"weight": torch.ones(3)}), ("DeMo_20", run), ("DeMo_10", run)]
    ):
        path = tmp_path / f"{name}.pth"
        save_file(state, path)
        os.utime(path, (1e9 - age, 1e9 - age))
    for name in ("last", "DeMo_30"):
        truncated(tmp_path / f"{name}.pth", tmp_path / f"{name}.pth", 0.8)
    with pytest.raises(UserError, match=r"last\.pth: damaged.*newest whole one beside it: .*/DeMo_20\.pth$"):
        read_file(tmp_path / "last.pth")


@pytest.mark.parametrize("content", [b"hello, this is a text\n" * 20, b"<!DOCTYPE html><html></html>", b"\x00" * 300])
@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.safetensors"])
def test_other_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: damaged or not a checkpoint"):
        read_file(tmp_path / name)


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_is_told_apart(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "a.pt")
    with pytest.raises(UserError, match="TorchScript"):
        read_file(tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore")
def test_something_else_than_a_dict(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "a.pth")
    with pytest.raises(UserError, match="holds a list"):
        read_file(tmp_path / "a.pth")
    with open(tmp_path / "b.pth", "wb") as file:
        pickle.dump({"a": 1}, file)
    with pytest.raises(UserError, match=r"b\.pth"):
        read_file(tmp_path / "b.pth")


def test_missing_file_and_folder_name_what_is_there(tmp_path):
    (tmp_path / "DeMobest.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"best\.pth: there is no such file.*holds DeMobest\.pth"):
        read_file(tmp_path / "best.pth")
    with pytest.raises(UserError, match=r"is a folder.*holds DeMobest\.pth"):
        read_file(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        read_file(tmp_path / "nowhere" / "best.pth")
