"""From a set of tokens to one vector: the poolings that SDTPS may end with.

With mean pooling the aggregation cancels out, mean(W v) = mean(W) v, and the number of aggregated tokens hardly
matters; the others are not linear in W.
"""

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn


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


def make_pool(kind: str, embed_dim: int) -> nn.Module:
    """The pooling named "mean", "gem", "attention" or "transformer", (B, T, C) -> (B, C).

    Raises:
        ValueError: there is no such pooling.
    """
    num_heads = next(heads for heads in (8, 4, 3, 2, 1) if embed_dim % heads == 0)
    pools = {
        "mean": MeanPool,
        "gem": GeMPool,
        "attention": lambda: AttentionPool(embed_dim, num_heads),
        "transformer": lambda: TransformerPool(embed_dim, num_heads),
    }
    if kind not in pools:
        raise ValueError(f"pooling {kind!r} is unknown, expected one of {', '.join(pools)}")
    return pools[kind]()
