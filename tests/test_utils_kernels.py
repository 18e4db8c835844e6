"""Kernels that are built before they are launched, by stand-ins for kernels."""

import signal
import threading
import time
from typing import Any

import pytest
import torch

from utils import kernels
from utils.kernels import build, build_together, launch, launch_that_fits, proven, put_off, trial

triton = pytest.importorskip("triton")


class Built:
    """A kernel that is compiled, and loaded once its launcher is looked up."""

    def __init__(self, load):
        self.load = load

    @property
    def run(self):
        return self.load()


class Kernel:
    """Notes what becomes of it; more than `most` stages do not fit."""

    def __init__(self, most: int = 3, meeting: threading.Barrier | None = None):
        self.most, self.meeting = most, meeting
        self.launched: list[dict] = []
        self.built: list[dict] = []
        self.threads: set[int] = set()

    def __getitem__(self, grid):
        return lambda *args, **options: self._note(self.launched, options)

    def warmup(self, *args: Any, grid: tuple[int, ...], **options: Any) -> Built | None:
        if self.meeting:
            self.meeting.wait(20)
        return Built(lambda: self._note(self.built, options))

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


def test_they_are_built_at_the_same_time_and_not_by_the_thread_that_waits(monkeypatch):
    monkeypatch.setattr(kernels, "own_cores", lambda: 3)
    kernel, x = Kernel(meeting=threading.Barrier(3)), torch.zeros(1)
    build_together(lambda: [launch(kernel, (1,), x, N=n) for n in (1, 2, 3)])  # they wait for each other
    assert len(kernel.built) == 3 and threading.get_ident() not in kernel.threads


def test_a_task_that_is_put_off_runs_once_beside_the_builds(monkeypatch):
    monkeypatch.setattr(kernels, "own_cores", lambda: 2)
    meeting, ran = threading.Barrier(2), []
    kernel, x = Kernel(meeting=meeting), torch.zeros(1)

    def task(*args):
        meeting.wait(20)
        ran.append(args)

    def run():
        launch(kernel, (1,), x)
        assert put_off(task, 1, 2) and put_off(task, 1, 2) and ran == []
        assert put_off(ran.append, 3) and put_off(ran.append, 4)

    build_together(run)
    assert sorted(ran, key=str) == [(1, 2), 3, 4] and len(kernel.built) == 1
    assert not put_off(task, 3) and len(ran) == 3


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


def test_a_size_that_needs_more_than_the_last_of_its_kind_gets_fewer_stages():
    kernel, x = Kernel(), torch.zeros(1)
    launch_that_fits(kernel, (1,), x, N=16)
    kernel.most = 2
    launch_that_fits(kernel, (1,), x, N=16)
    assert [options["num_stages"] for options in kernel.launched] == [3, 3, 2]


def test_what_is_tried_is_built_first():
    kernel, x = Kernel(), torch.zeros(1)
    built_before = []

    def errors():
        launch(kernel, (1,), x, N=16)
        built_before.append(len(kernel.built))
        return {}

    assert proven(errors, "slow") and built_before == [0, 1] and len(kernel.launched) == 1


def test_each_type_and_device_has_a_kernel_of_its_own():
    kernel, x = Kernel(), torch.zeros(4)
    others = [x.half(), x.to("meta"), None]
    build_together(lambda: [launch(kernel, (1,), x, other) for other in (x, *others, x[1:])])
    assert len(kernel.built) == 4


def test_an_interruption_waits_for_no_kernel_that_was_not_begun(monkeypatch):
    monkeypatch.setattr(kernels, "own_cores", lambda: 1)
    kernel, x = Kernel(), torch.zeros(1)

    def interrupted(*args, grid, **options):
        kernel.built.append(options)
        time.sleep(0.2)  # by now all are waited for
        if len(kernel.built) == 1:
            signal.raise_signal(signal.SIGINT)
        time.sleep(0.2)

    kernel.warmup = interrupted
    with pytest.raises(KeyboardInterrupt):
        build_together(lambda: [launch(kernel, (1,), x, N=n) for n in range(10)])
    assert len(kernel.built) <= 2


def test_an_interruption_as_kernels_are_collected_lets_later_ones_launch():
    kernel, x = Kernel(), torch.zeros(1)

    def run():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_together(run)
    launch(kernel, (1,), x)
    assert len(kernel.launched) == 1


def test_an_interpreter_that_builds_nothing_is_no_fault():
    kernel = Kernel()
    kernel.warmup = lambda *args, grid, **options: None
    build(kernel, (1,), torch.zeros(1))


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
