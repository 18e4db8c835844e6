"""Blocks of a plain timm ViT as a chain of matrix products and the kernels of `modeling.kernels`.

    x, normed = norm1(x)
    x, normed = norm2(x + attention(normed))
    x, normed = norm1 of the next block (x + mlp(normed)), and so on

What a block computes is timm's; stochastic depth differs: a branch skips a fixed number of images, chosen anew in every
step, and does not compute them.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from modeling.kernels import kernels_work
from modeling.kernels.activation import activated_linear, has_kernel
from modeling.kernels.attention import prefix_for, tiled_attention
from modeling.kernels.linear import linear
from modeling.kernels.residual import Branch, add_branch, draw_kept, norm_for


def can_fuse(blocks: Sequence[Any], device: torch.device) -> bool:
    """Whether `run_blocks` computes what the blocks do, and is faster: under half-precision autocast on a GPU."""
    half = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) != torch.float32
    return half and kernels_work(device) and all(_is_known(block) for block in blocks)


def _is_known(block: Any) -> bool:
    """Whether a block has nothing but norms, plain attention and an MLP with biases."""
    if (type(block), type(block.attn), type(block.mlp)) != (Block, Attention, Mlp):
        return False
    attn, mlp = block.attn, block.mlp
    absent = (block.ls1, block.ls2, mlp.norm, attn.q_norm, attn.k_norm, getattr(attn, "norm", nn.Identity()))
    return (
        has_kernel(plain_activation(mlp))
        and getattr(attn, "gate", None) is None
        and all(isinstance(norm, nn.LayerNorm) and norm.bias is not None for norm in (block.norm1, block.norm2))
        and all(isinstance(module, nn.Identity) for module in absent)
        and all(dropout.p == 0 for dropout in (attn.attn_drop, attn.proj_drop, mlp.drop1, mlp.drop2))
        and all(layer.bias is not None for layer in (attn.proj, mlp.fc1, mlp.fc2))
    )


def plain_activation(mlp: Any) -> nn.Module:
    """The activation of an MLP, without what makes it again in the backward pass of compiled code."""
    return getattr(mlp.act, "act", mlp.act)


def run_blocks(blocks: Sequence[Any], tokens: Tensor) -> Tensor:
    """Blocks that `can_fuse`, under autocast, (B, L, W) -> (B, L, W)."""
    drops = [drop for block in blocks for drop in (block.drop_path1, block.drop_path2)]
    rates = [getattr(drop, "rate", 0.0) if drop.training else 0.0 for drop in drops]
    kept = draw_kept(len(tokens), rates, tokens.device)
    norms = [norm for block in blocks for norm in (block.norm1, block.norm2)]
    layers = [layer for block in blocks for layer in (block.attn.proj, block.mlp.fc2)]
    x, normed = norm_for(tokens, norms[0], kept[0])
    for i, last in enumerate(layers):
        block = blocks[i // 2]
        out = _attention(block.attn, normed) if i % 2 == 0 else _mlp(block.mlp, normed)
        branch = Branch(out, last.bias, kept[i])
        if i + 1 < len(layers):
            x, normed = norm_for(x, norms[i + 1], kept[i + 1], branch)
    return add_branch(x, branch)


def _attention(attn: Any, x: Tensor) -> Tensor:
    """Self-attention without the bias of its last layer, (B, L, W) -> (B, L, W)."""
    qkv = linear(x, attn.qkv.weight, attn.qkv.bias)
    if prefix := prefix_for(x.shape[1], attn.head_dim):
        out = tiled_attention(qkv, attn.num_heads, prefix)
    else:
        q, k, v = qkv.unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return linear(out, attn.proj.weight)


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    """MLP without the bias of its last layer, (B, L, W) -> (B, L, W)."""
    return activated_linear(linear(x, mlp.fc1.weight), mlp.fc1.bias, mlp.fc2.weight, plain_activation(mlp))
