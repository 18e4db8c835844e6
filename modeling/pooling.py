"""From sets of tokens to one vector for each modality: the poolings that SDTPS may end with.

With mean pooling the aggregation cancels out, mean(W v) = mean(W) v, and the number of aggregated tokens hardly
matters; the others are not linear in W.

Shape letters: B batch, M modalities, T tokens, C channels.
"""

import torch
from timm.layers.activations import quick_gelu
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from modeling import fused_vit
from modeling.per_modality import norm_linear
from utils.modalities import MODALITIES


class MeanPool(nn.Module):
    """Average of the tokens (B, T, C) -> (B, C)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(dim=1)


class GeMPool(nn.Module):
    """Generalised mean, (mean of max(x, eps)^p)^(1/p) with a learned p (Radenovic et al., 2019)."""

    def __init__(self, p: float = 3.0, eps: float = 1e-6):
        super().__init__()
        self.p = nn.Parameter(torch.tensor(p))
        self.eps = eps

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.clamp_min(self.eps).pow(self.p).mean(dim=1).pow(1 / self.p)


class AttentionPool(nn.Module):
    """Each head weighs the tokens by its own learned query over its slice of the channels; starts as the mean."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(num_heads, embed_dim // num_heads))

    def forward(self, tokens: Tensor) -> Tensor:
        heads, width = self.query.shape
        x = tokens.unflatten(-1, (heads, width))  # (B, T, h, d)
        weight = (torch.einsum("bthd,hd->bth", x, self.query) * width**-0.5).softmax(dim=1)
        return torch.einsum("bth,bthd->bhd", weight, x).flatten(1)


class TransformerPool(nn.Module):
    """One transformer layer over the tokens, then their mean."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.block = Block(embed_dim, num_heads, mlp_ratio=2.0, qkv_bias=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.block(tokens).mean(dim=1)


class Reduce(nn.ModuleDict):
    """Joins each modality's global with a local feature, such as the mean of its patches, and reduces the pair by
    layers of its own: (M, B, C) and (M, B, C) -> (M, B, C). DeMo's GLOBAL_LOCAL."""

    def __init__(self, embed_dim: int):
        super().__init__({m: _ReduceLayers(embed_dim) for m in MODALITIES})

    def forward(self, globals_: Tensor, local: Tensor) -> Tensor:
        x = torch.cat([globals_, local], dim=-1)
        return quick_gelu(norm_linear((own.norm for own in self.values()), (own.linear for own in self.values()), x))


class _ReduceLayers(nn.Module):
    def __init__(self, embed_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(2 * embed_dim)
        self.linear = nn.Linear(2 * embed_dim, embed_dim)


class OwnPool(nn.ModuleDict):
    """Each modality's tokens pooled by a module of its own; class tokens are not looked at."""

    def __init__(self, kind: str, embed_dim: int):
        super().__init__({m: make_token_pool(kind, embed_dim) for m in MODALITIES})

    def forward(self, tokens: Tensor, class_tokens: Tensor, present: Tensor | None = None) -> Tensor:
        return torch.stack([pool(x) for pool, x in zip(self.values(), tokens, strict=True)])


class ReducePool(nn.Module):
    """Each modality's tokens pooled by attention, then joined with its class token and reduced: a projection that
    learns at the rate of the heads, as `ori` has one under GLOBAL_LOCAL."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.own = OwnPool("attention", embed_dim)
        self.reduce = Reduce(embed_dim)

    def forward(self, tokens: Tensor, class_tokens: Tensor, present: Tensor | None = None) -> Tensor:
        return self.reduce(class_tokens, self.own(tokens, class_tokens))


class CrossPool(nn.Module):
    """One transformer layer over the class tokens and the tokens of all modalities; then each modality's class token
    is joined with the mean of its tokens and reduced.

    What the backbone keeps apart meets here. It costs next to nothing, as few tokens are left.

    Args:
        embed_dim: C.
        fused: use the kernels of `modeling.fused_vit` where they compute the same.
    """

    def __init__(self, embed_dim: int, fused: bool = False):
        super().__init__()
        self.fused = fused
        self.modality = nn.Parameter(torch.empty(len(MODALITIES), 1, embed_dim))
        nn.init.trunc_normal_(self.modality, std=0.02)
        self.block = Block(embed_dim, _num_heads(embed_dim), mlp_ratio=2.0, qkv_bias=True)
        self.reduce = Reduce(embed_dim)

    def forward(self, tokens: Tensor, class_tokens: Tensor, present: Tensor | None = None) -> Tensor:
        parts = [class_tokens.unsqueeze(2), tokens.to(class_tokens.dtype)]
        x = torch.cat([part.transpose(0, 1) for part in parts], dim=2)  # (B, M, 1 + T, C)
        shape = x.shape[1:3]
        mask = None
        if present is not None:  # nobody looks at an absent modality, except where there is none
            seen = present | ~present.any(dim=1, keepdim=True)
            seen = seen.repeat_interleave(shape[1], dim=1)[:, None, None]
            mask = torch.zeros_like(seen, dtype=x.dtype).masked_fill(~seen, -torch.inf)
        x = self._mixed((x + self.modality).flatten(1, 2), mask).unflatten(1, shape)
        class_tokens, tokens = x.split([1, shape[1] - 1], dim=2)
        return self.reduce(class_tokens.squeeze(2).transpose(0, 1), tokens.mean(dim=2).transpose(0, 1))

    def _mixed(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The layer itself, (B, T, C) -> (B, T, C)."""
        if mask is None and self.fused and fused_vit.can_fuse([self.block], x.shape[1], x.device, x.dtype):
            return fused_vit.run_blocks([self.block], x)
        return self.block(x, attn_mask=mask)


TOKEN_POOLS = ("mean", "gem", "attention", "transformer")
"""Poolings of the tokens of one modality."""
POOLS = (*TOKEN_POOLS, "reduce", "cross")


def make_pool(kind: str, embed_dim: int, fused: bool = False) -> nn.Module:
    """One of `POOLS`: tokens (M, B, T, C), class tokens (M, B, C), present (B, M) bool or None -> (M, B, C).

    Args:
        embed_dim: C.
        fused: see `CrossPool`; the others know nothing of it.

    Raises:
        ValueError: there is no such pooling.
    """
    if kind == "reduce":
        return ReducePool(embed_dim)
    if kind == "cross":
        return CrossPool(embed_dim, fused)
    return OwnPool(kind, embed_dim)


def make_token_pool(kind: str, embed_dim: int) -> nn.Module:
    """One of `TOKEN_POOLS`: tokens (B, T, C) -> (B, C).

    Raises:
        ValueError: there is no such pooling.
    """
    pools = {
        "mean": MeanPool,
        "gem": GeMPool,
        "attention": lambda: AttentionPool(embed_dim, _num_heads(embed_dim)),
        "transformer": lambda: TransformerPool(embed_dim, _num_heads(embed_dim)),
    }
    if kind not in pools:
        raise ValueError(f"pooling {kind!r} is unknown, expected one of {', '.join(POOLS)}")
    return pools[kind]()


def _num_heads(embed_dim: int) -> int:
    return next(heads for heads in (8, 4, 3, 2, 1) if embed_dim % heads == 0)
