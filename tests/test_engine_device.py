"""What CUDA is set up with for the whole process, and cards that cannot be used."""

import os
import warnings

import pytest
import torch

import test_net
import train_net
from engine.device import prepare_cuda, select_device
from utils.errors import UserError
from utils.seed import seed_everything

KEY = "CUBLAS_WORKSPACE_CONFIG"
ALLOCATOR, NEWER, REGISTER = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "NCCL_GRAPH_REGISTER"
RANKS = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture(autouse=True)
def leave_no_trace(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in (KEY, ALLOCATOR, NEWER, REGISTER, *RANKS):
        os.environ.pop(name, None)
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


@pytest.mark.parametrize(
    ("own", "deterministic", "expected"),
    [
        (None, False, ":0:0"),
        (":4096:2", False, ":4096:2"),
        (None, True, ":4096:8"),
        (":4096:2", True, ":4096:8"),
        (":16:8", True, ":16:8"),
    ],
)
def test_workspace_of_products(own, deterministic, expected):
    """Who sets one keeps it, but where equal bits are asked for: two settings alone give them."""
    if own:
        os.environ[KEY] = own
    prepare_cuda()
    seed_everything(1, deterministic=deterministic)
    assert os.environ[KEY] == expected
    assert torch.are_deterministic_algorithms_enabled() is deterministic


def test_products_without_a_workspace_warn_of_nothing():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        prepare_cuda()
        warnings.warn("Requested unified CUBLASLT workspace size of 1048576 bytes exceeds …", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert [str(warning.message) for warning in told] == ["another"]


@pytest.mark.parametrize(
    ("own", "added"),
    [
        ({}, {ALLOCATOR: "expandable_segments:True"}),
        (RANKS | {"WORLD_SIZE": "1"}, {ALLOCATOR: "expandable_segments:True"}),
        ({ALLOCATOR: "expandable_segments:False"}, {}),
        ({NEWER: "max_split_size_mb:512"}, {}),
        (RANKS, {ALLOCATOR: "expandable_segments:True", REGISTER: "0"}),
        (RANKS | {REGISTER: "0"}, {ALLOCATOR: "expandable_segments:True"}),
        (RANKS | {REGISTER: "1"}, {}),
        (RANKS | {ALLOCATOR: "expandable_segments:True"}, {REGISTER: "0"}),
        (RANKS | {NEWER: "max_split_size_mb:512, expandable_segments : True"}, {REGISTER: "0"}),
        (RANKS | {NEWER: "expandable_segments:True", REGISTER: "1"}, {}),
        (RANKS | {ALLOCATOR: "expandable_segments:False"}, {}),
    ],
)
def test_memory_is_extended_and_ranks_register_none_of_it(own, added):
    os.environ.update(own, **{KEY: ":0:0"})
    before = dict(os.environ)
    prepare_cuda()
    assert dict(os.environ) == before | added


@pytest.fixture
def card(monkeypatch):
    """A card whose memory fails as often as the list has errors; what the allocator was told."""
    errors, told = [], []

    def zeros(count, device):
        if errors:
            raise errors.pop(0)
        return torch.ones(count)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append, raising=False)
    return errors, told


def test_a_card_that_cannot_be_used_is_told(card):
    errors, told = card
    errors += [RuntimeError("no kernel image")]
    with pytest.raises(UserError, match="cannot use a card: no kernel image. Install a build"):
        select_device("cuda")
    assert not errors and not told
    prepare_cuda()
    errors += 2 * [RuntimeError("no kernel image")]
    with pytest.raises(UserError, match="cannot use a card: no kernel image. Install a build"):
        select_device("cuda")
    assert not errors


def test_where_memory_cannot_be_extended_it_is_not(card, caplog):
    errors, told = card
    prepare_cuda()
    errors += [RuntimeError("CUDA driver error: operation not supported")]
    assert select_device("cuda").type == "cuda"
    assert told == ["expandable_segments:False"] == [os.environ[ALLOCATOR]] and "operation not supported" in caplog.text


def test_a_card_that_is_full_is_not_one_that_cannot_be_used(card):
    errors, told = card
    prepare_cuda()
    errors += [torch.OutOfMemoryError("CUDA out of memory")]
    with pytest.raises(torch.OutOfMemoryError):
        select_device("cuda")
    assert not told and os.environ[ALLOCATOR] == "expandable_segments:True"


@pytest.mark.parametrize(("script", "weight"), [(train_net, ""), (test_net, "some.pth")])
def test_scripts_prepare_cuda_before_they_use_it(monkeypatch, script, weight):
    class Reached(Exception):
        pass

    def select(name):
        assert os.environ[ALLOCATOR] == "expandable_segments:True"
        raise Reached

    monkeypatch.setattr(script, "select_device", select)
    with pytest.raises(Reached):
        script.main("configs/sample/DeMo_SDTPS.yml", ["TEST.WEIGHT", weight])
