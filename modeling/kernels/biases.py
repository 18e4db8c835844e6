# mypy: disable-error-code="no-untyped-def"
"""The biases of self-attention, whose gradients need a sum over all tokens for one in three.

Rows of attention sum to one, so that a bias of the values comes out of it as it went in, and its gradient is that of
the output's bias, taken through the layer between them. A bias of the keys adds the same to all scores of a query, of
which the softmax takes no notice: its gradient is zero.

Shape letters: n blocks, W width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from utils.kernels import launch, tl, triton

TILE = {"R": 64, "C": 32}
"""Rows of a weight that a program takes at a time, and its columns."""


def tied_biases(qkv: Sequence[Tensor], proj: Sequence[Tensor], weights: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What to differentiate by in the place of the biases of attention.

    Args:
        qkv: of each block the biases of queries, keys and values, (3W,).
        proj: of each block the bias of the layer behind the attention (W,), which is to be added to all tokens.
        weights: of those layers, (n, W, W) in any type.

    Returns:
        Of each block the queries' biases (W,), and `proj`. The gradients that arrive there become those of all four.
    """
    tied = _TiedBiases.apply(weights, *qkv, *proj)
    return list(tied[: len(qkv)]), list(tied[len(qkv) :])


class _TiedBiases(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights, *biases):  # type: ignore[override]
        blocks, width = weights.shape[:2]
        ctx.save_for_backward(weights)
        return *(bias[:width] for bias in biases[:blocks]), *(bias.view_as(bias) for bias in biases[blocks:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads):  # type: ignore[override]
        (weights,) = ctx.saved_tensors
        blocks, width, _ = weights.shape
        of_queries, of_proj = torch.stack(grads[:blocks]), torch.stack(grads[blocks:])
        of_qkv = of_proj.new_empty(blocks, 3 * width)
        tiles = triton.cdiv(width, TILE["C"])
        launch(_bias_kernel, (blocks * tiles,), of_queries, of_proj, weights, of_qkv, W=width, **TILE)
        return None, *of_qkv.unbind(), *grads[blocks:]


if triton is not None:

    @triton.jit
    def _bias_kernel(of_queries, of_proj, weights, of_qkv, W: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
        """Some columns of one block a program."""
        across: tl.constexpr = (W + C - 1) // C
        block, columns = tl.program_id(0) // across, (tl.program_id(0) % across) * C + tl.arange(0, C)
        weights += block * W * W
        total = tl.zeros((C,), tl.float32)
        for first in tl.range(0, W, R):
            rows = first + tl.arange(0, R)
            inside = (rows < W)[:, None] & (columns < W)[None, :]
            w = tl.load(weights + rows[:, None] * W + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            g = tl.load(of_proj + block * W + rows, mask=rows < W, other=0.0)
            total += tl.sum(g[:, None] * w, axis=0)
        to = of_qkv + block * 3 * W + columns
        tl.store(to, tl.load(of_queries + block * W + columns, mask=columns < W), mask=columns < W)
        tl.store(to + W, tl.zeros((C,), tl.float32), mask=columns < W)
        tl.store(to + 2 * W, total, mask=columns < W)
