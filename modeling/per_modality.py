"""Layers of which each modality has its own, applied to all of them at once: one batched operation instead of three."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modeling.kernels.linear import weight_gradients
from modeling.precision import matmul_precision


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
    layout; see `weight_gradients`."""

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
            return grad_x, weight_gradients(grad, rows, w_dtype) if of_weight else None, None
