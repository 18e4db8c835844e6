"""How exact products of float32 are, in the forward pass and in the gradient alike."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Within it, products in float32 are as exact as `torch.set_float32_matmul_precision` says."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of (..., R, K) and (..., K, C); see `matmul_precision`."""
    plain = torch.compiler.is_compiling() or torch.get_float32_matmul_precision() == "highest"
    return a @ b if plain else _Product.apply(a, b)


class _Product(torch.autograd.Function):
    """a @ b of (..., R, K) and (..., K, C), whose gradients are computed in the precision of the product itself."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(a, b)
        ctx.precision = torch.get_float32_matmul_precision()
        return a @ b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        a, b = ctx.saved_tensors
        with matmul_precision(ctx.precision):
            return grad @ b.mT, a.mT @ grad
