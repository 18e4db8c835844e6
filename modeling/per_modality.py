"""Layers of which each modality has its own, applied to all of them at once: one batched operation instead of three."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modeling.kernels.linear import weight_gradient

PARTS = 32
"""Parts of the rows by which the gradient of a weight is summed up on a GPU, at most."""
MANY_ROWS = 2048
"""Rows from which that is worth it."""


def linear(layers: Iterable[nn.Linear], x: Tensor) -> Tensor:
    """Each modality's own layer, (M, ..., C) -> (M, ..., D), as one batched product."""
    layers = list(layers)
    weight = torch.stack([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.stack([layer.bias for layer in layers])
    return _linear(x, weight, bias)


def norm_linear(norms: Iterable[nn.LayerNorm], layers: Iterable[nn.Linear], x: Tensor) -> Tensor:
    """Each modality's own norm and its own layer behind it, (M, ..., C) -> (M, ..., D).

    Where there are many tokens a sample, scale and shift of the norm act on the weights of the layer, which are few:
    W (n * x + s) + b = (W * n) x + (W s + b).
    """
    norms, layers = list(norms), list(layers)
    scale, shift = (torch.stack([getattr(norm, name) for norm in norms]).unsqueeze(1) for name in ("weight", "bias"))
    if x.dim() == 3:
        rows = F.layer_norm(x, x.shape[-1:], eps=norms[0].eps).flatten(1, -2)
        return linear(layers, (rows * scale + shift).unflatten(1, x.shape[1:-1]))
    weight = torch.stack([layer.weight for layer in layers])
    bias = torch.stack([layer.bias for layer in layers]) + (weight * shift).sum(-1)
    return _linear(F.layer_norm(x, x.shape[-1:], eps=norms[0].eps), weight * scale, bias)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of (..., R, K) and (..., K, C); see `matmul_precision`."""
    plain = torch.compiler.is_compiling() or torch.get_float32_matmul_precision() == "highest"
    return a @ b if plain else _Product.apply(a, b)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (M, ..., C), weight (M, D, C), bias (M, D) -> (M, ..., D)."""
    rows = x.flatten(1, -2)
    if rows.is_cuda and not torch.compiler.is_compiling() and torch.is_grad_enabled():
        autocast = torch.is_autocast_enabled(rows.device.type) and rows.dtype is not torch.float64
        out = _Rows.apply(rows, weight, torch.get_autocast_dtype(rows.device.type) if autocast else rows.dtype)
    else:
        out = rows @ weight.transpose(1, 2)
    if bias is not None:
        out = out + bias.unsqueeze(1).to(out.dtype)
    return out.unflatten(1, x.shape[1:-1])


class _Rows(torch.autograd.Function):
    """x @ weight^T of (M, R, C) and (M, D, C) in a type, whose gradient of the weight arrives in the weight's type and
    layout, and of many rows is summed up in parts.

    It is a small matrix, a sum over thousands of rows: as one product, a few multiprocessors do all of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        rows, w = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(rows, w)
        ctx.precision, ctx.dtypes = torch.get_float32_matmul_precision(), (x.dtype, weight.dtype)
        return rows @ w.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        rows, w = ctx.saved_tensors
        of_x, of_weight, _ = ctx.needs_input_grad
        x_dtype, w_dtype = ctx.dtypes
        with matmul_precision(ctx.precision):
            grad_x = (grad @ w).to(x_dtype) if of_x else None
            return grad_x, _weight_gradient(grad, rows, w_dtype) if of_weight else None, None


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


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Within it, products in float32 are as exact as `torch.set_float32_matmul_precision` says."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """grad^T @ x, (M, R, D) and (M, R, C) -> (M, D, C)."""
    if x.shape[1] < MANY_ROWS:
        return weight_gradient(grad, x, dtype)
    parts = (math.gcd(PARTS, x.shape[1]), -1)
    of_parts = grad.unflatten(1, parts).flatten(0, 1), x.unflatten(1, parts).flatten(0, 1)
    return weight_gradient(*of_parts, dtype).unflatten(0, (len(x), -1)).sum(1)
