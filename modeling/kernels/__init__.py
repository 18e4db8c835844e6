"""What a ViT's blocks consist of besides matrix products, as Triton kernels with their gradients."""

import functools
import logging

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch without CUDA come without it
    triton = tl = None

log = logging.getLogger(__name__)


@functools.cache
def kernels_work(device: torch.device) -> bool:
    """Whether this file's neighbours can run on a device; where they cannot on a GPU, the log says why, once."""
    if device.type != "cuda" or triton is None:
        return False
    try:
        x = torch.zeros(1, device=device)
        _probe[(1,)](x)
        return x.item() == 1
    except Exception as error:  # such as no C compiler, or a card that Triton does not know
        told = str(error).strip().splitlines() or [""]
        log.warning("kernels are not used, so the backbone is slower: %s: %s", type(error).__name__, told[-1])
        return False


if triton is not None:

    @triton.jit
    def _probe(x):
        tl.store(x, 1.0)
