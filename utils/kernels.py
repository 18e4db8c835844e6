"""Launching Triton kernels: where that can be done, and how they prove that they compute the right thing.

The kernels themselves are in `modeling.kernels` and `data.device_kernel`.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

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


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launches a kernel on the card that its tensors lie on, whichever card is the current one."""
    with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, Tensor))):
        kernel[grid](*args, **options)


STAGES = (3, 2, 1)
"""How many turns of a loop may be in flight at once, the first that a card's shared memory has room for."""
_fitting: dict[tuple, int] = {}


def launch_that_fits(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`launch` by as many of `STAGES` as a card has shared memory for: found by trying, once for each size.

    Raises:
        OutOfResources: none fits.
    """
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    known = (kernel, *options.items(), tensors[0].dtype, tensors[0].device)
    for stages in [_fitting[known]] if known in _fitting else STAGES:
        try:
            launch(kernel, grid, *args, num_stages=stages, **options)
        except triton.runtime.errors.OutOfResources:
            if stages == STAGES[-1]:
                raise
            continue
        _fitting[known] = stages
        return


def proven(errors: Callable[[], dict[str, tuple[float, float]]], consequence: str) -> bool:
    """Whether kernels run and compute the right thing: what `compare` returns, up to `TOLERANCE`. Otherwise the log
    tells the consequence, and why.

    Raises:
        torch.OutOfMemoryError: it could not be tried.
    """
    try:
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
