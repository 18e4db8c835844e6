"""What a ViT consists of besides matrix products, as Triton kernels with their gradients.

`modeling.fused_vit` chains them, and says where that can be done.
"""

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch without CUDA come without it
    triton = tl = None


def can_launch(device: torch.device) -> bool:
    """Whether kernels can be launched on a device: a GPU of NVIDIA's, for which they are written."""
    return device.type == "cuda" and triton is not None and torch.version.hip is None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launches a kernel on the card that its tensors lie on, whichever card is the current one."""
    with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, Tensor))):
        kernel[grid](*args, **options)
