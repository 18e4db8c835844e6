# mypy: disable-error-code="no-untyped-def"
"""What stands between a ViT's patch embedding and its first block, as one kernel forward and one backward: the class
token joins the patches, positions are added, and CLIP's ViTs take a norm.

Shape letters: B images, N patches, L tokens (class token and patches), W width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from utils.kernels import launch, tl, triton

if triton is not None:
    from modeling.kernels.residual import row_at

PARTS = 8
"""Parts of the batch over which the gradient of a position is summed up side by side."""


def embed_tokens(
    patches: Tensor, class_tokens: Tensor, positions: Tensor, norm: nn.LayerNorm | None, dtype: torch.dtype
) -> Tensor:
    """norm([class token, patches] + positions)

    Args:
        patches: (B, N, W) embedded patches.
        class_tokens: (B, W) float32, the class token of each image.
        positions: (L, W) float32.
        norm: None for none.
        dtype: of the result.

    Returns:
        (B, L, W)
    """
    weight, shift, eps = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    return _Embedding.apply(patches, class_tokens, positions, weight, shift, eps, dtype)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, patches, class_tokens, positions, weight, shift, eps, dtype):  # type: ignore[override]
        patches, class_tokens, positions = patches.contiguous(), class_tokens.contiguous(), positions.contiguous()
        (images, width), tokens = class_tokens.shape, len(positions)
        out = patches.new_empty(images, tokens, width, dtype=dtype)
        statistics = patches.new_empty(images * tokens, 2, dtype=torch.float32)
        ctx.sizes = {"L": tokens, "W": width, "C": triton.next_power_of_2(width), "NORM": weight is not None}
        args = (patches, class_tokens, positions, weight, shift, eps, out, statistics)
        launch(_forward_kernel, (images * tokens,), *args, **ctx.sizes, num_warps=2)
        ctx.save_for_backward(patches, class_tokens, positions, weight, statistics)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):  # type: ignore[override]
        patches, class_tokens, positions, weight, statistics = ctx.saved_tensors
        norm, tokens, width = ctx.sizes["NORM"], ctx.sizes["L"], ctx.sizes["W"]
        of_patches, of_class = torch.empty_like(patches), torch.empty_like(class_tokens)
        sums = grad.new_empty(1 + 2 * norm, PARTS, tokens, width, dtype=torch.float32)
        args = (grad.contiguous(), patches, class_tokens, positions, weight, statistics, of_patches, of_class, sums)
        launch(_backward_kernel, (PARTS * tokens,), *args, len(class_tokens), **ctx.sizes, PARTS=PARTS, num_warps=1)
        of_norm = sums[1:].sum((1, 2)).unbind() if norm else (None, None)
        return of_patches, of_class, sums[0].sum(0), *of_norm, None, None


if triton is not None:

    @triton.jit
    def _embedded(patches, class_tokens, positions, image, token, L: tl.constexpr, W: tl.constexpr, C: tl.constexpr):
        """A token with its position, (C,) float32."""
        at = tl.arange(0, C)
        inside = at < W
        if token == 0:
            value = tl.load(class_tokens + row_at(image, W, C), mask=inside, other=0.0).to(tl.float32)
        else:
            here = row_at(image * (L - 1) + token - 1, W, C)
            value = tl.load(patches + here, mask=inside, other=0.0).to(tl.float32)
        return value + tl.load(positions + token * W + at, mask=inside, other=0.0).to(tl.float32)

    @triton.jit
    def _forward_kernel(
        patches,
        class_tokens,
        positions,
        weight,
        shift,
        eps,
        out,
        statistics,
        L: tl.constexpr,
        W: tl.constexpr,
        C: tl.constexpr,
        NORM: tl.constexpr,
    ):
        """One token a program."""
        row = tl.program_id(0)
        at = tl.arange(0, C)
        inside = at < W
        value = _embedded(patches, class_tokens, positions, row // L, row % L, L, W, C)
        if NORM:
            mean = tl.sum(value) / W
            value = tl.where(inside, value - mean, 0.0)
            inverse = tl.rsqrt(tl.sum(value * value) / W + eps)
            tl.store(statistics + 2 * row, mean)
            tl.store(statistics + 2 * row + 1, inverse)
            value = value * inverse * tl.load(weight + at, mask=inside, other=0.0)
            value += tl.load(shift + at, mask=inside, other=0.0)
        tl.store(out + row_at(row, W, C), value.to(out.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["images"])
    def _backward_kernel(
        grad,
        patches,
        class_tokens,
        positions,
        weight,
        statistics,
        of_patches,
        of_class,
        sums,
        images,
        L: tl.constexpr,
        W: tl.constexpr,
        C: tl.constexpr,
        NORM: tl.constexpr,
        PARTS: tl.constexpr,
    ):
        """One place of the grid in every PARTS-th image a program, and the sums over these for position and norm."""
        token, part = tl.program_id(0) % L, tl.program_id(0) // L
        at = tl.arange(0, C)
        inside = at < W
        of_position, of_weight = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
        of_shift = tl.zeros((C,), tl.float32)
        if NORM:
            w = tl.load(weight + at, mask=inside, other=0.0)
        for image in tl.range(part, images, PARTS):
            row = image * L + token
            g = tl.load(grad + row_at(row, W, C), mask=inside, other=0.0).to(tl.float32)
            if NORM:
                value = _embedded(patches, class_tokens, positions, image, token, L, W, C)
                inverse = tl.load(statistics + 2 * row + 1)
                value = tl.where(inside, (value - tl.load(statistics + 2 * row)) * inverse, 0.0)
                of_weight += g * value
                of_shift += g
                g *= w
                g = inverse * (g - tl.sum(g) / W - value * (tl.sum(g * value) / W))
                g = tl.where(inside, g, 0.0)
            of_position += g
            if token == 0:
                tl.store(of_class + row_at(image, W, C), g, mask=inside)
            else:
                here = row_at(image * (L - 1) + token - 1, W, C)
                tl.store(of_patches + here, g.to(of_patches.dtype.element_ty), mask=inside)
        to = sums + (part * L + token) * W + at
        tl.store(to, of_position, mask=inside)
        if NORM:
            tl.store(to + PARTS * L * W, of_weight, mask=inside)
            tl.store(to + 2 * PARTS * L * W, of_shift, mask=inside)
