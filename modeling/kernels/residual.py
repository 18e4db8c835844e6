# mypy: disable-error-code="no-untyped-def"
"""Residual connection, stochastic depth and layer norm of a ViT's block, as one kernel forward and one backward.

What lies between two matrix products is read and written once: the residual stream takes in what a branch computed, and
the norm for the next branch is taken while it is in registers. A branch sees only the images that do not skip it: the
norm writes these side by side, so that what is skipped is not computed either.

Shape letters: B images, K of them that a branch keeps, L tokens, W width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modeling.kernels.linear import sum_parts
from utils.kernels import launch, tl, triton

PROGRAMS = 8
"""Programs of the backward pass on each multiprocessor, each with sums of its own."""


@dataclass(frozen=True)
class Kept:
    """The images of a batch that do not skip a branch.

    Attributes:
        order: (B,) int32, a permutation: where an image stands in the branch, which takes the places below `count`; the
            images' own order where all are kept.
        count: K.
    """

    order: Tensor
    count: int

    @property
    def scale(self) -> float:
        """What makes up for the images that skip."""
        return len(self.order) / self.count


def draw_kept(batch_size: int, rates: list[float], device: torch.device) -> list[Kept]:
    """Stochastic depth (Huang et al., 2016) by subsets, as DINOv2 has it: each branch is skipped by a random choice of
    images, by the same number of them in every step.

    Args:
        batch_size: B.
        rates: of each branch, the share of images that skip it, rounded to whole images; one at least stays.
    """
    counts = [max(1, batch_size - round(rate * batch_size)) for rate in rates]
    whole = torch.arange(batch_size, device=device, dtype=torch.int32)
    partial = sum(count < batch_size for count in counts)
    orders = iter(torch.rand(partial, batch_size, device=device).argsort(dim=1).int()) if partial else iter(())
    return [Kept(next(orders) if count < batch_size else whole, count) for count in counts]


@dataclass(frozen=True)
class Branch:
    """What a branch computed: out (K, L, W), without the bias (W,) of its last layer."""

    out: Tensor
    bias: Tensor
    kept: Kept


def add_branch(x: Tensor, branch: Branch) -> Tensor:
    """x + B / K * (out + bias) in the images that the branch kept, x in the others, (B, L, W)."""
    return _ResidualNorm.apply(x, branch.out, branch.bias, branch.kept, None, None, 0.0, None)[0]


def norm_for(x: Tensor, norm: nn.LayerNorm, kept: Kept, branch: Branch | None = None) -> tuple[Tensor, Tensor]:
    """`add_branch`, where there is a branch, and the layer norm of its result for the next.

    Returns:
        The sum (B, L, W), in the type of x; its norm (K, L, W) of the images that the next branch keeps, in the type
        of autocast.
    """
    added = (None, None, None) if branch is None else (branch.out, branch.bias, branch.kept)
    return _ResidualNorm.apply(x, *added, norm.weight, norm.bias, norm.eps, kept)


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """The layer norm of all images by itself, in the type of autocast, (B, L, W) -> (B, L, W)."""
    return norm_for(x, norm, draw_kept(len(x), [0.0], x.device)[0])[1]


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, out, bias, kept, weight, shift, eps, next_kept):  # type: ignore[override]
        ctx.set_materialize_grads(False)  # the sum behind the last norm goes nowhere
        x = x.contiguous()
        images, tokens, width = x.shape
        add, norm = out is not None, weight is not None
        total = torch.empty_like(x) if add else x.view_as(x)
        normed = statistics = None
        if norm:
            autocast = torch.is_autocast_enabled(x.device.type)
            dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
            normed = x.new_empty(next_kept.count, tokens, width, dtype=dtype)
            statistics = x.new_empty(images * tokens, 2, dtype=torch.float32)
        ctx.places = *_place(kept), *_place(next_kept)[:2]
        ctx.sizes = {"L": tokens, "W": width, "C": triton.next_power_of_2(width), "ADD": add, "NORM": norm}
        ctx.dtype = out.dtype if add else x.dtype
        branch = (out.contiguous(), bias) if add else (None, None)
        args = (x, *branch, *ctx.places, total, weight, shift, eps, normed, statistics)
        launch(_forward_kernel, (images * tokens,), *args, **ctx.sizes, num_warps=2)
        ctx.shape, ctx.stream = x.shape, x.dtype
        ctx.save_for_backward(total if norm else None, weight, statistics)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total, grad_normed):  # type: ignore[override]
        g, n = (None if grad is None else grad.contiguous() for grad in (grad_total, grad_normed))
        images, tokens, width = ctx.shape
        _, count, scale, *_ = ctx.places
        add, norm = ctx.sizes["ADD"], n is not None
        like: Tensor = n if g is None else g
        grad = like.new_empty(ctx.shape, dtype=ctx.stream)
        apart = add and (scale != 1 or ctx.dtype != ctx.stream)  # otherwise both gradients are one tensor
        grad_out = like.new_empty(count, tokens, width, dtype=ctx.dtype) if apart else grad
        programs = min(images * tokens, _programs(like.device))
        sums = like.new_empty(programs, add + 2 * norm, width, dtype=torch.float32)
        args = (g, n, *ctx.saved_tensors, *ctx.places, grad, grad_out, sums, images * tokens)
        kind = ctx.sizes | {"NORM": norm, "SUM": g is not None, "APART": apart}
        launch(_backward_kernel, (programs,), *args, **kind, num_warps=1)
        of_weights = list(sum_parts(sums))
        of_bias = of_weights.pop(0) if add else None
        return grad, grad_out if add else None, of_bias, None, *(of_weights or (None, None)), None, None


def _place(kept: Kept | None) -> tuple[Tensor | None, int, float]:
    return (None, 0, 1.0) if kept is None else (kept.order, kept.count, kept.scale)


def _programs(device: torch.device) -> int:
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return PROGRAMS * processors


if triton is not None:

    @triton.jit
    def row_at(row, W: tl.constexpr, C: tl.constexpr):
        """Where the values of a row are, (C,)."""
        return (row + tl.zeros((C,), tl.int64)) * W + tl.arange(0, C)

    @triton.jit(do_not_specialize=["count", "next_count"], do_not_specialize_on_alignment=["order", "next_order"])
    def _forward_kernel(
        x,
        out,
        bias,
        order,
        count,
        scale,
        next_order,
        next_count,
        total,
        weight,
        shift,
        eps,
        normed,
        statistics,
        L: tl.constexpr,
        W: tl.constexpr,
        C: tl.constexpr,
        ADD: tl.constexpr,
        NORM: tl.constexpr,
    ):
        """One token a program."""
        row = tl.program_id(0)
        image, token = row // L, row % L
        at = tl.arange(0, C)
        inside = at < W
        value = tl.load(x + row_at(row, W, C), mask=inside, other=0.0).to(tl.float32)
        if ADD:
            place = tl.load(order + image)
            if place < count:
                added = tl.load(out + row_at(place * L + token, W, C), mask=inside, other=0.0).to(tl.float32)
                value += scale * (added + tl.load(bias + at, mask=inside, other=0.0))
            rounded = value.to(total.dtype.element_ty)
            tl.store(total + row_at(row, W, C), rounded, mask=inside)
            value = rounded.to(tl.float32)
        if NORM:
            place = tl.load(next_order + image)
            if place < next_count:
                mean = tl.sum(value) / W
                value = tl.where(inside, value - mean, 0.0)
                inverse = tl.rsqrt(tl.sum(value * value) / W + eps)
                tl.store(statistics + 2 * row, mean)
                tl.store(statistics + 2 * row + 1, inverse)
                value = value * inverse * tl.load(weight + at, mask=inside, other=0.0)
                value += tl.load(shift + at, mask=inside, other=0.0)
                to = normed + row_at(place * L + token, W, C)
                tl.store(to, value.to(normed.dtype.element_ty), mask=inside)

    @triton.jit(
        do_not_specialize=["count", "next_count", "rows"], do_not_specialize_on_alignment=["order", "next_order"]
    )
    def _backward_kernel(
        grad_total,
        grad_normed,
        total,
        weight,
        statistics,
        order,
        count,
        scale,
        next_order,
        next_count,
        grad,
        grad_out,
        sums,
        rows,
        L: tl.constexpr,
        W: tl.constexpr,
        C: tl.constexpr,
        ADD: tl.constexpr,
        NORM: tl.constexpr,
        SUM: tl.constexpr,
        APART: tl.constexpr,
    ):
        """One token after the other, and the sums over them for the weights."""
        at = tl.arange(0, C)
        inside = at < W
        of_bias, of_weight = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
        of_shift = tl.zeros((C,), tl.float32)
        if NORM:
            w = tl.load(weight + at, mask=inside, other=0.0)
        for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
            image, token = row // L, row % L
            here = row_at(row, W, C)
            g = tl.zeros((C,), tl.float32)
            if SUM:
                g += tl.load(grad_total + here, mask=inside, other=0.0).to(tl.float32)
            if NORM:
                place = tl.load(next_order + image)
                kept = inside & (place + tl.zeros((C,), tl.int32) < next_count)
                n = tl.load(grad_normed + row_at(place * L + token, W, C), mask=kept, other=0.0).to(tl.float32)
                value = tl.load(total + here, mask=kept, other=0.0).to(tl.float32)
                mean = tl.load(statistics + 2 * row, mask=place < next_count, other=0.0)
                inverse = tl.load(statistics + 2 * row + 1, mask=place < next_count, other=0.0)
                value = tl.where(inside, (value - mean) * inverse, 0.0)
                of_weight += n * value
                of_shift += n
                n *= w
                g += inverse * (n - tl.sum(n) / W - value * (tl.sum(n * value) / W))
            tl.store(grad + here, g.to(grad.dtype.element_ty), mask=inside)
            if ADD:
                place = tl.load(order + image)
                if place < count:
                    g *= scale
                    of_bias += g
                    if APART:
                        to = grad_out + row_at(place * L + token, W, C)
                        tl.store(to, g.to(grad_out.dtype.element_ty), mask=inside)
        to = sums + tl.program_id(0) * (ADD + 2 * NORM) * W + at
        if ADD:
            tl.store(to, of_bias, mask=inside)
            to += W
        if NORM:
            tl.store(to, of_weight, mask=inside)
            tl.store(to + W, of_shift, mask=inside)
