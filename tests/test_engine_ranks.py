"""Two ranks on the CPU against one process with the whole batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from conftest import TINY
from test_engine_resume import assert_same_state
from torch import nn

from configs import load_cfg
from data import make_dataloader
from data.sampler import IdentityBatchSampler
from engine import evaluate
from engine.device import select_device
from engine.parallel import idle_parameters
from modeling import make_model
from modeling.batch_norm import SyncedBatchNorm1d
from solver import make_loss
from utils.checkpoint import read_file
from utils.errors import UserError
from utils.logging import read_metrics

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.xdist_group("ranks")  # one process starts the ranks, for all tests


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_dataset) -> str:
    path = tmp_path_factory.mktemp("ranks") / "tiny.yml"
    path.write_text(f"{TINY}DATASETS: {{NAMES: RGBNT201, ROOT_DIR: {tiny_dataset}}}\n")
    return str(path)


@pytest.fixture(scope="module")
def runs(config) -> Path:
    """The folder of what one process and two ranks did."""
    folder, port = Path(config).parent, free_port()
    ranks.train(config, folder / "one", ranks.RANDOM)
    command = [sys.executable, str(ROOT / "tests" / "ranks.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [*command, str(rank), "2", str(port), str(folder), config],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    return folder


@pytest.fixture(scope="module")
def found(runs) -> list[dict]:
    return [torch.load(runs / f"rank_{rank}.pt", weights_only=False) for rank in range(2)]


# slices


@pytest.mark.parametrize(("world_size", "parts"), [(1, 1), (2, 1), (4, 1), (2, 3), (3, 2)])
def test_slices_of_the_ranks_make_each_micro_batch(world_size, parts):
    pids = [pid for pid in range(8) for _ in range(6)]
    whole = list(IdentityBatchSampler(pids, 4, 3, seed=1))
    slices = [
        list(IdentityBatchSampler(pids, 4, 3, seed=1, rank=r, world_size=world_size, parts=parts))
        for r in range(world_size)
    ]
    for step, batch in enumerate(whole):
        own = [s[step] for s in slices]
        size = len(batch) // parts // world_size
        joined = [draw for part in range(parts) for r in own for draw in r[part * size : (part + 1) * size]]
        assert joined == batch  # index, epoch and position


def test_a_batch_that_cannot_be_divided_says_what_fits(found):
    for rank in found:
        assert (
            "2 ranks x 5 micro-batches (SOLVER.ACCUMULATION). Set SOLVER.IMS_PER_BATCH to 10 or 20" in rank["refusal"]
        )


def test_all_begin_with_the_weights_of_the_main_rank(found):
    torch.manual_seed(0)
    expected = nn.Linear(3, 2)
    assert torch.equal(found[0]["start"][0], expected.weight) and torch.equal(found[0]["start"][1], expected.bias)
    assert all(torch.equal(a, b) for a, b in zip(found[0]["start"], found[1]["start"], strict=True))


# batch statistics


def test_synchronised_statistics_are_those_of_the_joined_batch(found):
    expected = ranks.normalise(*ranks.batch_of_eight(), nn.BatchNorm1d)
    for name in ("y", "x", "eval"):
        joined = torch.cat([rank["norm"][name] for rank in found])
        torch.testing.assert_close(joined, expected[name], rtol=1e-4, atol=2e-5, msg=name)
    for name in ("weight", "bias"):
        torch.testing.assert_close(
            found[0]["norm"][name] + found[1]["norm"][name], expected[name], rtol=1e-4, atol=1e-4
        )
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(found[0]["norm"][name], expected[name])
        assert torch.equal(found[0]["norm"][name], found[1]["norm"][name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norm_over_ranks_of_one_is_batch_norm(dtype):
    """Whatever the type of the features, sums are in float32 at least: only what goes out is rounded."""
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    one, other = SyncedBatchNorm1d(6).to(wide), nn.BatchNorm1d(6).to(wide)
    nn.init.normal_(one.weight)
    nn.init.normal_(one.bias)
    other.load_state_dict(one.state_dict())
    x, grad = (3 + torch.randn(70, 6)).to(dtype), torch.randn(70, 6).to(dtype)
    own, expected = x.clone().requires_grad_(), x.to(wide).requires_grad_()
    y, z = torch.compile(lambda x: one._over_ranks(x), backend="eager")(own), other(expected)
    y.backward(grad)
    z.backward(grad.to(wide))
    assert y.dtype is own.grad.dtype is dtype
    tolerance = 1e-10 if dtype is torch.float64 else 1e-5
    of_one, of_other = ([norm.weight.grad, norm.bias.grad, *norm.buffers()] for norm in (one, other))
    for a, b in zip(of_one, of_other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    rounded = max(tolerance, torch.finfo(dtype).eps)
    for a, b in ((y, z), (own.grad, expected.grad)):
        torch.testing.assert_close(a.to(wide), b, rtol=rounded, atol=tolerance)


def test_alone_it_is_batch_norm_and_compiles_in_one_piece():
    x, weights = ranks.batch_of_eight()
    one, other = (ranks.normalise(x, weights, make) for make in (SyncedBatchNorm1d, nn.BatchNorm1d))
    assert all(torch.equal(one[name], other[name]) for name in other)
    norm = SyncedBatchNorm1d(5)
    assert norm.state_dict().keys() == nn.BatchNorm1d(5).state_dict().keys()
    torch.compile(norm, backend="eager", fullgraph=True)(x)


def test_ranks_share_the_distances_of_the_joined_batch(found):
    number, _, expected = ranks.triplets(joined=False)
    assert number == 12
    for number, operations, values in (rank["triplets"] for rank in found):
        assert number == 6
        assert operations and not [name for name in operations if "gather" in name or "cdist" in name]
        assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))


# which card


@pytest.mark.parametrize(
    ("device", "cards", "told"),
    [("cuda:0", 2, "one device for 2 ranks"), ("cuda", 1, "2 ranks on this machine, and 1 CUDA devices")],
)
def test_a_card_for_each_rank(monkeypatch, device, cards, told):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    with pytest.raises(UserError, match=told):
        select_device(device)


# training


@pytest.mark.parametrize(("run", "steps"), [("equal", 20), ("parts", 3)])
def test_two_ranks_are_one_process_with_the_whole_batch(runs, found, config, run, steps):
    """SDTPS, HDM and ATMoE, clipping and moving average; then micro-batches and a branch that waits."""
    alone = runs / f"{run}_alone"
    weights = ranks.train(config, alone, ranks.EQUAL if run == "equal" else ranks.PARTS).state_dict()
    one, two = (
        [line for line in read_metrics(out / "metrics.jsonl") if line["kind"] == "train"] for out in (alone, runs / run)
    )
    assert len(one) == len(two) >= steps
    names = [name for name in one[0] if name.startswith(("loss", "id/", "triplet/", "acc"))]
    for a, b in zip(one, two, strict=True):
        assert [a[name] for name in names] == pytest.approx([b[name] for name in names], abs=1e-4), a["step"]
    for name, weight in weights.items():
        assert torch.equal(found[0][run][name], found[1][run][name]), name
        torch.testing.assert_close(found[0][run][name], weight, rtol=1e-3, atol=1e-3, msg=name)


def test_evaluation_of_shares_is_that_of_the_whole(found, config):
    cfg = load_cfg(config, [*ranks.EQUAL, "TEST.IMS_PER_BATCH", "5"])
    data = make_dataloader(cfg)
    model = make_model(cfg, num_classes=data.num_classes, num_cameras=data.num_cameras, pretrained=False)
    model.load_state_dict(found[0]["equal"])
    result = evaluate(cfg, model, data.val, pictures=3)
    for metrics, statistics, pictures in (rank["evaluation"] for rank in found):
        for branch, row in result.metrics.items():
            assert metrics[branch] == pytest.approx(row, abs=1e-3)
        assert statistics == pytest.approx(result.statistics, abs=1e-4)
        assert all(torch.equal(picture, pictures[name]) for name, picture in result.pictures.items())


def test_meters_and_verdict_are_the_same_on_all_ranks(found):
    assert found[0]["meters"] == found[1]["meters"] == {"a": 2.0, "b": 5.0}
    assert found[0]["average"] == found[1]["average"] == {"a": 2.0}
    assert all(rank["alike"].tolist() == [[0, 1, 2], [10, 11, 12]] for rank in found)
    assert found[0]["guard"] == found[1]["guard"]
    assert "step 7: the loss terms id/ori." in found[0]["guard"]


def test_parameters_without_gradient_are_found(config):
    for opts, expected in ((["MODEL.SDTPS_WARMUP_EPOCHS", "1"], {"sdtps", "pool", "heads"}), ([], set())):
        cfg = load_cfg(config, opts)
        model = make_model(cfg, num_classes=6, num_cameras=2, pretrained=False)
        idle = idle_parameters(model, make_loss(cfg, 6), epoch=1)
        assert {name.split(".")[0] for name in idle} == expected
        assert model.training and all(p.grad is None for p in model.parameters())


# going on


def test_four_epochs_are_two_and_two_on_two_ranks(runs, found):
    """Bit for bit; the second half is stopped once more, in its middle, by a signal to one rank."""
    assert found[0]["stopped"] == found[1]["stopped"] and "Stopped after step 2 of epoch 3" in found[0]["stopped"]
    assert_same_state(runs / "whole" / "last.pth", runs / "halves" / "last.pth")
    assert not torch.equal(found[0]["drawn"], found[1]["drawn"])  # each rank drops paths of its own


def test_another_number_of_ranks_goes_on(runs, config):
    ranks.train(config, runs / "to_one", ranks.RANDOM, f"{runs}/whole/DeMo_2.pth")
    for out in ("to_one", "from_one"):
        assert read_file(runs / out / "last.pth")["epoch"] == 4
    states = {out: len(read_file(runs / out / "last.pth")["rng"]) for out in ("to_one", "from_one")}
    assert states == {"to_one": 1, "from_one": 2}


def test_one_rank_writes(runs):
    for run in ("whole", "equal"):
        epochs = [line["epoch"] for line in read_metrics(runs / run / "metrics.jsonl") if line["kind"] == "epoch"]
        assert epochs == sorted(set(epochs)) and len(list((runs / run / "tensorboard").iterdir())) == 1
