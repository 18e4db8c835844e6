# mypy: disable-error-code="no-untyped-def"
"""A linear layer in half precision, whose gradients arrive in the type of its float32 weights.

Shape letters: M rows, V columns in, W columns out.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from utils.kernels import launch, tl, triton

SUM = {"ROWS": 128, "C": 256, "R": 16}
"""Rows and columns that a program sums up, and the rows that it takes at a time."""
MANY_ROWS, PARTS = 2048, 32
"""Rows from which the gradients of small weights are summed up in parts of them, and how many parts at most where they
are those of several layers."""
FEW_WEIGHTS = 768 * 768
"""Weights of a layer up to which its gradient, a sum over as many rows, is made in parts, so that all multiprocessors
have something to do: 48 us in place of 55 (one H200, 24,768 rows)."""
TOTAL = {"R": 256, "C": 16}
"""Rows and columns that a program takes at a time as it sums up what others have."""


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, half: tuple[Tensor, Tensor | None] | None = None
) -> Tensor:
    """x @ weight.T + bias, in the type of x: (..., V), (W, V), (W,) -> (..., W).

    Args:
        bias: with `half`, which has the whole of it, only its beginning if no other part is to get a gradient here.
        half: weight and bias in the type of x, where they are at hand; see `halves`.
    """
    if half is None:
        half = weight.detach().to(x.dtype), None if bias is None else bias.detach().to(x.dtype)
    return _Linear.apply(x, weight, bias, *half)


def halves(kinds: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """Weights in another type, those of a kind, which have one shape, in one tensor (n, ...): cast by few kernels for
    all of them. No gradient flows through them."""
    cast = [like.new_empty(len(weights), *like.shape, dtype=dtype) for weights in kinds for like in weights[:1]]
    torch._foreach_copy_([half for kind in cast for half in kind], [w.detach() for weights in kinds for w in weights])
    return cast


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, w, b):  # type: ignore[override]
        rows = x.flatten(0, -2)
        out = rows @ w.T if b is None else torch.addmm(b, rows, w.T)
        ctx.save_for_backward(rows, w)
        ctx.dtype, ctx.biases = weight.dtype, 0 if bias is None else len(bias)
        return out.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):  # type: ignore[override]
        rows, w = ctx.saved_tensors
        g = grad.flatten(0, -2).contiguous()
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        return (
            (g @ w).unflatten(0, grad.shape[:-1]) if of_x else None,
            weight_gradient(g, rows, ctx.dtype) if of_weight else None,
            column_sums(g[:, : ctx.biases]) if of_bias else None,
            *[None] * 2,
        )


def weight_gradient(grad_out: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """grad_out.T @ x, of matrices or of batches of them, in another type, without rounding to that of the factors first
    where torch can do so. Of few weights and many rows it is made as the sum of two or three parts of the rows."""
    rows, few = x.shape[-2], grad_out.shape[-1] * x.shape[-1] <= FEW_WEIGHTS
    if x.dim() == 2 and few and rows >= MANY_ROWS and (parts := next((n for n in (2, 3) if rows % n == 0), 1)) > 1:
        return weight_gradient(grad_out.unflatten(0, (parts, -1)), x.unflatten(0, (parts, -1)), dtype).sum(0)
    product = torch.ops.aten.mm if x.dim() == 2 else torch.ops.aten.bmm
    if x.is_cuda and dtype is torch.float32 and x.dtype != dtype and hasattr(product, "dtype"):
        return product.dtype(grad_out.mT, x, dtype)
    return (grad_out.mT @ x).to(dtype)


def weight_gradients(grad_out: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight_gradient` of several layers at once, (S, M, W) and (S, M, V) -> (S, W, V), of many rows in parts: small
    matrices that sum over thousands of rows, each of which a few multiprocessors would do alone."""
    if x.shape[1] < MANY_ROWS:
        return weight_gradient(grad_out, x, dtype)
    parts = (math.gcd(PARTS, x.shape[1]), -1)
    of_parts = weight_gradient(grad_out.unflatten(1, parts).flatten(0, 1), x.unflatten(1, parts).flatten(0, 1), dtype)
    return of_parts.unflatten(0, (len(x), -1)).sum(1)


def column_sums(x: Tensor) -> Tensor:
    """(M, W) -> (W,) float32; rows may lie apart."""
    programs = triton.cdiv(len(x), SUM["ROWS"])
    sums = x.new_empty(programs, x.shape[1], dtype=torch.float32)
    grid = (triton.cdiv(x.shape[1], SUM["C"]) * programs,)
    launch(_sum_kernel, grid, x, x.stride(0), sums, len(x), W=x.shape[1], **SUM)
    return sum_parts(sums)


def sum_parts(parts: Tensor) -> Tensor:
    """What the programs of a kernel have summed up, (P, ...) float32 -> (...): one launch, where torch's sum over few
    thousand rows needs a second one to clear what its programs count in."""
    out, width = parts.new_empty(parts.shape[1:]), parts[0].numel()
    launch(_total_kernel, (triton.cdiv(width, TOTAL["C"]),), parts, out, len(parts), W=width, **TOTAL)
    return out


if triton is not None:

    @triton.jit
    def tile_of(program, W: tl.constexpr, C: tl.constexpr):
        """Which rows and columns of a matrix of W columns are a program's: neighbours work side by side."""
        across: tl.constexpr = (W + C - 1) // C
        return program // across, (program % across) * C + tl.arange(0, C)

    @triton.jit(do_not_specialize=["M"])
    def _sum_kernel(x, apart, sums, M, W: tl.constexpr, R: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr):
        part, columns = tile_of(tl.program_id(0), W, C)
        total = tl.zeros((R, C), tl.float32)
        for first in tl.range(part * ROWS, (part + 1) * ROWS, R):
            rows = first + tl.arange(0, R)
            at = rows[:, None].to(tl.int64) * apart + columns[None, :]
            total += tl.load(x + at, mask=(rows < M)[:, None] & (columns < W)[None, :], other=0.0).to(tl.float32)
        tl.store(sums + part * W + columns, tl.sum(total, axis=0), mask=columns < W)

    @triton.jit(do_not_specialize=["M"])
    def _total_kernel(x, out, M, W: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
        columns = tl.program_id(0) * C + tl.arange(0, C)
        total = tl.zeros((R, C), tl.float32)
        for first in tl.range(0, M, R):
            rows = first + tl.arange(0, R)
            inside = (rows < M)[:, None] & (columns < W)[None, :]
            total += tl.load(x + rows[:, None] * W + columns[None, :], mask=inside, other=0.0)
        tl.store(out + columns, tl.sum(total, axis=0), mask=columns < W)
