"""DeMo's fusion of modalities (Wang et al., AAAI 2025): HDM, then ATMoE, both over the subsets of the modalities.

Shape letters: B batch, M modalities, S subsets (7 for three modalities), N patches, C channels, H heads, D = C / H.
Tensors only: this file knows neither the configuration nor the backbone.
"""

import torch
from timm.layers.activations import QuickGELU
from torch import Tensor, nn

from modeling.batch_norm import SyncedBatchNorm1d
from utils.modalities import MODALITIES

LETTERS = {m[0].lower(): m for m in MODALITIES}
SUBSETS = ("r", "n", "t", "rn", "rt", "nt", "rnt")
"""Every non-empty subset of the modalities, by initials, in the order in which features are joined."""


class HDM(nn.Module):
    """Hierarchical decoupling module: one learned query for each subset attends to the tokens of its modalities.

    The query is the learned token alone; keys and values are, for each modality of the subset, its global and its
    patches. There is no residual and no normalisation.
    """

    def __init__(self, embed_dim: int, num_heads: int = 8, dropout: float = 0.1):
        super().__init__()
        self.queries = nn.ParameterDict({s: nn.Parameter(torch.randn(embed_dim) * embed_dim**-0.5) for s in SUBSETS})
        self.attention = nn.ModuleDict(
            {s: nn.MultiheadAttention(embed_dim, num_heads, dropout=dropout, batch_first=True) for s in SUBSETS}
        )

    def forward(self, patches: dict[str, Tensor], globals_: dict[str, Tensor]) -> Tensor:
        """Per modality patches (B, N, C) and globals (B, C) -> one feature per subset (S, B, C)."""
        tokens = {m: torch.cat([globals_[m].unsqueeze(1), patches[m]], dim=1) for m in MODALITIES}
        features = []
        for subset in SUBSETS:
            context = torch.cat([tokens[LETTERS[letter]] for letter in subset], dim=1)
            query = self.queries[subset].to(context.dtype).expand(context.shape[0], 1, -1)
            features.append(self.attention[subset](query, context, context, need_weights=False)[0].squeeze(1))
        return torch.stack(features)


class Gate(nn.Module):
    """Attention from all features together to each of them, (S, B, C) -> weights (B, H, S) that sum to one over S."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Sequential(
            nn.Linear(len(SUBSETS) * embed_dim, embed_dim), QuickGELU(), SyncedBatchNorm1d(embed_dim)
        )
        self.q = nn.Linear(embed_dim, embed_dim, bias=False)
        self.k = nn.Linear(embed_dim, embed_dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        query = self.q(self.query(torch.cat(tuple(features), dim=-1))).unflatten(-1, (self.num_heads, -1))  # (B, H, D)
        key = self.k(features).unflatten(-1, (self.num_heads, -1))  # (S, B, H, D)
        return (torch.einsum("bhd,sbhd->bhs", query, key) * key.shape[-1] ** -0.5).softmax(dim=-1)


class ATMoE(nn.Module):
    """Attention-triggered mixture of experts: in every head, one expert for each subset, weighed by the gate."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}, expected a divisor of the feature width {embed_dim}")
        width = embed_dim // num_heads
        self.num_heads = num_heads
        self.gate = Gate(embed_dim, num_heads)
        self.experts = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(nn.Linear(width, width), QuickGELU(), SyncedBatchNorm1d(width)) for _ in SUBSETS
            )
            for _ in range(num_heads)
        )

    def forward(self, features: Tensor) -> Tensor:
        """features (S, B, C) -> (B, S * C), ordered by (subset, head, channel)."""
        weight = self.gate(features)  # (B, H, S)
        slices = features.unflatten(-1, (self.num_heads, -1))  # (S, B, H, D)
        mixed = [
            torch.cat(
                [weight[:, h, s, None] * self.experts[h][s](slices[s, :, h]) for h in range(self.num_heads)], dim=-1
            )
            for s in range(len(SUBSETS))
        ]
        return torch.cat(mixed, dim=-1)


class Fusion(nn.Module):
    """HDM, then ATMoE: per modality patches (B, N, C) and globals (B, C) -> branch feature (B, S * C)."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.hdm = HDM(embed_dim)
        self.moe = ATMoE(embed_dim, num_heads)
        self.feature_dim = len(SUBSETS) * embed_dim

    def forward(self, patches: dict[str, Tensor], globals_: dict[str, Tensor]) -> Tensor:
        return self.moe(self.hdm(patches, globals_))
