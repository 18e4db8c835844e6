# mypy: disable-error-code="no-untyped-def"
"""What SDTPS does with all patches of an image, as Triton kernels: scores them, and parts the kept from the dropped.

Written operation by operation these are some 250 kernels forward and backward, of which many move all patches in
float32. Here each patch is read once to be scored and once to be parted, in the half precision in which the backbone
left it, and so are its gradients; sums are in float32. A program takes one image of one modality.

Shape letters as in `modeling.sdtps`: M modalities, B batch, N patches, K kept, C channels; H width of the predictor.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from modeling.kernels.linear import weight_gradients
from utils.kernels import launch, launch_that_fits, tl, triton

if triton is not None:
    from modeling.kernels.activation import activate

CHUNK = 64
"""Channels that a program takes at a time."""
PATCHES, WIDEST = (16, 32, 64, 128), 256
"""Numbers of patches for which there are kernels, and the widest predictor."""


def has_kernels(num_patches: int, embed_dim: int, hidden: int) -> bool:
    """Whether there are kernels for N, C and H."""
    return num_patches in PATCHES and hidden <= WIDEST and embed_dim % CHUNK == 0


def score_patches(
    v: Tensor,
    g: Tensor,
    predictor: tuple[Tensor, Tensor, Tensor, Tensor],
    weight: Tensor,
    *,
    share: float,
    floors: tuple[float, float],
    similarity_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """s = share * p + sum over o of weight_o * min_max(cosine(v, g_o)), with p = sigmoid(w2 gelu(w1 v + b1) + b2).

    Args:
        v: (M, B, N, C) half precision; g: (M, B, C) globals.
        predictor: w1 (M, H, C), b1 (M, H), w2 (M, H), b2 (M,) float32.
        weight: (M, B, M) float32, of the globals in the score of a modality's patches.
        share: of the predictor.
        floors: shortest vector that has a direction, and smallest range that min-max divides by.
        similarity_grad: False detaches the similarities.

    Returns:
        s and p, (M, B, N) float32 each, and v once more: what comes back from whoever reads that one is added to v's
        gradient while it is written.
    """
    return _Score.apply(v, g, *predictor, weight, share, floors, similarity_grad)


def part_patches(v: Tensor, scores: Tensor, order: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """The kept patches, and the dropped ones as one, weighted by the softmax of their scores.

    Args:
        v: (M, B, N, C) half precision.
        scores: (M, B, N) float32.
        order: (M, B, N) indices of the patches, the K kept ones first.
        num_kept: K, less than N.

    Returns:
        (M, B, K, C) and (M, B, 1, C), float32.
    """
    return _Part.apply(v, scores, order, num_kept)


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v, g, w1, b1, w2, b2, weight, share, floors, similarity_grad):  # type: ignore[override]
        ctx.set_materialize_grads(False)
        modalities, batch, patches, channels = v.shape
        g, apart = g.float().contiguous(), v.stride(1)
        ctx.hidden = w1.shape[1]
        more = max(16, triton.next_power_of_2(ctx.hidden)) - ctx.hidden  # units without weights, up to a power of two
        if more:
            w1, b1, w2 = F.pad(w1, (0, 0, 0, more)), F.pad(b1, (0, more)), F.pad(w2, (0, more))
        w1_high = w1.to(v.dtype).contiguous()
        w1_low = (w1 - w1_high).to(v.dtype)
        v = v if v.stride() == (batch * apart, apart, channels, 1) else v.contiguous()  # images may lie apart
        packed = v if v.is_contiguous() else v.new_empty(v.shape)
        hidden = w1.shape[1]
        scores, predicted, lengths = (v.new_empty(v.shape[:3], dtype=torch.float32) for _ in range(3))
        similarity = scores.new_empty(*v.shape[:3], modalities)
        before = scores.new_empty(*v.shape[:3], hidden)
        ctx.sizes = {"N": patches, "C": channels, "H": hidden, "M": modalities, "CHUNK": CHUNK}
        ctx.numbers = (batch, share, *floors)
        args = (g, w1_high, b1, w2, b2, weight.contiguous())
        out = (scores, predicted, before, similarity, lengths, packed)
        options = {"PACK": packed is not v, "num_warps": 8}
        kernel_args = (v, v.stride(1), w1_low, *args, *out, *ctx.numbers)
        launch_that_fits(_score_kernel, (modalities * batch,), *kernel_args, **ctx.sizes, **options)
        ctx.similarity_grad = similarity_grad
        ctx.save_for_backward(packed, *args, predicted, before, similarity, lengths)
        return scores, predicted, packed.view_as(packed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_scores, grad_predicted, grad_tap):  # type: ignore[override]
        if grad_scores is None and grad_predicted is None:  # what scored the patches has no part in the loss
            return grad_tap, *[None] * 9
        v, g, w1, *_, predicted, _, _, _ = ctx.saved_tensors
        modalities, batch, patches, _ = v.shape
        hidden = w1.shape[1]
        of_v, of_before = torch.empty_like(v), v.new_empty(modalities, batch * patches, hidden)
        of_g = g.new_empty(modalities, batch, *g.shape[::2]) if ctx.similarity_grad else None
        sums = g.new_empty(modalities, batch, 3, hidden)  # for b1, w2 and b2
        grads = [torch.zeros_like(predicted) if x is None else x.contiguous() for x in (grad_scores, grad_predicted)]
        of_tap = None if grad_tap is None else grad_tap.contiguous()
        args = (*grads, *ctx.saved_tensors, of_tap, of_v, of_before, of_g, sums)
        options = {"SIMILARITY": ctx.similarity_grad, "ADD": of_tap is not None, "num_warps": 8}
        launch_that_fits(_score_gradient_kernel, (modalities * batch,), *args, *ctx.numbers, **ctx.sizes, **options)
        of_b1, of_w2, of_b2 = sums.sum(1).transpose(0, 1)[..., : ctx.hidden].contiguous()  # as the parameters are
        of_w1 = weight_gradients(of_before, v.flatten(1, 2), torch.float32)[:, : ctx.hidden]
        of_g = None if of_g is None else of_g.sum(0).transpose(0, 1)
        return of_v, of_g, of_w1, of_b1, of_w2, of_b2[:, 0].contiguous(), *[None] * 4


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v, scores, order, num_kept):  # type: ignore[override]
        v, scores, order = v.contiguous(), scores.contiguous(), order.contiguous()
        modalities, batch, patches, channels = v.shape
        kept = scores.new_empty(modalities, batch, num_kept, channels)
        fused = scores.new_empty(modalities, batch, 1, channels)
        ctx.sizes = {"N": patches, "C": channels, "CHUNK": CHUNK}
        launch(_part_kernel, (modalities * batch,), v, scores, order, kept, fused, num_kept, **ctx.sizes)
        ctx.num_kept = num_kept
        ctx.save_for_backward(v, scores, order)
        return kept, fused

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kept, grad_fused):  # type: ignore[override]
        v, scores, _ = ctx.saved_tensors
        of_v, of_scores = torch.empty_like(v), torch.empty_like(scores)
        grads = (grad_kept.contiguous(), grad_fused.contiguous())
        args = (*grads, *ctx.saved_tensors, of_v, of_scores, ctx.num_kept)
        launch(_part_gradient_kernel, (len(scores) * scores.shape[1],), *args, **ctx.sizes)
        return of_v, of_scores, None, None


if triton is not None:
    OTHERS = tl.constexpr(16)  # columns of a tile of similarities, of which M are taken: tiles have 16 at least

    @triton.jit
    def _dot_exact(a, b, acc):
        """a @ b + acc, where a is in half precision and b in float32, as if both were in float32."""
        high = b.to(a.dtype)
        low = (b - high.to(tl.float32)).to(a.dtype)
        return tl.dot(a, low, tl.dot(a, high, acc))

    @triton.jit
    def _dot_both(a, b, like):
        """a @ b of float32 matrices by products in the type of `like`, a pointer, but nearly as exact."""
        dtype: tl.constexpr = like.dtype.element_ty
        a_high, b_high = a.to(dtype), b.to(dtype)
        a_low, b_low = (a - a_high.to(tl.float32)).to(dtype), (b - b_high.to(tl.float32)).to(dtype)
        return tl.dot(a_low, b_high, tl.dot(a_high, b_low, tl.dot(a_high, b_high)))

    @triton.jit
    def _inverse(length, floor):
        """1 / length, 0 for what is too short to have a direction."""
        return tl.where(length >= floor, 1 / tl.maximum(length, floor), 0.0)

    @triton.jit
    def _inverse_lengths(g, b, batch, floor, C: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr):
        """Of the globals of a sample, (16,)."""
        o = tl.arange(0, OTHERS)
        squares = tl.zeros((OTHERS,), tl.float32)
        for first in tl.range(0, C, CHUNK):
            c = first + tl.arange(0, CHUNK)
            x = tl.load(g + (o * batch + b)[:, None] * C + c[None, :], mask=(o < M)[:, None], other=0.0)
            squares += tl.sum(x * x, axis=1)
        return _inverse(tl.sqrt(squares), floor)

    @triton.jit
    def _range(similarity, N: tl.constexpr):
        """The smallest and the largest of each column of (N, 16)."""
        return tl.min(similarity, axis=0), tl.max(similarity, axis=0)

    @triton.jit(do_not_specialize=["batch"])
    def _score_kernel(
        v,
        apart,
        w1_low,
        g,
        w1,
        b1,
        w2,
        b2,
        weight,
        scores,
        predicted,
        before,
        similarity,
        lengths,
        packed,
        batch,
        share,
        length_floor,
        range_floor,
        N: tl.constexpr,
        C: tl.constexpr,
        H: tl.constexpr,
        M: tl.constexpr,
        CHUNK: tl.constexpr,
        PACK: tl.constexpr,
    ):
        own = tl.program_id(0)
        m, b = own // batch, own % batch
        n, h, o = tl.arange(0, N), tl.arange(0, H), tl.arange(0, OTHERS)
        v += own.to(tl.int64) * apart
        packed += own.to(tl.int64) * N * C
        inverse_g = _inverse_lengths(g, b, batch, length_floor, C, M, CHUNK)
        squares = tl.zeros((N,), tl.float32)
        dots, x = tl.zeros((N, OTHERS), tl.float32), tl.zeros((N, H), tl.float32)
        for first in tl.range(0, C, CHUNK):
            c = first + tl.arange(0, CHUNK)
            value = tl.load(v + n[:, None] * C + c[None, :])
            if PACK:
                tl.store(packed + n[:, None] * C + c[None, :], value)
            squares += tl.sum(value.to(tl.float32) * value.to(tl.float32), axis=1)
            query = tl.load(g + (o * batch + b)[None, :] * C + c[:, None], mask=(o < M)[None, :], other=0.0)
            dots = _dot_exact(value, query * inverse_g[None, :], dots)
            at = (m * H + h)[None, :] * C + c[:, None]
            x = tl.dot(value, tl.load(w1_low + at), tl.dot(value, tl.load(w1 + at), x))
        length = tl.sqrt(squares)
        cosine = dots * _inverse(length, length_floor)[:, None]
        low, high = _range(cosine, N)
        parts = tl.load(weight + own * M + o, mask=o < M, other=0.0)
        s = tl.sum((cosine - low[None, :]) / tl.maximum(high - low, range_floor)[None, :] * parts[None, :], axis=1)

        x += tl.load(b1 + m * H + h)[None, :]
        active, _ = activate(x, False)
        p = tl.sigmoid(tl.sum(active * tl.load(w2 + m * H + h)[None, :], axis=1) + tl.load(b2 + m))
        at = own * N + n
        tl.store(scores + at, share * p + s)
        tl.store(predicted + at, p)
        tl.store(lengths + at, length)
        tl.store(similarity + at[:, None] * M + o[None, :], cosine, mask=(o < M)[None, :])
        tl.store(before + at[:, None].to(tl.int64) * H + h[None, :], x)

    @triton.jit(do_not_specialize=["batch"])
    def _score_gradient_kernel(
        of_scores,
        of_predicted,
        v,
        g,
        w1,
        b1,
        w2,
        b2,
        weight,
        predicted,
        before,
        similarity,
        lengths,
        of_tap,
        of_v,
        of_before,
        of_g,
        sums,
        batch,
        share,
        length_floor,
        range_floor,
        N: tl.constexpr,
        C: tl.constexpr,
        H: tl.constexpr,
        M: tl.constexpr,
        CHUNK: tl.constexpr,
        SIMILARITY: tl.constexpr,
        ADD: tl.constexpr,
    ):
        own = tl.program_id(0)
        m, b = own // batch, own % batch
        n, h, o = tl.arange(0, N), tl.arange(0, H), tl.arange(0, OTHERS)
        at = own * N + n
        v += own.to(tl.int64) * N * C
        of_v += own.to(tl.int64) * N * C
        if ADD:
            of_tap += own.to(tl.int64) * N * C

        ds, p = tl.load(of_scores + at), tl.load(predicted + at)
        dz = (share * ds + tl.load(of_predicted + at)) * p * (1 - p)
        here = at[:, None].to(tl.int64) * H + h[None, :]
        active, slope = activate(tl.load(before + here), False)
        to = sums + own * 3 * H + h
        tl.store(to + H, tl.sum(active * dz[:, None], axis=0))
        tl.store(to + 2 * H, tl.zeros((H,), tl.float32) + tl.sum(dz))
        dx = dz[:, None] * tl.load(w2 + m * H + h)[None, :] * slope
        tl.store(to, tl.sum(dx, axis=0))
        dx = dx.to(of_before.dtype.element_ty)
        tl.store(of_before + here, dx)

        inverse_g = tl.zeros((OTHERS,), tl.float32)
        along = tl.zeros((N,), tl.float32)
        along_g = tl.zeros((OTHERS,), tl.float32)
        e = tl.zeros((N, OTHERS), tl.float32)
        if SIMILARITY:
            inverse_g = _inverse_lengths(g, b, batch, length_floor, C, M, CHUNK)
            cosine = tl.load(similarity + at[:, None] * M + o[None, :], mask=(o < M)[None, :], other=0.0)
            low, high = _range(cosine, N)
            size = tl.maximum(high - low, range_floor)
            parts = tl.load(weight + own * M + o, mask=o < M, other=0.0)
            d = ds[:, None] * (parts / size)[None, :]
            moved = tl.sum(d, axis=0)
            widened = tl.sum(d * (cosine - low[None, :]), axis=0) / size
            widened = tl.where(high - low >= range_floor, widened, 0.0)
            is_low, is_high = cosine == low[None, :], cosine == high[None, :]
            of_low = (widened - moved) / tl.sum(is_low.to(tl.float32), axis=0)
            of_high = -widened / tl.sum(is_high.to(tl.float32), axis=0)
            d += tl.where(is_low, of_low[None, :], 0.0) + tl.where(is_high, of_high[None, :], 0.0)
            inverse_v = _inverse(tl.load(lengths + at), length_floor)
            e = d * inverse_v[:, None]
            along = tl.sum(e * cosine, axis=1) * inverse_v
            there = tl.where(inverse_v > 0, 1.0, 0.0)
            along_g = tl.sum(d * cosine * there[:, None], axis=0)
        for first in tl.range(0, C, CHUNK):
            c = first + tl.arange(0, CHUNK)
            dv = tl.dot(dx, tl.load(w1 + (m * H + h)[:, None] * C + c[None, :]))
            if SIMILARITY:
                value = tl.load(v + n[:, None] * C + c[None, :])
                query = tl.load(g + (o * batch + b)[:, None] * C + c[None, :], mask=(o < M)[:, None], other=0.0)
                query *= inverse_g[:, None]
                dv += _dot_both(e, query, v) - along[:, None] * value.to(tl.float32)
                dg = tl.trans(_dot_exact(tl.trans(value), e, tl.zeros((CHUNK, OTHERS), tl.float32)))
                dg = (dg - query * along_g[:, None]) * inverse_g[:, None]
                tl.store(of_g + (own * M + o)[:, None] * C + c[None, :], dg, mask=(o < M)[:, None])
            if ADD:
                dv += tl.load(of_tap + n[:, None] * C + c[None, :]).to(tl.float32)
            tl.store(of_v + n[:, None] * C + c[None, :], dv.to(of_v.dtype.element_ty))

    @triton.jit
    def _shares(scores, order, num_kept, N: tl.constexpr):
        """Softmax of the dropped patches' scores in their order, (N,), 0 for the kept."""
        k = tl.arange(0, N)
        s = tl.where(k >= num_kept, tl.load(scores + tl.load(order + k)), float("-inf"))
        share = tl.exp(s - tl.max(s))
        return share / tl.sum(share)

    @triton.jit(do_not_specialize=["num_kept"])
    def _part_kernel(v, scores, order, kept, fused, num_kept, N: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr):
        own, k = tl.program_id(0).to(tl.int64), tl.arange(0, N)
        order += own * N
        share = _shares(scores + own * N, order, num_kept, N)
        rows = own * N + tl.load(order + k)
        for first in tl.range(0, C, CHUNK):
            c = first + tl.arange(0, CHUNK)
            value = tl.load(v + rows[:, None] * C + c[None, :]).to(tl.float32)
            to = kept + (own * num_kept + k)[:, None] * C + c[None, :]
            tl.store(to, value, mask=(k < num_kept)[:, None])
            tl.store(fused + own * C + c, tl.sum(share[:, None] * value, axis=0))

    @triton.jit(do_not_specialize=["num_kept"])
    def _part_gradient_kernel(
        of_kept,
        of_fused,
        v,
        scores,
        order,
        of_v,
        of_scores,
        num_kept,
        N: tl.constexpr,
        C: tl.constexpr,
        CHUNK: tl.constexpr,
    ):
        own, k = tl.program_id(0).to(tl.int64), tl.arange(0, N)
        order += own * N
        share = _shares(scores + own * N, order, num_kept, N)
        index = tl.load(order + k)
        rows = own * N + index
        of_share = tl.zeros((N,), tl.float32)
        for first in tl.range(0, C, CHUNK):
            c = first + tl.arange(0, CHUNK)
            df = tl.load(of_fused + own * C + c)
            at = rows[:, None] * C + c[None, :]
            is_kept = (k < num_kept)[:, None]
            value = tl.load(v + at, mask=~is_kept, other=0.0).to(tl.float32)
            of_share += tl.sum(value * df[None, :], axis=1)
            dk = tl.load(of_kept + (own * num_kept + k)[:, None] * C + c[None, :], mask=is_kept, other=0.0)
            tl.store(of_v + at, (dk + share[:, None] * df[None, :]).to(of_v.dtype.element_ty))
        tl.store(of_scores + own * N + index, share * (of_share - tl.sum(share * of_share)))
