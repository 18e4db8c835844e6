"""Launching Triton kernels: where that can be done, and how they prove that they compute the right thing.

The kernels themselves are in `modeling.kernels` and `data.device_kernel`.
"""

import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from utils.distributed import own_cores

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch without CUDA come without it
    triton = tl = None


log = logging.getLogger(__name__)

TOLERANCE = 0.02
"""Relative error up to which kernels count as right in half precision, beyond twice that of the same as written."""

OLDEST_TRITON = (3, 3)
"""Before it, the attention kernels abort the process as they are compiled for an H100 (LLVM, 3.2 with torch 2.6)."""


def can_launch(device: torch.device) -> bool:
    """Whether kernels can be launched on a device: a GPU of NVIDIA's, for which they are written."""
    return device.type == "cuda" and torch.version.hip is None and has_triton()


@functools.cache
def has_triton() -> bool:
    """Whether Triton is there and new enough; an old one is told once."""
    found = () if triton is None else tuple(map(int, triton.__version__.split(".")[:2]))
    if found and found < OLDEST_TRITON:
        told = triton.__version__, ".".join(map(str, OLDEST_TRITON))
        log.warning("no kernels of our own, so training is slower: Triton is %s, and %s (torch 2.7) is needed", *told)
    return found >= OLDEST_TRITON


class _Collected(threading.local):
    """What a thread would have launched, one of each variant; None where it launches."""

    builds: dict[tuple, Callable[[], object]] | None = None


_collected = _Collected()


def put_off(task: Callable[..., object], *args: Any) -> bool:
    """Within the `run` of `build_together`, notes a task that shall run beside the builds and returns True. Elsewhere
    it returns False, and the task is the caller's."""
    if _collected.builds is None:
        return False
    _collected.builds.setdefault((task, *args), partial(task, *args))
    return True


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launches a kernel on the card that its tensors lie on, whichever card is the current one."""
    if _collected.builds is not None:
        _collected.builds.setdefault(_variant(kernel, args, options), partial(build, kernel, grid, *args, **options))
        return
    with torch.cuda.device_of(_tensors(args)[0]):
        kernel[grid](*args, **options)


def build(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Compiles a kernel for such a launch and loads it onto the card, unless that has been done before.

    Raises:
        OutOfResources: the card has less shared memory.
    """
    with torch.cuda.device_of(_tensors(args)[0]):
        built = kernel.warmup(*args, grid=grid, **options)
        if built is not None:  # Triton's interpreter builds nothing
            _ = built.run  # looked up, it is loaded


STAGES = (3, 2, 1)
"""How many turns of a loop may be in flight at once, the first that a card's shared memory has room for."""
_fitting: dict[tuple, int] = {}


def launch_that_fits(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`launch` by as many of `STAGES` as a card has shared memory for: found by trying, once for each size.

    Raises:
        OutOfResources: none fits.
    """
    if _collected.builds is not None:
        task = partial(_by_stages, build, kernel, grid, *args, **options)
        _collected.builds.setdefault(_variant(kernel, args, options), task)
        return
    _by_stages(launch, kernel, grid, *args, **options)


def _by_stages(action: Callable[..., None], kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    like = _tensors(args)[0]
    known = (kernel, *options.items(), like.dtype, like.device)
    for stages in [stages for stages in STAGES if stages <= _fitting.get(known, STAGES[0])]:
        try:
            action(kernel, grid, *args, num_stages=stages, **options)
        except triton.runtime.errors.OutOfResources:
            if stages == STAGES[-1]:
                raise
            continue
        _fitting[known] = stages
        return


def build_together(run: Callable[[], object]) -> None:
    """Builds the kernels that `run` launches, many at a time; launched one after the other, each would be waited for.

    Args:
        run: called without its kernels being launched, so that what it computes from their results means nothing.
            Those of a backward pass on a GPU are launched if it is not within a `trial`. What it raises is left to its
            next call to tell, and so is a kernel that cannot be built.
    """
    if not torch.cuda.is_available():
        return
    builds: dict[tuple, Callable[[], object]] = {}
    _collected.builds = builds
    try:
        run()
    except Exception:
        log.debug("kernels are not built together", exc_info=True)
    finally:
        _collected.builds = None
    pool = ThreadPoolExecutor(own_cores(), thread_name_prefix="build")
    try:
        for done in [pool.submit(task) for task in builds.values()]:
            if error := done.exception():
                log.debug("a kernel could not be built: %s", error)
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupted script waits for those alone that are under way


def _variant(kernel: Any, args: Sequence[Any], options: dict[str, Any]) -> tuple:
    """What a kernel is compiled for, as far as this project's launches differ."""
    kinds = ((x.dtype, x.device) if isinstance(x, Tensor) else type(x) for x in args)
    return kernel, *kinds, *options.items()


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    return [arg for arg in args if isinstance(arg, Tensor)]


@contextmanager
def trial(device: torch.device) -> Iterator[None]:
    """Within it kernels are tried on random numbers, the same ones every time, as if nothing stood around: no autocast,
    no inference. Those of the run are as before. Backward passes stay on this thread, for `build_together`."""
    own_random_state = torch.random.fork_rng([device] if device.type == "cuda" else [])
    no_autocast = torch.autocast(device.type, enabled=False)  # backward passes hear of it too
    on_this_thread = partial(torch.autograd.set_multithreading_enabled, False)  # after inference, which sets it
    with torch.inference_mode(False), torch.enable_grad(), own_random_state, no_autocast, on_this_thread():
        torch.manual_seed(0)
        yield


def proven(errors: Callable[[], dict[str, tuple[float, float]]], consequence: str) -> bool:
    """Whether kernels run and compute the right thing: what `compare` returns, up to `TOLERANCE`. Otherwise the log
    tells the consequence, and why.

    Raises:
        torch.OutOfMemoryError: it could not be tried.
    """
    try:
        build_together(errors)
        found = errors().items()
        faults = [f"{name} differs by {own:.2g}" for name, (own, usual) in found if not own <= TOLERANCE + 2 * usual]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # such as no C compiler, or a card that Triton does not know
        told = str(error).strip().splitlines() or [""]
        faults = [f"{type(error).__name__}: {told[-1]}"]
    if faults:
        log.warning("%s: %s", consequence, "; ".join(faults[:3]))
    return not faults


def compare(
    names: Sequence[str], found: Sequence[Tensor], usual: Sequence[Tensor], expected: Sequence[Tensor]
) -> dict[str, tuple[float, float]]:
    """The largest errors of some tensors, and of the same as they are usually computed in that precision, by name.

    An error is |found - expected| of a row (a token, or what a weight has for one channel) over the root mean square of
    |expected| over the rows; NaN where there is one.
    """

    def largest(found: Tensor, expected: Tensor) -> float:
        off, size = (torch.atleast_2d(x).flatten(0, -2).norm(dim=-1) for x in (found - expected, expected))
        return (off.max() / size.square().mean().sqrt()).item()

    compared = zip(names, found, usual, expected, strict=True)
    return {name: (largest(a, c), largest(b, c)) for name, a, b, c in compared}
