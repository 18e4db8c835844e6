# mypy: disable-error-code="no-untyped-def"
"""Self-attention of a ViT whose patches fill a power of two, as two Triton kernels.

On 256x128 pixels a ViT attends over 128 patches and one class token. General kernels take tiles of 128 keys and spend a
second one on the last token. Here patches and prefix tokens (class token, registers) are two tiles side by side, the
second of 16 rows. All scores of an image and head lie in the registers of one program, so that the backward pass needs
the input alone; queries, keys and values are read from the joint projection and gradients written into its layout, so
that nothing is copied.

Shape letters: B images, H heads, D channels a head, P prefix tokens, N patches.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from utils.kernels import build, launch, put_off, tl, triton

log = logging.getLogger(__name__)

HEAD_DIMS = (16, 32, 64)
MAX_PREFIX = 16
QUERIES = 64
"""Queries that the forward pass takes at a time."""
REGISTERS = 168
"""Registers a thread of it, so that three programs share a multiprocessor."""
PATCHES = (32, 64, 128)
AHEAD = (3, 1)
"""How many images and heads a program of the backward pass may hold at once; the first for which a card's shared memory
is enough is used: an H100's is for three, an A100's for one, that of an RTX 4090 for none over 128 patches."""


def prefix_for(num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many of the tokens count as prefix, those beyond a power of two; 0 where no kernel fits, or not on this
    card."""
    prefixes = (num_tokens - patches for patches in PATCHES if 1 <= num_tokens - patches <= MAX_PREFIX)
    prefix = next(prefixes, 0) if head_dim in HEAD_DIMS else 0
    known = num_tokens, prefix, num_heads, head_dim, dtype, device
    return prefix if prefix and (put_off(images_at_once, *known) or images_at_once(*known)) else 0


@functools.cache
def images_at_once(
    num_tokens: int, num_prefix: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> int:
    """The first of `AHEAD` that fits a card, 0 if none does: found by trying, once."""
    if device.type != "cuda":
        return AHEAD[-1]
    qkv = torch.zeros(1, num_tokens, 3 * num_heads * head_dim, dtype=dtype, device=device)
    sizes = _sizes(qkv, num_heads, num_prefix)
    grad_out = qkv[..., : num_heads * head_dim]
    return first_that_fits(lambda ahead: _launch_gradient(qkv, grad_out, sizes, ahead, build))


def first_that_fits(attempt: Callable[[int], object]) -> int:
    """The first of `AHEAD` with which a kernel does not ask for more than a card has; 0 if there is none, or if it
    fails in another way, which the log tells."""
    for ahead in AHEAD:
        try:
            attempt(ahead)
        except triton.runtime.errors.OutOfResources:
            continue
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # such as a card that this Triton cannot compile for
            told = str(error).strip().splitlines() or [""]
            log.warning("attention is left to torch: %s: %s", type(error).__name__, told[-1])
            return 0
        return ahead
    return 0


def tiled_attention(qkv: Tensor, num_heads: int, num_prefix: int) -> Tensor:
    """softmax(q k / sqrt(D)) v over all tokens of each image.

    Args:
        qkv: (B, P + N, 3 * H * D) half precision on CUDA, the joint projection.
        num_heads: H.
        num_prefix: P, as `prefix_for` says.

    Returns:
        (B, P + N, H * D)
    """
    return _Attention.apply(qkv, num_heads, num_prefix)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv, num_heads, num_prefix):  # type: ignore[override]
        qkv = qkv.contiguous()
        ctx.save_for_backward(qkv)
        ctx.sizes = sizes = _sizes(qkv, num_heads, num_prefix)
        out = qkv.new_empty(*qkv.shape[:2], num_heads * sizes["D"])
        options = {"R": min(QUERIES, sizes["N"]), "num_warps": 4, "maxnreg": REGISTERS}
        launch(_attend_kernel, (len(qkv) * num_heads,), qkv, out, sizes["D"] ** -0.5, **sizes, **options)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out):  # type: ignore[override]
        (qkv,), sizes = ctx.saved_tensors, ctx.sizes
        known = qkv.shape[1], sizes["P"], sizes["H"], sizes["D"], qkv.dtype, qkv.device
        if put_off(images_at_once, *known):  # which builds the kernel as it will be launched
            return torch.empty_like(qkv), None, None
        return _launch_gradient(qkv, grad_out, sizes, images_at_once(*known), launch), None, None


def _sizes(qkv: Tensor, num_heads: int, num_prefix: int) -> dict[str, int]:
    num_patches, head_dim = qkv.shape[1] - num_prefix, qkv.shape[2] // 3 // num_heads
    return {"P": num_prefix, "N": num_patches, "H": num_heads, "D": head_dim}


def _launch_gradient(
    qkv: Tensor, grad_out: Tensor, sizes: dict[str, int], ahead: int, action: Callable[..., None]
) -> Tensor:
    """Gradient of the joint projection, by a program for each image and head, or by as many as run side by side; there
    if the action is to `launch`, and not if it is to `build`."""
    grad = torch.empty_like(qkv)
    programs = tasks = len(qkv) * sizes["H"]
    if ahead > 1:
        programs = min(tasks, torch.cuda.get_device_properties(qkv.device).multi_processor_count)
    args = (qkv, grad_out.contiguous(), grad, tasks, sizes["D"] ** -0.5)
    action(_gradient_kernel, (programs,), *args, **sizes, AHEAD=ahead, num_warps=8)
    return grad


if triton is not None:
    LOG2E = tl.constexpr(1.4426950408889634)
    PREFIX = tl.constexpr(MAX_PREFIX)

    @triton.jit
    def _load(x, first, R: tl.constexpr, D: tl.constexpr, stride):
        """Rows first .. first + R, (R, D)."""
        return tl.load(x + (first + tl.arange(0, R))[:, None] * stride + tl.arange(0, D)[None, :])

    @triton.jit
    def _load_prefix(x, P: tl.constexpr, D: tl.constexpr, stride):
        """The first P rows, zeros below, (16, D)."""
        r = tl.arange(0, PREFIX)
        return tl.load(x + r[:, None] * stride + tl.arange(0, D)[None, :], mask=(r < P)[:, None], other=0.0)

    @triton.jit
    def _store(x, value, first, R: tl.constexpr, D: tl.constexpr, stride):
        places = (first + tl.arange(0, R))[:, None] * stride + tl.arange(0, D)[None, :]
        tl.store(x + places, value.to(x.dtype.element_ty))

    @triton.jit
    def _store_prefix(x, value, P: tl.constexpr, D: tl.constexpr, stride):
        r = tl.arange(0, PREFIX)
        places = r[:, None] * stride + tl.arange(0, D)[None, :]
        tl.store(x + places, value.to(x.dtype.element_ty), mask=(r < P)[:, None])

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
    def _attend_kernel(
        qkv, out, scale, P: tl.constexpr, N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, R: tl.constexpr
    ):
        """One image and head a program, R of its queries at a time."""
        h, first_token = tl.program_id(0) % H, (tl.program_id(0) // H).to(tl.int64) * (P + N)
        T: tl.constexpr = 3 * H * D
        q_at = qkv + first_token * T + h * D
        k_at, v_at = q_at + H * D, q_at + 2 * H * D
        to = out + first_token * H * D + h * D
        k, k_prefix = _load(k_at, P, N, D, T), _load_prefix(k_at, P, D, T)
        v, v_prefix = _load(v_at, P, N, D, T), _load_prefix(v_at, P, D, T)
        for first in tl.range(P, P + N, R, num_stages=1):
            q = _load(q_at, first, R, D, T)
            _store(to, _output(q, k, v, k_prefix, v_prefix, scale, P), first, R, D, H * D)
        q_prefix = _load_prefix(q_at, P, D, T)
        _store_prefix(to, _output(q_prefix, k, v, k_prefix, v_prefix, scale, P), P, D, H * D)

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

    @triton.jit(do_not_specialize=["tasks"])
    def _gradient_kernel(
        qkv,
        grad_out,
        grad,
        tasks,
        scale,
        P: tl.constexpr,
        N: tl.constexpr,
        H: tl.constexpr,
        D: tl.constexpr,
        AHEAD: tl.constexpr,
    ):
        """One image and head after the other a program; the next ones are fetched while it computes, AHEAD - 1 deep."""
        T: tl.constexpr = 3 * H * D
        for task in tl.range(tl.program_id(0), tasks, tl.num_programs(0), num_stages=AHEAD):
            h, first = task % H, tl.full((), task // H, tl.int64) * (P + N)
            q_at = qkv + first * T + h * D
            k_at, v_at = q_at + H * D, q_at + 2 * H * D
            g_at = grad_out + first * H * D + h * D
            q_to = grad + first * T + h * D
            k_to, v_to = q_to + H * D, q_to + 2 * H * D
            k, v, q, g = (
                _load(k_at, P, N, D, T),
                _load(v_at, P, N, D, T),
                _load(q_at, P, N, D, T),
                _load(g_at, P, N, D, H * D),
            )
            k_prefix, v_prefix = _load_prefix(k_at, P, D, T), _load_prefix(v_at, P, D, T)
            q_prefix, g_prefix = _load_prefix(q_at, P, D, T), _load_prefix(g_at, P, D, H * D)
            # p, s: attention and slope; of the patches' queries to patches and prefix, then of the prefix's to both
            p, pp, s, sp = _weights_and_slopes(q, g, k, v, k_prefix, v_prefix, scale, P)
            r, rp, t, tp = _weights_and_slopes(q_prefix, g_prefix, k, v, k_prefix, v_prefix, scale, P)
            dv = tl.dot(tl.trans(p), g) + tl.dot(tl.trans(r), g_prefix)
            dvp = tl.dot(tl.trans(pp), g) + tl.dot(tl.trans(rp), g_prefix)
            _store(v_to, dv, P, N, D, T)
            _store_prefix(v_to, dvp, P, D, T)
            dq, dqp = tl.dot(s, k) + tl.dot(sp, k_prefix), tl.dot(t, k) + tl.dot(tp, k_prefix)
            _store(q_to, dq, P, N, D, T)
            _store_prefix(q_to, dqp, P, D, T)
            dk = tl.dot(tl.trans(s), q) + tl.dot(tl.trans(t), q_prefix)
            dkp = tl.dot(tl.trans(sp), q) + tl.dot(tl.trans(tp), q_prefix)
            _store(k_to, dk, P, N, D, T)
            _store_prefix(k_to, dkp, P, D, T)
