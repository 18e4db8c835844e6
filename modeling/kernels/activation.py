# mypy: disable-error-code="no-untyped-def"
"""The activation of a ViT's MLP with the bias before it and the matrix product behind it.

Of the hidden layer, a block's largest tensor, only what goes into the activation need be kept; what comes out can be
made again in the backward pass by the kernel that computes the gradient, which sums up that of the bias as well.

Shape letters: M tokens of all images, V width of the hidden layer, W width of the ViT.
"""

from typing import Any

import torch
from timm.layers.activations import QuickGELU
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modeling.kernels.linear import sum_parts, weight_gradient
from utils.kernels import launch, tl, triton

if triton is not None:
    from modeling.kernels.linear import tile_of

FORWARD = {"ROWS": 32, "C": 128, "R": 8}
BACKWARD = {"ROWS": 128, "C": 128, "R": 16}
"""Rows and columns of a program, and the rows that it takes at a time."""


def has_kernel(act: nn.Module) -> bool:
    """Whether there is a kernel for this activation."""
    return isinstance(act, QuickGELU) or (isinstance(act, nn.GELU) and act.approximate == "none")


def activated_linear(
    hidden: Tensor, bias: Tensor, weight: Tensor, act: nn.Module, half: Tensor | None = None, keep: bool = False
) -> Tensor:
    """act(hidden + bias) @ weight.T

    Args:
        hidden: (..., V) what the first layer computed, without its bias (V,).
        weight: (W, V) of the second layer.
        act: an activation that `has_kernel`.
        half: the weight in the type of `hidden`, where it is at hand.
        keep: keep what comes out of the activation too, of the size of `hidden`, and write it once less.

    Returns:
        (..., W)
    """
    half = weight.detach().to(hidden.dtype) if half is None else half
    return _ActivatedLinear.apply(hidden, bias, weight, half, isinstance(act, QuickGELU), keep)


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, bias, weight, w, quick, keep):  # type: ignore[override]
        h = hidden.flatten(0, -2).contiguous()
        out = torch.empty_like(h)
        launch(_forward_kernel, _grid(h, FORWARD), h, bias, out, len(h), W=h.shape[1], QUICK=quick, **FORWARD)
        ctx.save_for_backward(h, bias, w, out if keep else None)
        ctx.quick, ctx.dtype = quick, weight.dtype
        return (out @ w.T).unflatten(0, hidden.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):  # type: ignore[override]
        h, bias, w, out = ctx.saved_tensors
        g = grad.flatten(0, -2)
        grad_out = g @ w
        grad_hidden, again = torch.empty_like(h), torch.empty_like(h) if out is None else None
        sums = h.new_empty(triton.cdiv(len(h), BACKWARD["ROWS"]), h.shape[1], dtype=torch.float32)
        sizes = {"W": h.shape[1], "QUICK": ctx.quick, "AGAIN": out is None, **BACKWARD}
        launch(_backward_kernel, _grid(h, BACKWARD), h, bias, grad_out, grad_hidden, again, sums, len(h), **sizes)
        out = again if out is None else out
        of_weight = weight_gradient(g, out, ctx.dtype) if ctx.needs_input_grad[2] else None
        return grad_hidden.unflatten(0, grad.shape[:-1]), sum_parts(sums), of_weight, *[None] * 3


def _grid(h: Tensor, sizes: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(h.shape[1], sizes["C"]) * triton.cdiv(len(h), sizes["ROWS"]),)


if triton is not None:

    @triton.jit
    def activate(x, QUICK: tl.constexpr):
        """QuickGELU or GELU, and its derivative."""
        if QUICK:
            s = tl.sigmoid(1.702 * x)
            return x * s, s * (1 + 1.702 * x * (1 - s))
        s = 0.5 * (1 + tl.math.erf(x * 0.7071067811865476))
        return x * s, s + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)

    @triton.jit(do_not_specialize=["M"])
    def _forward_kernel(
        hidden, bias, out, M, W: tl.constexpr, QUICK: tl.constexpr, R: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr
    ):
        part, columns = tile_of(tl.program_id(0), W, C)
        b = tl.load(bias + columns, mask=columns < W, other=0.0)
        for first in tl.range(part * ROWS, (part + 1) * ROWS, R):
            rows = first + tl.arange(0, R)
            at = rows[:, None].to(tl.int64) * W + columns[None, :]
            inside = (rows < M)[:, None] & (columns < W)[None, :]
            x = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32) + b[None, :]
            a, _ = activate(x, QUICK)
            tl.store(out + at, a.to(out.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["M"])
    def _backward_kernel(
        hidden,
        bias,
        grad_out,
        grad_hidden,
        out,
        sums,
        M,
        W: tl.constexpr,
        QUICK: tl.constexpr,
        AGAIN: tl.constexpr,
        R: tl.constexpr,
        C: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        part, columns = tile_of(tl.program_id(0), W, C)
        b = tl.load(bias + columns, mask=columns < W, other=0.0)
        total = tl.zeros((R, C), tl.float32)
        for first in tl.range(part * ROWS, (part + 1) * ROWS, R):
            rows = first + tl.arange(0, R)
            at = rows[:, None].to(tl.int64) * W + columns[None, :]
            inside = (rows < M)[:, None] & (columns < W)[None, :]
            x = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32) + b[None, :]
            g = tl.load(grad_out + at, mask=inside, other=0.0).to(tl.float32)
            a, slope = activate(x, QUICK)
            g *= slope
            if AGAIN:
                tl.store(out + at, a.to(out.dtype.element_ty), mask=inside)
            tl.store(grad_hidden + at, g.to(grad_hidden.dtype.element_ty), mask=inside)
            total += g
        tl.store(sums + part * W + columns, tl.sum(total, axis=0), mask=columns < W)
