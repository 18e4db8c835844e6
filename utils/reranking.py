"""k-reciprocal re-ranking (Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017).

Shape letters: Q queries, G gallery entries, n = Q + G, D channels.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError
from utils.metrics import one_thread, pairwise_distance

CHUNK = 512  # rows of an n x n matrix worked on at once


class Rows(NamedTuple):
    """A sparse matrix by rows: row i holds the entries `start[i]` to `start[i + 1]` of `column` and `value`."""

    start: Tensor
    column: Tensor
    value: Tensor


def re_ranking(
    query_features: Tensor | np.ndarray,
    gallery_features: Tensor | np.ndarray,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
) -> Tensor:
    """Distances (Q, G) that mix squared Euclidean distance with how much the neighbourhoods of two images overlap.

    Runs where the features are. At 1,715 queries, 8,575 gallery entries and 5,120 channels the one large allocation
    is the n x n float32 matrix of 424 MB; the encoding itself is sparse.

    Args:
        query_features, gallery_features: (Q, D) and (G, D).
        k1: neighbours that are looked at for reciprocity.
        k2: neighbours, the image itself included, whose encodings are averaged (local query expansion); 1 turns it off.
        lambda_value: weight of the original distance, the rest goes to the Jaccard distance.

    Raises:
        UserError: features that are not finite, or parameters out of range.
    """
    if k1 < 1 or k2 < 1 or not 0 <= lambda_value <= 1:
        raise UserError(f"k1 {k1} and k2 {k2} must be at least 1, lambda_value {lambda_value} in [0, 1]")
    query, gallery = (torch.as_tensor(features).float() for features in (query_features, gallery_features))
    if not all(torch.linalg.vector_norm(features, dim=1).isfinite().all() for features in (query, gallery)):
        raise UserError("the features hold NaN or infinity: they cannot be ranked")

    queries = len(query)
    distance = normalised_distance(query, gallery)
    with one_thread():
        nearest = _nearest(distance, max(k1 + 1, k2))
        encoding = _encode(distance, nearest, k1)
        distance = distance[:queries, queries:].clone()
        encoding = _average(encoding, nearest[:, :k2])
        return distance.mul_(lambda_value).add_(_jaccard_distance(encoding, queries), alpha=1 - lambda_value)


def normalised_distance(query: Tensor, gallery: Tensor) -> Tensor:
    """Squared Euclidean distances (n, n) over query and gallery, each row divided by its maximum.

    Only half of the products are computed, and the features are never joined: they are half as large as the result.
    """
    n = len(query) + len(gallery)
    distance = query.new_empty(n, n)
    for i in range(0, len(query), CHUNK):
        _fill(distance, query[i : i + CHUNK], i, query[i:], i)
        _fill(distance, query[i : i + CHUNK], i, gallery, len(query))
    for i in range(0, len(gallery), CHUNK):
        _fill(distance, gallery[i : i + CHUNK], len(query) + i, gallery[i:], len(query) + i)
    distance.fill_diagonal_(0)
    return distance.div_(distance.amax(dim=1, keepdim=True).clamp_min_(torch.finfo(distance.dtype).tiny))


def _fill(distance: Tensor, a: Tensor, row: int, b: Tensor, column: int) -> None:
    """Writes the distances from a to b and from b to a into a matrix where a starts at `row` and b at `column`."""
    block = pairwise_distance(a, b)
    distance[row : row + len(a), column : column + len(b)] = block
    distance[column : column + len(b), row : row + len(a)] = block.T


def _nearest(distance: Tensor, k: int) -> Tensor:
    """The k nearest of each row, (n, k) indices, the image itself always first."""
    distance.fill_diagonal_(-1)
    nearest = distance.topk(min(k, len(distance)), dim=1, largest=False).indices
    distance.fill_diagonal_(0)
    return nearest


def _reciprocal(nearest: Tensor) -> Tensor:
    """For each of the k nearest of an image, (n, k), whether that image is among the k nearest of the neighbour too."""
    own = torch.arange(len(nearest), device=nearest.device).split(CHUNK)
    return torch.cat([(nearest[nearest[rows]] == rows[:, None, None]).any(dim=2) for rows in own])


def _encode(distance: Tensor, nearest: Tensor, k1: int) -> Rows:
    """The k-reciprocal encoding V (n, n): weights exp(-d) over the expanded reciprocal set of each image, sum 1.

    The reciprocal set among the k1 + 1 nearest takes in the smaller reciprocal set (round(k1 / 2) + 1 nearest) of each
    of its members, where more than two thirds of that set lie in the image's own.
    """
    n = len(nearest)
    nearest, near = nearest[:, : k1 + 1], nearest[:, : round(k1 / 2) + 1]
    nowhere = torch.tensor(n, device=nearest.device)  # a column past the end: marks what is not a member
    members = torch.where(_reciprocal(nearest), nearest, nowhere)
    core = torch.where(_reciprocal(near), near, nowhere)
    core = torch.cat([core, nowhere.expand(1, core.shape[1])])  # the set of "nowhere" is empty
    columns, values, sizes = [], [], []
    for start in range(0, n, CHUNK):
        own = members[start : start + CHUNK]  # (rows, k1 + 1)
        offered = core[own]  # (rows, k1 + 1, near)
        in_set = torch.zeros(len(own), n + 1, dtype=torch.bool, device=own.device).scatter_(1, own, True)
        in_set[:, n] = False
        shared = in_set.gather(1, offered.flatten(1)).view_as(offered).sum(dim=2)
        accepted = 3 * shared > 2 * (offered != n).sum(dim=2)
        in_set.scatter_(1, torch.where(accepted[..., None], offered, nowhere).flatten(1), True)
        in_set = in_set[:, :n]
        row, column = in_set.nonzero(as_tuple=True)
        weight = torch.exp(-distance[start + row, column])
        total = weight.new_zeros(len(own)).index_add_(0, row, weight)
        columns.append(column)
        values.append(weight / total[row])
        sizes.append(row.bincount(minlength=len(own)))
    return Rows(_starts(torch.cat(sizes)), torch.cat(columns), torch.cat(values))


def _average(encoding: Rows, nearest: Tensor) -> Rows:
    """Local query expansion: the mean of the encodings of each image's k2 nearest, (n, k2) indices."""
    n, k2 = nearest.shape
    columns, values, sizes = [], [], []
    for rows in nearest.split(CHUNK):
        source, entry = _entries(encoding.start, rows.flatten())
        mean = encoding.value.new_zeros(len(rows) * n)
        mean.index_add_(0, source // k2 * n + encoding.column[entry], encoding.value[entry] / k2)
        mean = mean.view(len(rows), n)
        row, column = mean.nonzero(as_tuple=True)
        columns.append(column)
        values.append(mean[row, column])
        sizes.append(row.bincount(minlength=len(rows)))
    return Rows(_starts(torch.cat(sizes)), torch.cat(columns), torch.cat(values))


def _jaccard_distance(encoding: Rows, queries: int) -> Tensor:
    """1 - m / (2 - m), (Q, G), where m is the sum of the elementwise minima of two encodings."""
    n = len(encoding.start) - 1
    row = torch.repeat_interleave(torch.arange(n, device=encoding.start.device), encoding.start.diff())
    split = encoding.start[queries]  # the entries of the gallery begin here
    order = encoding.column[split:].argsort(stable=True)
    by_column = Rows(  # row: a column of the encoding, column: a position in the gallery
        _starts(encoding.column[split:].bincount(minlength=n)),
        row[split:][order] - queries,
        encoding.value[split:][order],
    )
    gallery = n - queries
    overlap = encoding.value.new_zeros(queries * gallery)
    for i in range(0, queries, CHUNK // 16):
        own = slice(encoding.start[i], encoding.start[min(i + CHUNK // 16, queries)])
        source, entry = _entries(by_column.start, encoding.column[own])
        shared = torch.minimum(encoding.value[own][source], by_column.value[entry])
        overlap.index_add_(0, row[own][source] * gallery + by_column.column[entry], shared)
    overlap = overlap.view(queries, gallery)
    return 1 - overlap / (2 - overlap)


def _starts(sizes: Tensor) -> Tensor:
    """Where each row begins, and at the end where the last one stops: (n,) sizes -> (n + 1,)."""
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


def _entries(start: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """All entries of the listed rows, in order: for each the position in `rows` that it comes from, and its index."""
    sizes = start[rows + 1] - start[rows]
    source = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), sizes)
    shift = start[rows] - (sizes.cumsum(0) - sizes)
    return source, torch.arange(len(source), device=rows.device) + shift[source]
