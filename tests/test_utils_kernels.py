"""Kernels that are built before they are launched, by stand-ins for kernels."""

import threading
from types import SimpleNamespace

import pytest
import torch

from utils import kernels
from utils.kernels import build_together, launch, launch_that_fits, trial

triton = pytest.importorskip("triton")


class Kernel:
    """Notes what becomes of it; more than `most` stages do not fit."""

    def __init__(self, most: int = 3, meeting: threading.Barrier | None = None):
        self.most, self.meeting = most, meeting
        self.launched: list[dict] = []
        self.built: list[dict] = []
        self.threads: set[int] = set()

    def __getitem__(self, grid):
        return lambda *args, **options: self._note(self.launched, options)

    def warmup(self, *args, grid, **options):
        self._note(self.built, options)
        if self.meeting:
            self.meeting.wait(20)
        return SimpleNamespace(run=None)

    def _note(self, where, options):
        where.append(options)
        self.threads.add(threading.get_ident())
        if options.get("num_stages", 0) > self.most:
            raise triton.runtime.errors.OutOfResources(options["num_stages"], self.most, "shared memory")


@pytest.fixture(autouse=True)
def card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "_fitting", {})


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel):
        ctx.kernel = kernel
        launch(kernel, (1,), x, 3, N=16)
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        launch(ctx.kernel, (1,), grad, 3, N=32)
        return 2 * grad, None


def test_each_variant_of_a_pass_and_its_gradient_is_built_once_and_none_is_launched():
    kernel, x = Kernel(), torch.ones(4, requires_grad=True)

    def run():
        with trial(x.device):
            (Twice.apply(x, kernel).sum() + Twice.apply(x, kernel).sum()).backward()
        launch(kernel, (5,), x.double(), 7, N=16)

    build_together(run)
    assert kernel.launched == [] and sorted(options["N"] for options in kernel.built) == [16, 16, 32]
    run()
    assert [options["N"] for options in kernel.launched] == [16, 16, 32, 32, 16] and len(kernel.built) == 3


def test_they_are_built_at_the_same_time_and_not_by_the_thread_that_waits():
    kernel, x = Kernel(meeting=threading.Barrier(3)), torch.zeros(1)
    build_together(lambda: [launch(kernel, (1,), x, N=n) for n in (1, 2, 3)])  # they wait for each other
    assert len(kernel.built) == 3 and threading.get_ident() not in kernel.threads


@pytest.mark.parametrize("most", [3, 2, 1])
def test_the_number_of_stages_that_fits_is_found_as_a_kernel_is_built(most):
    kernel, x = Kernel(most), torch.zeros(1)
    build_together(lambda: launch_that_fits(kernel, (1,), x, N=16))
    launch_that_fits(kernel, (1,), x, N=16)
    assert [options["num_stages"] for options in kernel.built] == [3, 2, 1][: 4 - most]
    assert [options["num_stages"] for options in kernel.launched] == [most]


def test_what_fails_is_left_to_the_launch_to_tell():
    kernel, x = Kernel(most=0), torch.zeros(1)

    def run():
        launch_that_fits(kernel, (1,), x, N=16)
        raise RuntimeError("no such thing")

    build_together(run)
    assert len(kernel.built) == 3
    with pytest.raises(triton.runtime.errors.OutOfResources):
        launch_that_fits(kernel, (1,), x, N=16)


def test_another_thread_launches_meanwhile():
    kernel, other, x = Kernel(), Kernel(), torch.zeros(1)

    def run():
        thread = threading.Thread(target=launch, args=(other, (1,), x))
        thread.start()
        thread.join()
        launch(kernel, (1,), x)

    build_together(run)
    assert len(other.launched) == 1 and kernel.launched == []


def test_a_trial_is_the_same_whatever_stands_around_it_and_leaves_no_trace():
    def drawn() -> torch.Tensor:
        with trial(torch.device("cpu")):
            x = torch.randn(3, requires_grad=True)
            (x.view(1, 3) @ torch.ones(3, 1)).sum().backward()
            assert x.grad.dtype is torch.float32 and not torch._C._is_multithreading_enabled()
        return x.detach()

    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        within = drawn()
    assert torch.equal(within, drawn()) and torch.equal(state, torch.get_rng_state())
    assert torch._C._is_multithreading_enabled()
