"""What CUDA is set up with for the whole process, and cards that cannot be used."""

import os
import warnings

import pytest
import torch

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
        (RANKS | {NEWER: "max_split_size_mb:512,expandable_segments:True"}, {REGISTER: "0"}),
        (RANKS | {NEWER: "expandable_segments:True", REGISTER: "1"}, {}),
        (RANKS | {ALLOCATOR: "expandable_segments:False"}, {}),
    ],
)
def test_memory_is_extended_and_ranks_register_none_of_it(own, added):
    os.environ.update(own, **{KEY: ":0:0"})
    before = dict(os.environ)
    prepare_cuda()
    assert dict(os.environ) == before | added


def test_a_card_that_cannot_be_used_is_told_with_the_way_out(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("CUDA driver error: operation not supported")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch, "zeros", fail)
    with pytest.raises(UserError, match="a card: CUDA driver error: operation not supported") as told:
        select_device("cuda")
    assert "expandable_segments" not in str(told.value)
    prepare_cuda()
    with pytest.raises(UserError, match="PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False if its driver is to blame"):
        select_device("cuda")
