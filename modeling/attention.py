# mypy: disable-error-code="no-untyped-def"
"""Self-attention of a ViT whose patches fill a power of two, as two Triton kernels.

On 256x128 pixels a ViT attends over 128 patches and one class token. General kernels take tiles of 128 keys and spend a
second one on the last token. Here patches and prefix tokens (class token, registers) are two tiles side by side, the
second of 16 rows. All scores of an image and head lie in the registers of one program, so that the backward pass needs
the input alone; queries, keys and values are read from the joint projection and gradients written into its layout, so
that nothing is copied.

Shape letters: B images, H heads, D channels a head, P prefix tokens, N patches.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch without CUDA come without it
    triton = None

PATCHES = (32, 64, 128)
HEAD_DIMS = (16, 32, 64)
MAX_PREFIX = 16


class TiledAttention(Attention):
    """timm's Attention, which half-precision input on CUDA passes through the kernels of this file."""

    num_prefix: int

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        half = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) != torch.float32
        if not (x.is_cuda and half) or attn_mask is not None or is_causal:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return self.proj_drop(self.proj(tiled_attention(self.qkv(x), self.num_heads, self.num_prefix)))


def use_tiled_attention(blocks: Sequence[Any], num_tokens: int) -> None:
    """Lets blocks of a timm ViT attend over that many tokens through the kernels, where there are some for the shape;
    the tokens beyond the power of two count as prefix."""
    attentions: list[Any] = [getattr(block, "attn", None) for block in blocks]
    num_prefix = next((num_tokens - n for n in PATCHES if 1 <= num_tokens - n <= MAX_PREFIX), 0)
    fits = triton is not None and num_prefix > 0
    if not all(type(a) in (Attention, TiledAttention) and a.head_dim in HEAD_DIMS and _is_plain(a) for a in attentions):
        return
    for attention in attentions:
        attention.__class__ = TiledAttention if fits else Attention
        attention.num_prefix = num_prefix


def _is_plain(attention: Attention) -> bool:
    """Whether there is nothing between the projections but softmax(q k / sqrt(D)) v."""
    extras = (attention.q_norm, attention.k_norm, getattr(attention, "norm", None), getattr(attention, "gate", None))
    return attention.attn_drop.p == 0 and all(extra is None or isinstance(extra, nn.Identity) for extra in extras)


def tiled_attention(qkv: Tensor, num_heads: int, num_prefix: int) -> Tensor:
    """softmax(q k / sqrt(D)) v over all tokens of each image.

    Args:
        qkv: (B, P + N, 3 * H * D) half precision on CUDA, the joint projection; N in `PATCHES`, D in `HEAD_DIMS`.
        num_heads: H.
        num_prefix: P, at most `MAX_PREFIX`.

    Returns:
        (B, P + N, H * D)
    """
    return _attend(qkv, num_heads, num_prefix)


@torch.library.custom_op("tiled_attention::attend", mutates_args=(), device_types="cuda")
def _attend(qkv: Tensor, num_heads: int, num_prefix: int) -> Tensor:
    out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
    _attend_kernel[(num_heads, len(qkv))](qkv.contiguous(), out, **_sizes(qkv, num_heads, num_prefix), num_warps=4)
    return out


@torch.library.custom_op("tiled_attention::differentiate", mutates_args=(), device_types="cuda")
def _differentiate(qkv: Tensor, grad_out: Tensor, num_heads: int, num_prefix: int) -> Tensor:
    """Gradient of the joint projection (B, P + N, 3 * H * D)."""
    grad = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    sizes = _sizes(qkv, num_heads, num_prefix)
    _gradient_kernel[(num_heads, len(qkv))](qkv.contiguous(), grad_out.contiguous(), grad, **sizes, num_warps=8)
    return grad


def _sizes(qkv: Tensor, num_heads: int, num_prefix: int) -> dict[str, Any]:
    head_dim = qkv.shape[2] // 3 // num_heads
    sizes = {"P": num_prefix, "N": qkv.shape[1] - num_prefix, "H": num_heads, "D": head_dim}
    return {"scale": head_dim**-0.5, **sizes}


@_attend.register_fake
def _(qkv: Tensor, num_heads: int, num_prefix: int) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


@_differentiate.register_fake
def _(qkv: Tensor, grad_out: Tensor, num_heads: int, num_prefix: int) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.num_heads, ctx.num_prefix = inputs[1:]


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
    return _differentiate(ctx.saved_tensors[0], grad_out, ctx.num_heads, ctx.num_prefix), None, None


_attend.register_autograd(_backward, setup_context=_save)


if triton is not None:
    LOG2E = tl.constexpr(1.4426950408889634)
    PREFIX = tl.constexpr(MAX_PREFIX)

    @triton.jit
    def _load(x, first, count, R: tl.constexpr, D: tl.constexpr, stride):
        """Rows first .. first + count, zeros below, (R, D)."""
        r = tl.arange(0, R)
        places = (first + r)[:, None] * stride + tl.arange(0, D)[None, :]
        return tl.load(x + places, mask=(r < count)[:, None], other=0.0)

    @triton.jit
    def _store(x, value, first, count, R: tl.constexpr, D: tl.constexpr, stride):
        r = tl.arange(0, R)
        places = (first + r)[:, None] * stride + tl.arange(0, D)[None, :]
        tl.store(x + places, value.to(x.dtype.element_ty), mask=(r < count)[:, None])

    @triton.jit
    def _exponentials(q, k, k_prefix, scale, P: tl.constexpr):
        """Attention of queries (R, D) to patches (R, N) and prefix (R, 16), and the sums to divide it by (R,)."""
        s = tl.dot(q, tl.trans(k)) * (scale * LOG2E)
        s_prefix = tl.dot(q, tl.trans(k_prefix)) * (scale * LOG2E)
        s_prefix = tl.where((tl.arange(0, PREFIX) < P)[None, :], s_prefix, float("-inf"))
        top = tl.maximum(tl.max(s, axis=1), tl.max(s_prefix, axis=1))[:, None]
        p, p_prefix = tl.exp2(s - top), tl.exp2(s_prefix - top)
        return p, p_prefix, tl.sum(p, axis=1) + tl.sum(p_prefix, axis=1)

    @triton.jit
    def _output(q, k, v, k_prefix, v_prefix, scale, P: tl.constexpr):
        p, p_prefix, total = _exponentials(q, k, k_prefix, scale, P)
        out = tl.dot(p.to(v.dtype), v) + tl.dot(p_prefix.to(v.dtype), v_prefix)
        return out / total[:, None]

    @triton.jit
    def _attend_kernel(qkv, out, scale, P: tl.constexpr, N: tl.constexpr, H: tl.constexpr, D: tl.constexpr):
        h, b = tl.program_id(0), tl.program_id(1)
        T: tl.constexpr = 3 * H * D
        q_at = qkv + (b * (P + N)).to(tl.int64) * T + h * D
        k_at, v_at = q_at + H * D, q_at + 2 * H * D
        to = out + (b * (P + N)).to(tl.int64) * H * D + h * D
        k, k_prefix = _load(k_at, P, N, N, D, T), _load(k_at, 0, P, PREFIX, D, T)
        v, v_prefix = _load(v_at, P, N, N, D, T), _load(v_at, 0, P, PREFIX, D, T)
        q, q_prefix = _load(q_at, P, N, N, D, T), _load(q_at, 0, P, PREFIX, D, T)
        _store(to, _output(q, k, v, k_prefix, v_prefix, scale, P), P, N, N, D, H * D)
        _store(to, _output(q_prefix, k, v, k_prefix, v_prefix, scale, P), 0, P, PREFIX, D, H * D)

    @triton.jit
    def _weights_and_slopes(q, g, k, v, k_prefix, v_prefix, scale, P: tl.constexpr):
        """Attention of queries (R, D), and the gradient of its scores from that of the output, g; each in two parts."""
        p, p_prefix, total = _exponentials(q, k, k_prefix, scale, P)
        share = (1.0 / total)[:, None]
        p, p_prefix = p * share, p_prefix * share
        dp, dp_prefix = tl.dot(g, tl.trans(v)), tl.dot(g, tl.trans(v_prefix))
        mean = (tl.sum(p * dp, axis=1) + tl.sum(p_prefix * dp_prefix, axis=1))[:, None]
        ds, ds_prefix = p * (dp - mean) * scale, p_prefix * (dp_prefix - mean) * scale
        return p.to(q.dtype), p_prefix.to(q.dtype), ds.to(q.dtype), ds_prefix.to(q.dtype)

    @triton.jit
    def _gradient_kernel(
        qkv, grad_out, grad, scale, P: tl.constexpr, N: tl.constexpr, H: tl.constexpr, D: tl.constexpr
    ):
        h, b = tl.program_id(0), tl.program_id(1)
        T: tl.constexpr = 3 * H * D
        q_at = qkv + (b * (P + N)).to(tl.int64) * T + h * D
        k_at, v_at = q_at + H * D, q_at + 2 * H * D
        g_at = grad_out + (b * (P + N)).to(tl.int64) * H * D + h * D
        q_to = grad + (b * (P + N)).to(tl.int64) * T + h * D
        k_to, v_to = q_to + H * D, q_to + 2 * H * D
        k, k_prefix = _load(k_at, P, N, N, D, T), _load(k_at, 0, P, PREFIX, D, T)
        v, v_prefix = _load(v_at, P, N, N, D, T), _load(v_at, 0, P, PREFIX, D, T)
        q, q_prefix = _load(q_at, P, N, N, D, T), _load(q_at, 0, P, PREFIX, D, T)
        g, g_prefix = _load(g_at, P, N, N, D, H * D), _load(g_at, 0, P, PREFIX, D, H * D)
        # p, s: attention and slope; of the patches' queries to patches and prefix, then of the prefix's to both
        p, pp, s, sp = _weights_and_slopes(q, g, k, v, k_prefix, v_prefix, scale, P)
        r, rp, t, tp = _weights_and_slopes(q_prefix, g_prefix, k, v, k_prefix, v_prefix, scale, P)
        _store(v_to, tl.dot(tl.trans(p), g) + tl.dot(tl.trans(r), g_prefix), P, N, N, D, T)
        _store(v_to, tl.dot(tl.trans(pp), g) + tl.dot(tl.trans(rp), g_prefix), 0, P, PREFIX, D, T)
        _store(q_to, tl.dot(s, k) + tl.dot(sp, k_prefix), P, N, N, D, T)
        _store(q_to, tl.dot(t, k) + tl.dot(tp, k_prefix), 0, P, PREFIX, D, T)
        _store(k_to, tl.dot(tl.trans(s), q) + tl.dot(tl.trans(t), q_prefix), P, N, N, D, T)
        _store(k_to, tl.dot(tl.trans(sp), q) + tl.dot(tl.trans(tp), q_prefix), 0, P, PREFIX, D, T)
