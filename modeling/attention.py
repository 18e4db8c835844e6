"""Self-attention of a ViT whose patches fill a power of two, as three Triton kernels.

On 256x128 pixels a ViT attends over 128 patches and one class token. General kernels take tiles of 128 keys and spend a
second one on the last token. Here patches and prefix tokens (class token, registers) are two tiles side by side, the
second of 16 rows. Queries, keys and values are read from the joint projection and gradients written into its layout,
so that nothing is copied.

Shape letters: B images, H heads, D channels a head, P prefix tokens, N patches, M patches of one program.
"""

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


def use_tiled_attention(vit: nn.Module, num_patches: int) -> None:
    """Lets the blocks of a timm ViT attend through the kernels, where there are some for its shape."""
    blocks = [getattr(block, "attn", None) for block in vit.blocks]
    fits = triton is not None and vit.num_prefix_tokens <= MAX_PREFIX and num_patches in PATCHES
    if fits and all(type(a) is Attention and a.head_dim in HEAD_DIMS and _is_plain(a) for a in blocks):
        for attention in blocks:
            attention.__class__, attention.num_prefix = TiledAttention, vit.num_prefix_tokens


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
    return _attend(qkv, num_heads, num_prefix)[0]


@torch.library.custom_op("tiled_attention::attend", mutates_args=(), device_types="cuda")
def _attend(qkv: Tensor, num_heads: int, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Output (B, P + N, H * D), and (B, H, P + N) float32: log2 of each query's sum of exponentials."""
    out, total = _outputs(qkv, num_heads)
    grid, sizes = _launch(qkv, num_heads, num_prefix)
    _attend_kernel[grid](qkv.contiguous(), out, total, **sizes)
    return out, total


@torch.library.custom_op("tiled_attention::differentiate", mutates_args=(), device_types="cuda")
def _differentiate(
    qkv: Tensor, out: Tensor, total: Tensor, grad_out: Tensor, num_heads: int, num_prefix: int
) -> Tensor:
    """Gradient of the joint projection (B, P + N, 3 * H * D)."""
    grad = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    grid, sizes = _launch(qkv, num_heads, num_prefix)
    tensors = (qkv.contiguous(), out, total, grad_out.contiguous(), grad)
    _query_kernel[grid](*tensors, **sizes)
    _key_value_kernel[grid](*tensors, **sizes)
    return grad


def _launch(qkv: Tensor, num_heads: int, num_prefix: int) -> tuple[tuple[int, int, int], dict[str, Any]]:
    batch, length, width = qkv.shape
    n, d = length - num_prefix, width // 3 // num_heads
    m = max(16, n // 2)
    sizes = {"P": num_prefix, "N": n, "H": num_heads, "D": d, "M": m}
    return (n // m, num_heads, batch), {"scale": d**-0.5, **sizes, "num_warps": 4}


def _outputs(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    batch, length, width = qkv.shape
    return qkv.new_empty(batch, length, width // 3), qkv.new_empty(batch, num_heads, length, dtype=torch.float32)


@_attend.register_fake
def _(qkv: Tensor, num_heads: int, num_prefix: int) -> tuple[Tensor, Tensor]:
    return _outputs(qkv, num_heads)


@_differentiate.register_fake
def _(qkv: Tensor, out: Tensor, total: Tensor, grad_out: Tensor, num_heads: int, num_prefix: int) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor, int, int], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], *output)
    ctx.num_heads, ctx.num_prefix = inputs[1:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor, grad_total: None) -> tuple[Tensor, None, None]:
    return _differentiate(*ctx.saved_tensors, grad_out, ctx.num_heads, ctx.num_prefix), None, None


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
    def _load_row(x, first, count, R: tl.constexpr, other):
        r = tl.arange(0, R)
        return tl.load(x + first + r, mask=r < count, other=other)

    @triton.jit
    def _attend_rows(
        q_at, k, v, k_prefix, v_prefix, out, total, scale, first, count, P: tl.constexpr, D: tl.constexpr,
        H: tl.constexpr, R: tl.constexpr,
    ):  # fmt: skip
        """Output of the queries in `count` rows, and log2 of their sums of exponentials."""
        q = _load(q_at, first, count, R, D, 3 * H * D)
        s = tl.dot(q, tl.trans(k)) * (scale * LOG2E)
        s_prefix = tl.dot(q, tl.trans(k_prefix)) * (scale * LOG2E)
        s_prefix = tl.where((tl.arange(0, PREFIX) < P)[None, :], s_prefix, float("-inf"))
        top = tl.maximum(tl.max(s, axis=1), tl.max(s_prefix, axis=1))
        p = tl.exp2(s - top[:, None])
        p_prefix = tl.exp2(s_prefix - top[:, None])
        t = tl.sum(p, axis=1) + tl.sum(p_prefix, axis=1)
        o = tl.dot(p_prefix.to(v.dtype), v_prefix, tl.dot(p.to(v.dtype), v))
        _store(out, o / t[:, None], first, count, R, D, H * D)
        r = tl.arange(0, R)
        tl.store(total + first + r, top + tl.log2(t), mask=r < count)

    @triton.jit
    def _attend_kernel(
        qkv, out, total, scale, P: tl.constexpr, N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, M: tl.constexpr
    ):
        part, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        T: tl.constexpr = 3 * H * D
        q_at = qkv + (b * (P + N)).to(tl.int64) * T + h * D
        k_at, v_at = q_at + H * D, q_at + 2 * H * D
        out += (b * (P + N)).to(tl.int64) * H * D + h * D
        total += (b * H + h) * (P + N)
        k, k_prefix = _load(k_at, P, N, N, D, T), _load(k_at, 0, P, PREFIX, D, T)
        v, v_prefix = _load(v_at, P, N, N, D, T), _load(v_at, 0, P, PREFIX, D, T)
        _attend_rows(q_at, k, v, k_prefix, v_prefix, out, total, scale, P + part * M, M, P, D, H, M)
        if part == 0:
            _attend_rows(q_at, k, v, k_prefix, v_prefix, out, total, scale, 0, P, P, D, H, PREFIX)

    @triton.jit
    def _query_rows(
        q_at, k, v, k_prefix, v_prefix, out, total, grad_out, grad, scale, first, count, P: tl.constexpr,
        D: tl.constexpr, H: tl.constexpr, R: tl.constexpr,
    ):  # fmt: skip
        """Gradient of the queries in `count` rows."""
        q = _load(q_at, first, count, R, D, 3 * H * D)
        g, o = _load(grad_out, first, count, R, D, H * D), _load(out, first, count, R, D, H * D)
        t = _load_row(total, first, count, R, 0.0)
        mean = tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=1)
        p = tl.exp2(tl.dot(q, tl.trans(k)) * (scale * LOG2E) - t[:, None])
        p_prefix = tl.exp2(tl.dot(q, tl.trans(k_prefix)) * (scale * LOG2E) - t[:, None])
        p_prefix = tl.where((tl.arange(0, PREFIX) < P)[None, :], p_prefix, 0.0)
        ds = (p * (tl.dot(g, tl.trans(v)) - mean[:, None]) * scale).to(q.dtype)
        ds_prefix = (p_prefix * (tl.dot(g, tl.trans(v_prefix)) - mean[:, None]) * scale).to(q.dtype)
        _store(grad, tl.dot(ds_prefix, k_prefix, tl.dot(ds, k)), first, count, R, D, 3 * H * D)

    @triton.jit
    def _query_kernel(
        qkv, out, total, grad_out, grad, scale, P: tl.constexpr, N: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
        M: tl.constexpr,
    ):  # fmt: skip
        part, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        T: tl.constexpr = 3 * H * D
        q_at = qkv + (b * (P + N)).to(tl.int64) * T + h * D
        k_at, v_at = q_at + H * D, q_at + 2 * H * D
        grad += (b * (P + N)).to(tl.int64) * T + h * D
        out += (b * (P + N)).to(tl.int64) * H * D + h * D
        grad_out += (b * (P + N)).to(tl.int64) * H * D + h * D
        total += (b * H + h) * (P + N)
        k, k_prefix = _load(k_at, P, N, N, D, T), _load(k_at, 0, P, PREFIX, D, T)
        v, v_prefix = _load(v_at, P, N, N, D, T), _load(v_at, 0, P, PREFIX, D, T)
        first = P + part * M
        _query_rows(q_at, k, v, k_prefix, v_prefix, out, total, grad_out, grad, scale, first, M, P, D, H, M)
        if part == 0:
            _query_rows(q_at, k, v, k_prefix, v_prefix, out, total, grad_out, grad, scale, 0, P, P, D, H, PREFIX)

    @triton.jit
    def _key_value_part(k, v, q, g, t, mean, dk, dv, scale):
        """Adds what some queries give to the gradients of keys and values."""
        p = tl.exp2(tl.dot(k, tl.trans(q)) * (scale * LOG2E) - t[None, :])
        ds = (p * (tl.dot(v, tl.trans(g)) - mean[None, :]) * scale).to(q.dtype)
        return tl.dot(ds, q, dk), tl.dot(p.to(q.dtype), g, dv)

    @triton.jit
    def _key_value_rows(
        k_at, q, g, t, mean, q_prefix, g_prefix, t_prefix, mean_prefix, grad, scale, first, count, D: tl.constexpr,
        H: tl.constexpr, R: tl.constexpr,
    ):  # fmt: skip
        """Gradient of the keys and values in `count` rows."""
        k = _load(k_at, first, count, R, D, 3 * H * D)
        v = _load(k_at + H * D, first, count, R, D, 3 * H * D)
        zero = tl.zeros((R, D), tl.float32)
        dk, dv = _key_value_part(k, v, q, g, t, mean, zero, zero, scale)
        dk, dv = _key_value_part(k, v, q_prefix, g_prefix, t_prefix, mean_prefix, dk, dv, scale)
        _store(grad, dk, first, count, R, D, 3 * H * D)
        _store(grad + H * D, dv, first, count, R, D, 3 * H * D)

    @triton.jit
    def _key_value_kernel(
        qkv, out, total, grad_out, grad, scale, P: tl.constexpr, N: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
        M: tl.constexpr,
    ):  # fmt: skip
        part, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        T: tl.constexpr = 3 * H * D
        q_at = qkv + (b * (P + N)).to(tl.int64) * T + h * D
        k_at = q_at + H * D
        grad += (b * (P + N)).to(tl.int64) * T + h * D + H * D
        out += (b * (P + N)).to(tl.int64) * H * D + h * D
        grad_out += (b * (P + N)).to(tl.int64) * H * D + h * D
        total += (b * H + h) * (P + N)
        q, q_prefix = _load(q_at, P, N, N, D, T), _load(q_at, 0, P, PREFIX, D, T)
        g, g_prefix = _load(grad_out, P, N, N, D, H * D), _load(grad_out, 0, P, PREFIX, D, H * D)
        o, o_prefix = _load(out, P, N, N, D, H * D), _load(out, 0, P, PREFIX, D, H * D)
        mean = tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=1)
        mean_prefix = tl.sum(g_prefix.to(tl.float32) * o_prefix.to(tl.float32), axis=1)
        t = _load_row(total, P, N, N, 0.0)
        t_prefix = _load_row(total, 0, P, PREFIX, float("inf"))  # no weight for rows that are not there
        queries = (q, g, t, mean, q_prefix, g_prefix, t_prefix, mean_prefix)
        _key_value_rows(k_at, *queries, grad, scale, P + part * M, M, D, H, M)
        if part == 0:
            _key_value_rows(k_at, *queries, grad, scale, 0, P, D, H, PREFIX)
