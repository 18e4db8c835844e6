"""A plain timm ViT in half precision as a chain of matrix products and the kernels of `modeling.kernels`.

    x = embed(patches)                     class token, positions, first norm
    x, normed = norm1(x)
    x, normed = norm2(x + attention(normed))
    x, normed = norm1 of the next block (x + mlp(normed)), and so on

What a block computes is timm's; stochastic depth differs: a branch skips a fixed number of images, chosen anew in every
step, and does not compute them.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.layers.activations import QuickGELU
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from modeling.block_parts import DropPath, Recomputed
from modeling.kernels.activation import activated_linear, has_kernel
from modeling.kernels.attention import prefix_for, tiled_attention
from modeling.kernels.biases import tied_biases
from modeling.kernels.embedding import embed_tokens
from modeling.kernels.linear import halves, linear
from modeling.kernels.residual import Branch, Kept, add_branch, draw_kept, layer_norm, norm_for
from utils.kernels import can_launch, compare, proven, trial

ACTIVATIONS_KEPT = 0.5
"""Share of the blocks, the last ones, that keep what comes out of their activation: six of twelve take 0.85 GiB for 192
images of 129 tokens, and save 6 of the 72 passes that the activations' kernels make over the hidden layers."""


def can_fuse(blocks: Sequence[Any], num_tokens: int, device: torch.device, stream: torch.dtype | None = None) -> bool:
    """Whether `run_blocks` computes what the blocks do, and is faster: under half-precision autocast on a GPU, where
    the kernels have shown once that they compute what timm's blocks do.

    Args:
        blocks: of a timm ViT, with nothing but norms, plain attention and an MLP with biases, in float32.
        num_tokens: L.
        stream: type of the tokens; None is that of `embed`.
    """
    if torch.compiler.is_compiling() or not (can_launch(device) and torch.is_autocast_enabled(device.type)):
        return False
    dtype = torch.get_autocast_dtype(device.type)
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    kinds = {kind_of(block) for block in blocks}
    kind = kinds.pop() if len(kinds) == 1 else None
    return kind is not None and kernels_agree(kind, num_tokens, dtype, device, stream or stream_type(device))


@dataclass(frozen=True)
class Kind:
    """What kernels are built for: width of the ViT and of its hidden layers, heads, the bias and the activation."""

    width: int
    hidden: int
    heads: int
    qkv_bias: bool
    quick: bool


def kind_of(block: Any) -> Kind | None:
    """The kind of a block; None where it has parts that the kernels do not know, or somebody listens to its parts."""
    if type(block) is not Block or type(block.attn) is not Attention or type(block.mlp) is not Mlp:
        return None
    attn, mlp = block.attn, block.mlp
    norms, drops = (block.norm1, block.norm2), (attn.attn_drop, attn.proj_drop, mlp.drop1, mlp.drop2)
    layers, act = (attn.qkv, attn.proj, mlp.fc1, mlp.fc2), plain_activation(mlp)
    absent = (block.ls1, block.ls2, mlp.norm, attn.q_norm, attn.k_norm, getattr(attn, "norm", nn.Identity()))
    plain = (
        has_kernel(act)
        and getattr(attn, "gate", None) is None
        and all(isinstance(part, nn.Identity) for part in absent)
        and all(isinstance(part, nn.Identity | DropPath) for part in (block.drop_path1, block.drop_path2))
        and all(dropout.p == 0 for dropout in drops)
        and all(isinstance(norm, nn.LayerNorm) for norm in norms)
        and all(type(layer) is nn.Linear for layer in layers)
        and all(part.bias is not None for part in (*norms, *layers[1:]))
        and all(part.weight.dtype is torch.float32 for part in (*norms, *layers))
        and attn.scale == attn.head_dim**-0.5
        and attn.head_dim * attn.num_heads == attn.qkv.in_features
        and not any(_is_watched(part) for part in (block, attn, mlp, mlp.act, act, *norms, *layers, *absent, *drops))
    )
    if not plain:
        return None
    bias = attn.qkv.bias is not None
    return Kind(attn.qkv.in_features, mlp.fc1.out_features, attn.num_heads, bias, isinstance(act, QuickGELU))


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody listens to a module by a hook."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def plain_activation(mlp: Any) -> nn.Module:
    """The activation of an MLP, without what makes it again in the backward pass of compiled code."""
    return mlp.act.act if isinstance(mlp.act, Recomputed) else mlp.act


def can_embed(vit: Any) -> bool:
    """Whether `embed` computes what a ViT does between patch embedding and blocks."""
    norm = vit.norm_pre
    return (
        vit.num_prefix_tokens == 1
        and vit.cls_token is not None
        and getattr(vit, "reg_token", None) is None
        and vit.pos_embed is not None
        and not getattr(vit, "no_embed_class", False)
        and not getattr(vit, "dynamic_img_size", False)
        and vit.pos_drop.p == 0
        and isinstance(vit.patch_drop, nn.Identity)
        and (isinstance(norm, nn.Identity) or (isinstance(norm, nn.LayerNorm) and norm.bias is not None))
    )


def embed(vit: Any, patches: Tensor, class_tokens: Tensor) -> Tensor:
    """Embedded patches (B, N, W) and class tokens (B, W) -> tokens (B, L, W) with positions and norm, for a ViT that
    `can_embed`, in bf16 under autocast to it, so that the residual stream is no wider than what blocks add to it."""
    norm = None if isinstance(vit.norm_pre, nn.Identity) else vit.norm_pre
    return embed_tokens(patches, class_tokens, vit.pos_embed[0], norm, stream_type(patches.device))


def stream_type(device: torch.device) -> torch.dtype:
    """The type of the tokens between blocks: that of autocast to bf16, else float32, as the range of fp16 is small."""
    dtype = torch.get_autocast_dtype(device.type)
    return dtype if torch.is_autocast_enabled(device.type) and dtype is torch.bfloat16 else torch.float32


def run_blocks(blocks: Sequence[Any], tokens: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
    """Blocks that `can_fuse`, under autocast, (B, L, W) -> (B, L, W), and the norm behind the last if one is given."""
    return run_kept(blocks, tokens, draw_branches(blocks, tokens), norm)


def draw_branches(blocks: Sequence[Any], tokens: Tensor) -> list[Kept]:
    """Which of the images of tokens (B, L, W) each branch keeps: two branches a block."""
    drops = [drop for block in blocks for drop in (block.drop_path1, block.drop_path2)]
    rates = [drop.rate if isinstance(drop, DropPath) and drop.training else 0.0 for drop in drops]
    return draw_kept(len(tokens), rates, tokens.device)


def run_kept(blocks: Sequence[Any], tokens: Tensor, kept: Sequence[Kept], norm: nn.LayerNorm | None = None) -> Tensor:
    """`run_blocks`, told what `draw_branches` drew."""
    norms = [norm for block in blocks for norm in (block.norm1, block.norm2)]
    layers = [layer for block in blocks for layer in (block.attn.proj, block.mlp.fc2)]
    x, normed = norm_for(tokens, norms[0], kept[0])
    prepared = _prepare(blocks, normed.dtype)
    for i, last in enumerate(layers):
        block, ready = blocks[i // 2], prepared[i // 2]
        kept_late = i // 2 >= len(blocks) - int(ACTIVATIONS_KEPT * len(blocks))
        out = _attention(block.attn, normed, ready) if i % 2 == 0 else _mlp(block.mlp, normed, ready, kept_late)
        branch = Branch(out, last.bias if i % 2 else ready.proj_bias, kept[i])
        if i + 1 < len(layers):
            x, normed = norm_for(x, norms[i + 1], kept[i + 1], branch)
    if norm is None:
        return add_branch(x, branch)
    return norm_for(x, norm, draw_kept(len(x), [0.0], x.device)[0], branch)[1]


@dataclass(frozen=True)
class _Prepared:
    """What a block takes from its weights: in half precision, and the biases by which attention is differentiated."""

    qkv: tuple[Tensor, Tensor | None]
    proj: Tensor
    fc1: Tensor
    fc2: Tensor
    query_bias: Tensor | None
    proj_bias: Tensor


def _prepare(blocks: Sequence[Any], dtype: torch.dtype) -> list[_Prepared]:
    """For all blocks at once."""
    attns, mlps = [block.attn for block in blocks], [block.mlp for block in blocks]
    layers = [[attn.qkv for attn in attns], [attn.proj for attn in attns], [m.fc1 for m in mlps], [m.fc2 for m in mlps]]
    biases, proj_biases = [attn.qkv.bias for attn in attns], [attn.proj.bias for attn in attns]
    has_bias = biases[0] is not None
    kinds = [[layer.weight for layer in kind] for kind in layers] + ([biases] if has_bias else [])
    qkv, proj, fc1, fc2, *qkv_biases = halves(kinds, dtype)
    queries: list[Tensor | None] = [None] * len(blocks)
    trained = [i for i, bias in enumerate(biases) if bias is not None and bias.requires_grad]
    if trained:  # blocks that are frozen stay out of the backward pass
        own = proj if len(trained) == len(blocks) else torch.stack([proj[i] for i in trained])
        tied = tied_biases([biases[i] for i in trained], [proj_biases[i] for i in trained], own)
        for i, query, bias in zip(trained, *tied, strict=True):
            queries[i], proj_biases[i] = query, bias
    of_qkv = list(zip(qkv, qkv_biases[0] if has_bias else queries, strict=True))
    return [_Prepared(*parts) for parts in zip(of_qkv, proj, fc1, fc2, queries, proj_biases, strict=True)]


def _attention(attn: Any, x: Tensor, ready: _Prepared) -> Tensor:
    """Self-attention without the bias of its last layer, (B, L, W) -> (B, L, W)."""
    qkv = linear(x, attn.qkv.weight, ready.query_bias, ready.qkv)
    if prefix := prefix_for(x.shape[1], attn.num_heads, attn.head_dim, qkv.dtype, x.device):
        out = tiled_attention(qkv, attn.num_heads, prefix)
    else:
        q, k, v = (part.transpose(1, 2) for part in qkv.unflatten(2, (3, attn.num_heads, -1)).unbind(2))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return linear(out, attn.proj.weight, half=(ready.proj, None))


def _mlp(mlp: Any, x: Tensor, ready: _Prepared, keep: bool) -> Tensor:
    """MLP without the bias of its last layer, (B, L, W) -> (B, L, W)."""
    hidden = linear(x, mlp.fc1.weight, half=(ready.fc1, None))
    return activated_linear(hidden, mlp.fc1.bias, mlp.fc2.weight, plain_activation(mlp), ready.fc2, keep)


@functools.cache
def kernels_agree(kind: Kind, num_tokens: int, dtype: torch.dtype, device: torch.device, stream: torch.dtype) -> bool:
    """Whether a small ViT of that kind has the output and the gradients of timm's in float32, about as well as timm's
    own in half precision. Tried once; where it does not, the log says why.

    Raises:
        torch.OutOfMemoryError: nothing is known then, and the next call tries again.
    """
    images = _images_to_check(kind, device)
    return proven(
        lambda: relative_errors(kind, num_tokens, dtype, device, images=images, stream=stream),
        "blocks are not fused, so the backbone is slower",
    )


def _images_to_check(kind: Kind, device: torch.device) -> int:
    """So many that programs which stay and go from one task to the next do so a few times; an odd number, which no
    tile divides."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(9, (3 * processors // kind.heads) | 1)


def relative_errors(
    kind: Kind,
    num_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    images: int = 9,
    stream: torch.dtype | None = None,
) -> dict[str, tuple[float, float]]:
    """The largest errors of the output and of every gradient, by name, of a random ViT of three blocks, of which some
    images skip branches, and of a few norms beside it: by the kernels, and by timm's own modules in the same
    precision. What is expected are timm's in float32; see `utils.kernels.compare`.

    Args:
        dtype: autocast type; float32 for none.
        images: in the batch, four at least.
        stream: see `can_fuse`.
    """

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    with trial(device):
        vit = _small_vit(kind, noise).to(device)
        patches = noise(images, num_tokens - 1, kind.width)
        class_tokens, positions = noise(images, kind.width), noise(num_tokens, kind.width)
        inputs = {"patches": patches, "class tokens": class_tokens, "positions": positions}
        leaves = {name: x.requires_grad_() for name, x in inputs.items()} | dict(vit.named_parameters())
        kept = draw_kept(images, [0.0, 0.25, 0.25, 0.0, 0.25, 0.0], device)
        added = kept[1], kept[0]  # by themselves, as where blocks are computed again, and before a last norm
        norm, bias, grad = vit["norm"], vit["blocks"][0].mlp.fc2.bias, noise(images, num_tokens, kind.width)

        def differentiated(precision: torch.dtype, fused: bool) -> list[Tensor]:
            with torch.autocast(device.type, dtype=precision, enabled=precision is not torch.float32):
                between = torch.float32 if precision is torch.float32 else stream or stream_type(device)
                if fused:
                    x = embed_tokens(patches.to(precision), class_tokens, positions, norm, between)
                    beside = embed_tokens(patches.to(precision), class_tokens, positions, None, between)
                    for drawn in added:
                        beside, normed = norm_for(beside, norm, drawn)
                        beside = add_branch(beside, Branch(normed, bias, drawn))
                    last, normed = norm_for(beside, norm, kept[1])
                    last = norm_for(last, norm, kept[0], Branch(normed, bias, kept[1]))[1]
                    out = run_kept(vit["blocks"], x, kept, norm) + last + layer_norm(beside, norm)
                else:
                    beside = torch.cat([class_tokens.unsqueeze(1), patches], dim=1) + positions
                    x, beside = norm(beside).to(between), beside.to(between)
                    for drawn in added:
                        beside = (beside + _share(drawn) * (norm(beside) + bias)).to(between)
                    last = (beside + _share(kept[1]) * (norm(beside) + bias)).to(between)
                    out = norm(_as_written(vit["blocks"], x, kept)) + norm(last) + norm(beside)
            return [out, *torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))]

        results = differentiated(dtype, True), differentiated(dtype, False), differentiated(torch.float32, False)
    return compare(["output", *leaves], *results)


def _small_vit(kind: Kind, noise: Callable[..., Tensor]) -> nn.ModuleDict:
    """Three blocks and a norm, with weights from `noise`."""
    act = QuickGELU if kind.quick else nn.GELU
    ratio = (kind.hidden + 0.5) / kind.width  # timm rounds down
    blocks = [Block(kind.width, kind.heads, ratio, kind.qkv_bias, act_layer=act) for _ in range(3)]
    vit = nn.ModuleDict({"blocks": nn.ModuleList(blocks), "norm": nn.LayerNorm(kind.width)})
    for name, parameter in vit.named_parameters():
        matrix = parameter.dim() == 2
        centre, spread = float("norm" in name and "weight" in name), parameter.shape[1] ** -0.5 if matrix else 0.1
        parameter.data = centre + spread * noise(*parameter.shape)
    return vit


def _as_written(blocks: Sequence[Any], tokens: Tensor, kept: Sequence[Kept]) -> Tensor:
    """What `run_kept` computes, by timm's own modules."""
    for i, drawn in enumerate(kept):
        block = blocks[i // 2]
        branch = block.mlp(block.norm2(tokens)) if i % 2 else block.attn(block.norm1(tokens))
        tokens = tokens + _share(drawn) * branch
    return tokens


def _share(kept: Kept) -> Tensor:
    """What a branch is multiplied by in each image, (B, 1, 1)."""
    return ((kept.order < kept.count) * kept.scale)[:, None, None]
