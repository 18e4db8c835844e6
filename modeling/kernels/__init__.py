"""What a ViT consists of besides matrix products, as Triton kernels with their gradients.

`modeling.fused_vit` chains them, and says where that can be done.
"""

import functools
import logging
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch without CUDA come without it
    triton = tl = None


log = logging.getLogger(__name__)

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
        needed = ".".join(map(str, OLDEST_TRITON))
        log.warning("blocks are not fused: Triton is %s, and %s (torch 2.7) is needed", triton.__version__, needed)
    return found >= OLDEST_TRITON


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launches a kernel on the card that its tensors lie on, whichever card is the current one."""
    with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, Tensor))):
        kernel[grid](*args, **options)
