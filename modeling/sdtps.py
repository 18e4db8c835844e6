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
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.per_modality import linear, norm_linear
from modeling.precision import product
from modeling.regions import is_compiled
from utils.modalities import MODALITIES

NORM_FLOOR = 1e-4
"""A vector shorter than this counts as absent: its similarities are zero and pass no gradient."""
RANGE_FLOOR = 1e-2
"""Smallest range by which min-max normalisation divides."""


@dataclass
class Choice:
    """Which patches were chosen, modality first, and by what scores."""

    scores: Tensor
    """(M, B, N) importance s."""
    predicted: Tensor
    """(M, B, N) the predictor's part of it, in (0, 1)."""
    kept: Tensor
    """(M, B, K) indices of the kept patches, best first."""
    dropped: Tensor
    """(M, B, N - K) indices of the others."""


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


def min_max(similarity: Tensor) -> Tensor:
    """Rescales (..., N) to [0, 1] over the patches of each sample; a flat row becomes zeros."""
    low, high = similarity.amin(-1, keepdim=True), similarity.amax(-1, keepdim=True)
    return (similarity - low) / (high - low).clamp_min(RANGE_FLOOR)


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Picks tokens (..., N, C) by index (..., K) along the patch axis -> (..., K, C)."""
    return tokens.gather(-2, index.unsqueeze(-1).expand(*index.shape, tokens.shape[-1]))


def fuse_dropped(tokens: Tensor, choice: Choice) -> Tensor:
    """The dropped of the tokens (M, B, N, C), weighted by the softmax of their scores -> (M, B, 1, C), or (M, B, 0, C)
    if nothing was dropped."""
    scores, dropped = choice.scores, choice.dropped
    if dropped.shape[-1] == 0:
        return tokens[..., :0, :]
    share = torch.zeros_like(scores).scatter(-1, dropped, scores.gather(-1, dropped).softmax(-1))
    with torch.autocast(tokens.device.type, enabled=False):  # tokens in float32 may be too large for fp16
        return share.unsqueeze(-2).to(tokens.dtype) @ tokens


def best_first(scores: Tensor) -> Tensor:
    """Indices that sort scores (..., N) in descending order; equal ones stay in their order."""
    return scores.sort(dim=-1, descending=True, stable=True).indices


@torch.library.custom_op("sdtps::best_first", mutates_args=())
def opaque_best_first(scores: Tensor) -> Tensor:
    """The same, kept out of compiled code: a sorting network of the compiler's own takes it a minute to build."""
    return best_first(scores)


@opaque_best_first.register_fake
def _(scores: Tensor) -> Tensor:
    return torch.empty_like(scores, dtype=torch.long, memory_format=torch.contiguous_format)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _fixed_noise(like: Tensor) -> Tensor:
    """Uniform noise of a tensor's shape (M, B, N): always the same, whatever the device, and for a longer batch too."""
    modalities, batch, patches = like.shape
    noise = torch.rand(batch, modalities, patches, generator=torch.Generator().manual_seed(0))
    return noise.transpose(0, 1).to(like)


class TokenAggregator(nn.Module):
    """What one modality needs to mix its kept tokens into A, see `mix_tokens`."""

    def __init__(self, embed_dim: int, num_tokens: int):
        super().__init__()
        hidden = max(1, int(embed_dim * 0.2))
        self.norm = nn.LayerNorm(embed_dim)
        self.fc1 = nn.Linear(embed_dim, hidden)
        self.fc2 = nn.Linear(hidden, num_tokens)
        self.scale = nn.Parameter(torch.ones(()))


def mix_tokens(aggregators: Iterable[TokenAggregator], tokens: Tensor, importance: Tensor | None = None) -> Tensor:
    """W = softmax over K of (scale * MLP(LN(v)) + importance), output W^T v, for each modality with its own aggregator.

    Args:
        tokens: (M, B, K, C).
        importance: (M, B, K), added to every row of logits.

    Returns:
        (M, B, A, C)
    """
    parts = list(aggregators)
    hidden = F.gelu(norm_linear((part.norm for part in parts), (part.fc1 for part in parts), tokens))
    scale = torch.stack([part.scale for part in parts])[:, None, None, None]
    logits = scale * linear((part.fc2 for part in parts), hidden)  # (M, B, K, A)
    if importance is not None:
        logits = logits + importance.unsqueeze(-1)
    return product(logits.softmax(dim=2).transpose(2, 3), tokens)


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
        v, g = (torch.stack([x[m] for m in MODALITIES]) for x in (tokens, globals_))
        return self.select(v, g, present)

    def select(self, v: Tensor, g: Tensor, present: Tensor | None = None) -> Selection:
        """`forward` on tokens (M, B, N, C) and globals (M, B, C) of all modalities, in the order of MODALITIES."""
        if v.shape[2] != self.num_patches:
            raise ValueError(f"got {v.shape[2]} patch tokens, this SDTPS was built for {self.num_patches}")
        v = _at_least_float32(v)  # once for both halves
        choice = self.decide(v, g, present)
        return self.aggregate(v, choice, present)

    def decide(self, v: Tensor, g: Tensor, present: Tensor | None = None) -> Choice:
        """Scores and chooses: the first half of `select`, for patches that have a way to go before they are mixed."""
        with torch.autocast(v.device.type, enabled=False):
            v, g = _at_least_float32(v), _at_least_float32(g)
            scores, predicted = self.score(v, g, present)
            return Choice(scores, predicted, *self.choose(scores))

    def aggregate(self, v: Tensor, choice: Choice, present: Tensor | None = None) -> Selection:
        """What comes of the patches v (M, B, N, C) by a given choice: the second half of `select`."""
        with torch.autocast(v.device.type, enabled=False):
            v = _at_least_float32(v)
            return self.finish(choice, gather_tokens(v, choice.kept), fuse_dropped(v, choice), present)

    def finish(self, choice: Choice, kept: Tensor, fused: Tensor, present: Tensor | None = None) -> Selection:
        """`aggregate`, where the kept and the dropped patches are apart already.

        Args:
            choice: of `decide`.
            kept: (M, B, K, C) the kept patches, in its order.
            fused: (M, B, 1, C) the dropped ones as one token, or (M, B, 0, C); see `fuse_dropped`.
            present: as in `forward`.
        """
        with torch.autocast(kept.device.type, enabled=False):
            out = self.mix(_at_least_float32(kept), choice.scores.gather(-1, choice.kept))
            out = torch.cat([out, _at_least_float32(fused)], dim=-2)
            if present is not None:
                out = torch.where(present.T[:, :, None, None], out, 0.0)
        mask = torch.zeros_like(choice.scores, dtype=torch.bool).scatter(-1, choice.kept, True)
        fields = (out, mask, choice.scores, choice.predicted, choice.kept)
        return Selection(*(dict(zip(MODALITIES, field.unbind(0), strict=True)) for field in fields))

    def score(self, v: Tensor, g: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Importance of every patch, v (M, B, N, C) and g (M, B, C) -> scores and predictor's part, (M, B, N) each."""
        first, second = ([self.predictor[m][i] for m in MODALITIES] for i in (0, 2))
        predicted = linear(second, F.gelu(linear(first, v))).squeeze(-1).sigmoid()
        similarity = min_max(self._similarity(v, g))
        if self.score_grad != "all":
            similarity = similarity.detach()
        weight = self._similarity_weights(v, present)  # (M, B, M, 1)
        scores = (1 - 2 * self.beta) * predicted + (weight * similarity).sum(2)
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
        order = (opaque_best_first if is_compiled(self) else best_first)(ranked)
        return order[..., : self.num_kept], order[..., self.num_kept :]

    def mix(self, kept: Tensor, scores: Tensor) -> Tensor:
        """Kept patches (M, B, K, C) and their scores (M, B, K) -> aggregated tokens (M, B, A, C)."""
        importance = scores / self.temperature if self.temperature > 0 else None
        return mix_tokens(self.aggregator.values(), kept, importance)

    def _similarity(self, v: Tensor, g: Tensor) -> Tensor:
        """Similarity of the patches of each modality m to the global of each modality o -> (M, B, M, N)."""
        v_norm, g_norm = torch.linalg.vector_norm(v, dim=-1), torch.linalg.vector_norm(g, dim=-1, keepdim=True)
        v_there, g_there = v_norm >= NORM_FLOOR, g_norm >= NORM_FLOOR
        if self.similarity == "cosine":
            query, keys = g / torch.where(g_there, g_norm, 1.0), v
            divisor = torch.where(v_there, v_norm, 1.0)
        else:
            query, keys = linear(self.query.values(), g), linear(self.key.values(), v)
            divisor = torch.full_like(v_norm, keys.shape[-1] ** 0.5)
        query = torch.where(g_there, query, 0.0).transpose(0, 1)  # (B, M, C)
        similarity = query @ keys.transpose(-1, -2) / divisor.unsqueeze(2)  # patches (M, B, N, C) to (B, M, C)
        return torch.where(v_there.unsqueeze(2), similarity, 0.0)

    def _similarity_weights(self, v: Tensor, present: Tensor | None) -> Tensor:
        """b for another modality, 2b for the own one (M, B, M, 1); an absent one's goes to the rest in proportion."""
        weight = self.beta * (1 + torch.eye(len(MODALITIES), dtype=v.dtype, device=v.device))
        weight = weight.unsqueeze(1).expand(-1, v.shape[1], -1)  # (M, B, M)
        if present is not None:
            remaining = weight * present.to(v.dtype)  # column o vanishes where o is absent
            total = remaining.sum(2, keepdim=True)
            share = remaining * weight.sum(2, keepdim=True) / total.clamp_min(1e-12)
            weight = torch.where(total > 0, share, 0.0)
        return weight.unsqueeze(-1)
