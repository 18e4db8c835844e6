"""Ranking metrics of re-identification: cumulative matching characteristics (CMC) and mean average precision (mAP).

Shape letters: Q queries, G gallery entries, D channels; q of the queries and g of the gallery are worked on at once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import UserError

CHUNK = 32  # queries ranked at once on the CPU: CHUNK x G keys of 8 bytes fit into the cache
ENTRIES = 2**23  # distances held at once; ranking them on a GPU takes about 60 bytes each
FEATURES = 2**25  # numbers of the gallery's features that are compared at once

Labels: TypeAlias = Tensor | np.ndarray


@contextmanager
def one_thread() -> Iterator[None]:
    """Work of many short operations on the CPU: waking a second thread for each gains little, and on a busy machine
    every operation waits for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def pairwise_distance(query: Tensor, gallery: Tensor) -> Tensor:
    """Squared Euclidean distances (Q, G), float32, between features (Q, D) and (G, D)."""
    with torch.autocast(query.device.type, enabled=False):
        query, gallery = query.float(), gallery.float()
        squares = [torch.linalg.vector_norm(features, dim=1).square() for features in (query, gallery)]
        return torch.addmm(squares[0][:, None] + squares[1], query, gallery.T, alpha=-2).clamp_min_(0)


def rank_metrics(
    distance: Tensor | np.ndarray,
    q_pid: Labels,
    g_pid: Labels,
    q_cam: Labels,
    g_cam: Labels,
    q_scene: Labels | None = None,
    g_scene: Labels | None = None,
    protocol: str = "camera",
    max_rank: int = 50,
) -> tuple[np.ndarray, float]:
    """Rank the gallery for each query, nearest first, and score the ranking.

    What a query could recognise without recognising the identity is left out of its gallery: entries of the same
    identity from the same camera (protocol "camera") or from the same scene ("scene"). Equal distances keep the order
    of the gallery. A query with no match left does not count.

    Args:
        distance: (Q, G), smaller is nearer, compared in float32.
        q_pid, g_pid, q_cam, g_cam, q_scene, g_scene: integers, (Q,) for queries and (G,) for the gallery.
        protocol: "camera" (RGBNT201, RGBNT100) or "scene" (MSVR310; needs the scenes).
        max_rank: length of the CMC; past the end of a small gallery it stays at its last value.

    Returns:
        cmc: (max_rank,) float64, at index r the share of queries that have a match among their first r + 1 entries.
        mAP: mean over the queries of the average precision, in [0, 1].

    Raises:
        UserError: an unknown protocol, missing scenes, sizes that disagree, a NaN distance, or no query with a match.
    """
    distance = torch.as_tensor(distance)
    distance = distance.to(_ranking_device(distance), torch.float32)
    labels = _labels(distance.device, distance.shape, q_pid, g_pid, q_cam, g_cam, q_scene, g_scene, protocol)
    return _mean(_scores(distance, *labels), distance.shape, protocol, max_rank)


def rank_features(
    query: Tensor,
    gallery: Tensor,
    q_pid: Labels,
    g_pid: Labels,
    q_cam: Labels,
    g_cam: Labels,
    q_scene: Labels | None = None,
    g_scene: Labels | None = None,
    protocol: str = "camera",
    max_rank: int = 50,
    *,
    normalise: bool = False,
) -> tuple[np.ndarray, float]:
    """`rank_metrics` on the squared Euclidean distances between features, of which only a few rows exist at a time.

    Runs where the features are and reads back once, at the end. Beside the features, which are not copied, it takes
    about 0.6 GiB on a GPU, however large the gallery.

    Args:
        query, gallery: (Q, D) and (G, D).
        q_pid, g_pid, q_cam, g_cam, q_scene, g_scene, protocol, max_rank: see `rank_metrics`.
        normalise: scale features to length 1 first.

    Returns:
        cmc and mAP of `rank_metrics`: the same numbers where all fits one block (2**23 distances, 2**25 numbers of the
        gallery); beyond, the matrix products of blocks may round the last bit of a distance otherwise.

    Raises:
        UserError: as `rank_metrics` does; NaN in the features among the reasons.
    """
    labels = (q_pid, g_pid, q_cam, g_cam, q_scene, g_scene, protocol)
    return begin_ranking(query, gallery, *labels, max_rank, normalise=normalise)()


def begin_ranking(
    query: Tensor,
    gallery: Tensor,
    q_pid: Labels,
    g_pid: Labels,
    q_cam: Labels,
    g_cam: Labels,
    q_scene: Labels | None = None,
    g_scene: Labels | None = None,
    protocol: str = "camera",
    max_rank: int = 50,
    *,
    normalise: bool = False,
) -> Callable[[], tuple[np.ndarray, float]]:
    """`rank_features` under way on the device: what this returns waits for it, and gives CMC and mAP. Whoever has
    several rankings begins them all first."""
    device, shape = _ranking_device(query), torch.Size((len(query), len(gallery)))
    ids, gallery_ids, places, gallery_places = _labels(
        device, shape, q_pid, g_pid, q_cam, g_cam, q_scene, g_scene, protocol
    )
    scores = []
    for rows in _slices(shape[0], ENTRIES // max(1, shape[1])):
        part = F.normalize(query[rows], dim=-1) if normalise else query[rows]
        distance = torch.empty(len(part), shape[1], device=device)
        for block in _slices(shape[1], FEATURES // max(1, gallery.shape[1])):
            other = F.normalize(gallery[block], dim=-1) if normalise else gallery[block]
            distance[:, block] = pairwise_distance(part, other)
        scores.append(_scores(distance, ids[rows], gallery_ids, places[rows], gallery_places))
    joined = torch.cat(scores, dim=1)
    return lambda: _mean(joined, shape, protocol, max_rank)


def _ranking_device(values: Tensor) -> torch.device:
    """CUDA, or the CPU: others lack float64."""
    return values.device if values.device.type == "cuda" else torch.device("cpu")


def _slices(length: int, size: int) -> list[slice]:
    """Cuts a range into pieces of `size` (at least 1); one empty piece where there is nothing to cut."""
    size = max(1, size)
    return [slice(first, first + size) for first in range(0, max(1, length), size)]


def _labels(
    device: torch.device,
    shape: torch.Size,
    q_pid: Labels,
    g_pid: Labels,
    q_cam: Labels,
    g_cam: Labels,
    q_scene: Labels | None,
    g_scene: Labels | None,
    protocol: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Identities and places (cameras or scenes) of queries and gallery on the device, checked against (Q, G)."""
    if protocol not in ("camera", "scene"):
        raise UserError(f"protocol {protocol!r}: expected 'camera' or 'scene'")
    if protocol == "scene" and (q_scene is None or g_scene is None):
        raise UserError("protocol 'scene' needs q_scene and g_scene; use 'camera' for data without scenes")
    q_place, g_place = (q_cam, g_cam) if protocol == "camera" else (q_scene, g_scene)
    q_pid, g_pid, q_place, g_place = (torch.as_tensor(x, device=device) for x in (q_pid, g_pid, q_place, g_place))
    if {tuple(shape)} != {(len(q_pid), len(g_pid)), (len(q_place), len(g_place))}:
        raise UserError(
            f"distance is {tuple(shape)}, but of queries there are {len(q_pid)} ids and {len(q_place)} "
            f"{protocol}s, of gallery entries {len(g_pid)} and {len(g_place)}"
        )
    return q_pid, g_pid, q_place, g_place


@one_thread()
def _scores(distance: Tensor, q_pid: Tensor, g_pid: Tensor, q_place: Tensor, g_place: Tensor) -> Tensor:
    """For each query (4, Q) float64: rank of the first match from 0, matches, sum of the precisions, NaN distances.

    Nothing here waits for the device.
    """
    entries = max(1, distance.shape[1])
    place = torch.arange(1, distance.shape[1] + 1, device=distance.device, dtype=torch.float64)
    scores = []
    for rows in _slices(len(distance), ENTRIES // entries if distance.is_cuda else CHUNK):
        same_pid = q_pid[rows, None] == g_pid
        left_out = same_pid & (q_place[rows, None] == g_place)
        hits = _ranked_hits(distance[rows], same_pid, left_out)
        found = hits.cumsum(dim=1, dtype=torch.int32)  # matches up to and with each rank
        precisions = torch.where(hits, found / place, 0.0).sum(dim=1)
        counts = ((found == 0).sum(dim=1), hits.sum(dim=1), distance[rows].isnan().sum(dim=1))
        first, matches, nans = (count.double() for count in counts)
        scores.append(torch.stack([first, matches, precisions, nans]))
    return torch.cat(scores, dim=1)


def _mean(scores: Tensor, shape: torch.Size, protocol: str, max_rank: int) -> tuple[np.ndarray, float]:
    """CMC and mAP of the queries that have a match, from what `_scores` gives; reads the device back."""
    first, matches, precisions, nans = scores.cpu()
    if nans.any():
        raise UserError(f"{int(nans.sum())} of {shape.numel()} distances are NaN: check the features")
    counts = matches > 0
    if not counts.any():
        raise UserError(f"no query has a match in the gallery under the {protocol} protocol: check ids and {protocol}s")
    reached = first[counts, None] <= torch.arange(max_rank)
    return reached.double().mean(dim=0).numpy(), (precisions[counts] / matches[counts]).mean().item()


def _ranked_hits(distance: Tensor, same_pid: Tensor, left_out: Tensor) -> Tensor:
    """Whether the entry at each rank is a match, (q, G) bool; entries that are left out come last and are no match.

    Sorts one int64 key per entry: the distance's bits, then the position in the gallery, then the match itself. That
    is a stable sort that needs no indices afterwards, several times as fast as sorting floats with their indices.
    """
    bits = (distance + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the order of floats as that of integers, negative ones too
    position = torch.arange(distance.shape[1], device=distance.device)
    keys = (bits.long() << 32) + (position << 1) + same_pid
    keys.masked_fill_(left_out, torch.iinfo(torch.int64).max - 1)
    if keys.is_cuda:
        keys = keys.sort(dim=1).values
    else:
        keys.numpy().sort(axis=1)  # vectorised, unlike torch's sort on the CPU
    return (keys & 1).bool()
