"""How single queries fare: average precision, first match, nearest entries; which of them are worth a look.

Shape letters: Q queries, G gallery entries.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from utils.errors import UserError

ROWS = 256  # queries sorted at once
BINS = 50


@dataclass(frozen=True)
class Ranking:
    """Every query's gallery, nearest first.

    Attributes:
        distance: (Q, G).
        same: (Q, G) bool, entries of the query's identity.
        left_out: (Q, G) bool, entries that the protocol takes out of that query's gallery.
        precision: (Q,) average precision in [0, 1]; NaN where no match is left.
        first: (Q,) rank of the first match, from 1; 0 where there is none.
        margin: (Q,) by how much the nearest other identity is further than the farthest match; decides between queries
            of equal precision.
    """

    distance: Tensor
    same: Tensor
    left_out: Tensor
    precision: Tensor
    first: Tensor
    margin: Tensor

    def nearest(self, query: int, count: int) -> list[int]:
        """Gallery indices of the query's first entries."""
        order = self.distance[query].masked_fill(self.left_out[query], torch.inf).argsort(stable=True)
        allowed = int((~self.left_out[query]).sum())
        return order[: min(count, allowed)].tolist()


def rank_queries(distance: Tensor, q_pid: Tensor, g_pid: Tensor, q_place: Tensor, g_place: Tensor) -> Ranking:
    """Scores each query; entries of its identity from its own place (camera or scene) are left out.

    Args:
        distance: (Q, G), smaller is nearer.
        q_pid, q_place: (Q,); g_pid, g_place: (G,).
    """
    distance = distance.float().cpu()
    same = q_pid[:, None] == g_pid
    left_out = same & (q_place[:, None] == g_place)
    matches = same & ~left_out
    place = torch.arange(1, distance.shape[1] + 1, dtype=torch.float64)
    precision, first = [], []
    for rows in torch.arange(len(distance)).split(ROWS):
        order = distance[rows].masked_fill(left_out[rows], torch.inf).argsort(dim=1, stable=True)
        hits = matches[rows].gather(1, order)
        found = hits.cumsum(dim=1)
        precision.append((hits * found / place).sum(dim=1) / hits.sum(dim=1))  # 0 / 0 is NaN
        first.append(torch.where(hits.any(dim=1), hits.int().argmax(dim=1) + 1, 0))
    farthest = distance.masked_fill(~matches, -torch.inf).amax(dim=1)
    margin = distance.masked_fill(same, torch.inf).amin(dim=1) - farthest
    return Ranking(distance, same, left_out, torch.cat(precision), torch.cat(first), margin)


def choose_queries(ranking: Ranking, pids: Tensor, count: int = 3) -> dict[str, list[int]]:
    """Queries to look at: the worst, those nearest to the median precision, and the best, `count` of each.

    No query is in two groups, and no identity twice in one as long as there are enough of them.
    """
    scored = [i for i in range(len(pids)) if not ranking.precision[i].isnan()]
    order = sorted(scored, key=lambda i: (float(ranking.precision[i]), float(ranking.margin[i])))
    middle = len(order) // 2
    by_middle = sorted(range(len(order)), key=lambda rank: abs(rank - middle))
    candidates = {"worst": order, "best": order[::-1], "typical": [order[rank] for rank in by_middle]}
    taken: set[int] = set()
    chosen: dict[str, list[int]] = {}
    for name, queries in candidates.items():
        free = [q for q in queries if q not in taken]
        first_of_identity = list({int(pids[q]): q for q in reversed(free)}.values())[::-1]
        first_of_identity.sort(key=free.index)
        chosen[name] = (first_of_identity + [q for q in free if q not in first_of_identity])[:count]
        taken |= set(chosen[name])
    return {name: chosen[name] for name in ("best", "typical", "worst")}


@dataclass(frozen=True)
class Separation:
    """Distances of pairs that count: densities (BINS,) from `low` to `high`, and the share of (same, other) pairs of
    pairs in which the same identity is nearer."""

    low: float
    high: float
    same: Tensor
    other: Tensor
    ordered: float


def separate(distance: Tensor, same: Tensor, left_out: Tensor) -> Separation:
    """Compares the distances (Q, G) of same-identity pairs with those of other pairs.

    Raises:
        UserError: there are no such pairs.
    """
    pairs = [distance[same & ~left_out], distance[~same]]
    if not all(len(p) for p in pairs):
        raise UserError("the test images show one identity only: there is nothing to tell apart.")
    low, high = (float(f(torch.stack([f(p) for p in pairs]))) for f in (torch.amin, torch.amax))
    high = max(high, low + 1e-6)
    fine = [torch.histc(p, BINS * 50, low, high).double() for p in pairs]
    fine = [counts / counts.sum() for counts in fine]
    before = fine[0].cumsum(0) - fine[0] / 2  # equal distances count by half
    same_density, other_density = (counts.view(BINS, -1).sum(dim=1) for counts in fine)
    return Separation(low, high, same_density, other_density, float((before * fine[1]).sum()))
