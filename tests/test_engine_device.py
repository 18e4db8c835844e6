"""What the choice of a device sets for the whole process."""

import os
import warnings

import pytest
import torch

from engine.device import spare_workspace
from utils.seed import seed_everything

KEY = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def leave_no_trace(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop(KEY, None)
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
    spare_workspace()
    seed_everything(1, deterministic=deterministic)
    assert os.environ[KEY] == expected
    assert torch.are_deterministic_algorithms_enabled() is deterministic


def test_products_without_a_workspace_warn_of_nothing():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        spare_workspace()
        warnings.warn("Requested unified CUBLASLT workspace size of 1048576 bytes exceeds …", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert [str(warning.message) for warning in told] == ["another"]
