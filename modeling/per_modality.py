"""Layers of which each modality has its own, applied to all of them at once: one batched operation instead of three."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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

    Where the tokens outnumber the layer's weights, scale and shift of the norm act on these:
    W (n * x + s) + b = (W * n) x + (W s + b).
    """
    norms, layers = list(norms), list(layers)
    scale, shift = (torch.stack([getattr(norm, name) for norm in norms]).unsqueeze(1) for name in ("weight", "bias"))
    if x.shape[1:-1].numel() < layers[0].out_features:
        rows = F.layer_norm(x, x.shape[-1:], eps=norms[0].eps).flatten(1, -2)
        return linear(layers, (rows * scale + shift).unflatten(1, x.shape[1:-1]))
    weight = torch.stack([layer.weight for layer in layers])
    bias = torch.stack([layer.bias for layer in layers]) + (weight * shift).sum(-1)
    return _linear(F.layer_norm(x, x.shape[-1:], eps=norms[0].eps), weight * scale, bias)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of (..., R, K) and (..., K, C); see `matmul_precision`."""
    exact = torch.get_float32_matmul_precision() == "highest"
    return a @ b if exact or torch.compiler.is_compiling() else _Product.apply(a, b)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (M, ..., C), weight (M, D, C), bias (M, D) -> (M, ..., D)."""
    rows = x.flatten(1, -2)
    out = _ManyRows.apply(rows, weight) if _has_many_rows(rows) else rows @ weight.transpose(1, 2)
    if bias is not None:
        out = out + bias.unsqueeze(1).to(out.dtype)
    return out.unflatten(1, x.shape[1:-1])


def _has_many_rows(rows: Tensor) -> bool:
    """Whether `_ManyRows` is faster: on a GPU, in the precision that is given."""
    plain = not torch.compiler.is_compiling() and not torch.is_autocast_enabled(rows.device.type)
    return rows.is_cuda and plain and rows.shape[1] >= MANY_ROWS


class _ManyRows(torch.autograd.Function):
    """x @ weight^T of (M, R, C) and (M, D, C), whose gradient of the weight is summed up in parts of the rows.

    It is a small matrix, a sum over thousands of rows: as one product, a few multiprocessors do all of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.precision = torch.get_float32_matmul_precision()
        return x @ weight.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad
        with matmul_precision(ctx.precision):
            return grad @ weight if of_x else None, _sum_in_parts(grad, x) if of_weight else None


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


def _sum_in_parts(grad: Tensor, x: Tensor) -> Tensor:
    """grad^T @ x, (M, R, D) and (M, R, C) -> (M, D, C)."""
    parts = (math.gcd(PARTS, x.shape[1]), -1)
    return (grad.unflatten(1, parts).transpose(2, 3) @ x.unflatten(1, parts)).sum(1)
