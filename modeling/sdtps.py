"""SDTPS: sparse and dense token-aware patch selection over three aligned modalities.

Follows SEPS (sparse and dense text-aware patch selection for image-text retrieval), with the two other modalities in
the place of the sparse and the dense text, and with scores that stay attached to the graph:

1. score      s = (1 - 2b) * s_pred + b * (s_other1 + s_other2 + 2 * s_own)
2. sparsify   keep the K best patches, fuse the dropped ones into one extra token
3. aggregate  A tokens, each a convex combination of the kept patches: softmax over patches of (MLP + s / tau)

A hard top-k passes no gradient, so scores that only choose cannot learn from what was kept. Here the scores also weight
the kept patches (s / tau), which makes the output a differentiable, bounded function of all four terms of the score
once the choice is made.

Shape letters: B batch, M modalities, N patches, K kept, A aggregated, C channels. Tensors only: this file knows
neither the configuration nor the backbone.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.modalities import MODALITIES

NORM_FLOOR = 1e-4
"""A vector shorter than this counts as absent: its similarities are zero and pass no gradient."""
RANGE_FLOOR = 1e-2
"""Smallest range by which min-max normalisation divides."""


@dataclass
class Selection:
    """What SDTPS chose and made of it; every field maps a modality's name to its tensor."""

    tokens: dict[str, Tensor]
    """(B, A + 1, C) aggregated tokens, then the fused dropped ones; (B, A, C) if nothing was dropped."""
    mask: dict[str, Tensor]
    """(B, N) bool, True where the patch was kept."""
    scores: dict[str, Tensor]
    """(B, N) importance s."""
    predicted: dict[str, Tensor]
    """(B, N) the predictor's part of it, in (0, 1)."""
    kept: dict[str, Tensor]
    """(B, K) indices of the kept patches, best first."""


def token_counts(num_patches: int, sparse_ratio: float, aggr_ratio: float) -> tuple[int, int]:
    """Number of kept and of aggregated tokens: K = ceil(N * sparse_ratio), A = max(1, floor(K * aggr_ratio)).

    Ratios are read as the decimals they are written as, so that 100 * 0.07 is 7 and not 7.000000000000001.

    Raises:
        ValueError: a ratio lies outside (0, 1].
    """
    for name, ratio in (("sparse_ratio", sparse_ratio), ("aggr_ratio", aggr_ratio)):
        if not 0 < ratio <= 1:
            raise ValueError(f"{name} is {ratio}, expected a value in (0, 1]")
    kept = math.ceil(num_patches * Fraction(str(sparse_ratio)))
    return kept, max(1, math.floor(kept * Fraction(str(aggr_ratio))))


def drop_absent(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Zeroes the vectors (..., C) shorter than `NORM_FLOOR`, cutting their gradient.

    Returns:
        The vectors, and their norms (..., 1) with 1 in the place of those that were dropped.
    """
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    present = norm >= NORM_FLOOR
    return torch.where(present, vectors, 0.0), torch.where(present, norm, 1.0)


def min_max(similarity: Tensor) -> Tensor:
    """Rescales (..., N) to [0, 1] over the patches of each sample; a flat row becomes zeros."""
    low, high = similarity.amin(-1, keepdim=True), similarity.amax(-1, keepdim=True)
    return (similarity - low) / (high - low).clamp_min(RANGE_FLOOR)


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Picks tokens (..., N, C) by index (..., K) along the patch axis -> (..., K, C)."""
    return tokens.gather(-2, index.unsqueeze(-1).expand(*index.shape, tokens.shape[-1]))


def _fixed_noise(like: Tensor) -> Tensor:
    """Uniform noise of a tensor's shape (M, B, N): always the same, whatever the device, and for a longer batch too."""
    modalities, batch, patches = like.shape
    noise = torch.rand(batch, modalities, patches, generator=torch.Generator().manual_seed(0))
    return noise.transpose(0, 1).to(like)


class TokenAggregator(nn.Module):
    """Mixes K kept tokens into A: W = softmax over K of (scale * MLP(LN(v)) + bias), output W^T v."""

    def __init__(self, embed_dim: int, num_tokens: int):
        super().__init__()
        hidden = max(1, int(embed_dim * 0.2))
        self.norm = nn.LayerNorm(embed_dim)
        self.fc1 = nn.Linear(embed_dim, hidden)
        self.fc2 = nn.Linear(hidden, num_tokens)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, tokens: Tensor, importance: Tensor | None = None) -> Tensor:
        """tokens (B, K, C), importance (B, K) added to every row of logits -> (B, A, C)."""
        logits = self.scale * self.fc2(F.gelu(self.fc1(self.norm(tokens))))
        if importance is not None:
            logits = logits + importance.unsqueeze(-1)
        return logits.softmax(dim=1).transpose(1, 2) @ tokens


class SDTPS(nn.Module):
    """Scores, sparsifies and aggregates the patch tokens of each modality.

    Args:
        embed_dim: C, width of tokens and globals.
        num_patches: N.
        sparse_ratio: share of patches kept, in (0, 1].
        aggr_ratio: aggregated tokens per kept one, in (0, 1].
        beta: weight b of each other modality's similarity, in [0, 0.5]; the own one counts twice.
        temperature: tau; 0 leaves the scores out of the aggregation, so that they only choose.
        score_grad: "all" attaches the four terms of the score; "predictor" detaches the similarities; "none" detaches
            the whole score. Forward values are the same.
        similarity: "cosine", or "attention": a learned query from each global, keys from the patches.
        use_gumbel: in training, sample the kept set by Gumbel top-k instead of taking the best.
        gumbel_tau: temperature of that sampling: noise is added to s / gumbel_tau.
        choice: "best" keeps the K patches of the highest scores; "random" any K of each image and modality, the control
            that tells what the choice is worth. Everything else stays: scores still weigh the kept.

    Raises:
        ValueError: an argument lies outside its range.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_patches: int,
        sparse_ratio: float = 0.5,
        aggr_ratio: float = 0.4,
        beta: float = 0.25,
        temperature: float = 0.3,
        score_grad: str = "all",
        similarity: str = "cosine",
        use_gumbel: bool = False,
        gumbel_tau: float = 1.0,
        choice: str = "best",
    ):
        super().__init__()
        if not 0 <= beta <= 0.5:
            raise ValueError(f"beta is {beta}, expected a value in [0, 0.5]")
        if temperature < 0 or gumbel_tau <= 0:
            raise ValueError(f"temperature is {temperature} (expected >= 0), gumbel_tau {gumbel_tau} (expected > 0)")
        if score_grad not in ("all", "predictor", "none"):
            raise ValueError(f"score_grad is {score_grad!r}, expected 'all', 'predictor' or 'none'")
        if similarity not in ("cosine", "attention"):
            raise ValueError(f"similarity is {similarity!r}, expected 'cosine' or 'attention'")
        if choice not in ("best", "random"):
            raise ValueError(f"choice is {choice!r}, expected 'best' or 'random'")
        self.num_patches = num_patches
        self.num_kept, self.num_aggregated = token_counts(num_patches, sparse_ratio, aggr_ratio)
        self.beta, self.temperature, self.score_grad = beta, temperature, score_grad
        self.similarity, self.use_gumbel, self.gumbel_tau = similarity, use_gumbel, gumbel_tau
        self.choice = choice

        hidden = max(1, embed_dim // 4)
        self.predictor = nn.ModuleDict(
            {m: nn.Sequential(nn.Linear(embed_dim, hidden), nn.GELU(), nn.Linear(hidden, 1)) for m in MODALITIES}
        )
        self.aggregator = nn.ModuleDict({m: TokenAggregator(embed_dim, self.num_aggregated) for m in MODALITIES})
        if similarity == "attention":
            self.query = nn.ModuleDict({m: nn.Linear(embed_dim, hidden, bias=False) for m in MODALITIES})
            self.key = nn.ModuleDict({m: nn.Linear(embed_dim, hidden, bias=False) for m in MODALITIES})

    def forward(
        self, tokens: dict[str, Tensor], globals_: dict[str, Tensor], present: Tensor | None = None
    ) -> Selection:
        """Selects and aggregates.

        Half inputs are promoted to float32, float64 ones stay (with a float64 module); autocast is off inside.

        Args:
            tokens: per modality (B, N, C) patch tokens.
            globals_: per modality (B, C) global features, in the space of the patches.
            present: (B, M) bool, which modalities each sample has; all of them if None. An absent modality gives no
                score to the others (its weight is shared among the remaining similarities) and zeros as its tokens.

        Raises:
            ValueError: the number of patches is not the one given at construction.
        """
        v = torch.stack([tokens[m] for m in MODALITIES])  # (M, B, N, C)
        g = torch.stack([globals_[m] for m in MODALITIES])  # (M, B, C)
        if v.shape[2] != self.num_patches:
            raise ValueError(f"got {v.shape[2]} patch tokens, this SDTPS was built for {self.num_patches}")
        dtype = torch.promote_types(v.dtype, torch.float32)
        with torch.autocast(v.device.type, enabled=False):
            v, g = v.to(dtype), g.to(dtype)
            scores, predicted = self.score(v, g, present)
            kept, dropped = self.choose(scores)
            out = self.aggregate(v, scores, kept, dropped)
            if present is not None:
                out = torch.where(present.T[:, :, None, None], out, 0.0)
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, kept, True)
        fields = (out, mask, scores, predicted, kept)
        return Selection(*(dict(zip(MODALITIES, field.unbind(0), strict=True)) for field in fields))

    def score(self, v: Tensor, g: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Importance of every patch, v (M, B, N, C) and g (M, B, C) -> scores and predictor's part, (M, B, N) each."""
        predicted = torch.stack([self.predictor[m](v[i]).squeeze(-1).sigmoid() for i, m in enumerate(MODALITIES)])
        similarity = min_max(self._similarity(v, g))  # (M, M, B, N): patches of m to the global of o
        if self.score_grad != "all":
            similarity = similarity.detach()
        weight = self._similarity_weights(v, present)  # (M, M, B)
        scores = (1 - 2 * self.beta) * predicted + (weight.unsqueeze(-1) * similarity).sum(1)
        return (scores.detach() if self.score_grad == "none" else scores), predicted

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Splits the patches by score (M, B, N) -> indices of the kept (M, B, K) and the dropped (M, B, N - K).

        A random choice hangs on nothing but the place in the batch in evaluation, so that it is the same in every run.
        """
        ranked = scores.detach()
        if self.choice == "random":
            ranked = torch.rand_like(ranked) if self.training else _fixed_noise(ranked)
        elif self.use_gumbel and self.training:
            ranked = ranked / self.gumbel_tau - torch.empty_like(ranked).exponential_().log()
        order = ranked.sort(dim=-1, descending=True, stable=True).indices
        return order[..., : self.num_kept], order[..., self.num_kept :]

    def aggregate(self, v: Tensor, scores: Tensor, kept: Tensor, dropped: Tensor) -> Tensor:
        """Output tokens of a given choice, (M, B, A + 1, C), or (M, B, A, C) if no patch was dropped."""
        v_kept = gather_tokens(v, kept)
        bias = scores.gather(-1, kept) / self.temperature if self.temperature > 0 else None
        out = torch.stack(
            [self.aggregator[m](v_kept[i], None if bias is None else bias[i]) for i, m in enumerate(MODALITIES)]
        )
        if dropped.shape[-1] == 0:
            return out
        share = scores.gather(-1, dropped).softmax(-1).unsqueeze(-2)  # (M, B, 1, N - K)
        return torch.cat([out, share @ gather_tokens(v, dropped)], dim=-2)

    def _similarity(self, v: Tensor, g: Tensor) -> Tensor:
        """Similarity of the patches of each modality m to the global of each modality o -> (M, M, B, N)."""
        (v, v_norm), (g, g_norm) = drop_absent(v), drop_absent(g)
        if self.similarity == "cosine":
            key, query = v / v_norm, g / g_norm
        else:
            key = torch.stack([self.key[m](v[i]) for i, m in enumerate(MODALITIES)])
            query = torch.stack([self.query[m](g[i]) for i, m in enumerate(MODALITIES)]) / key.shape[-1] ** 0.5
        return torch.einsum("mbnc,obc->mobn", key, query)

    def _similarity_weights(self, v: Tensor, present: Tensor | None) -> Tensor:
        """b for another modality, 2b for the own one (M, M, B); an absent one's goes to the rest in proportion."""
        weight = self.beta * (1 + torch.eye(len(MODALITIES), dtype=v.dtype, device=v.device))
        weight = weight.unsqueeze(-1).expand(-1, -1, v.shape[1])
        if present is None:
            return weight
        remaining = weight * present.T.to(v.dtype)  # (M, M, B): column o vanishes where o is absent
        total = remaining.sum(1, keepdim=True)
        return torch.where(total > 0, remaining * weight.sum(1, keepdim=True) / total.clamp_min(1e-12), 0.0)
