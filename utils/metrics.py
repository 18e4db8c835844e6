"""Ranking metrics of re-identification: cumulative matching characteristics (CMC) and mean average precision (mAP).

Shape letters: Q queries, G gallery entries.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError

CHUNK = 32  # queries ranked at once: CHUNK x G keys of 8 bytes fit into the cache


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


@one_thread()
def rank_metrics(
    distance: Tensor | np.ndarray,
    q_pid: Tensor | np.ndarray,
    g_pid: Tensor | np.ndarray,
    q_cam: Tensor | np.ndarray,
    g_cam: Tensor | np.ndarray,
    q_scene: Tensor | np.ndarray | None = None,
    g_scene: Tensor | np.ndarray | None = None,
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
    device = distance.device if distance.device.type == "cuda" else torch.device("cpu")
    distance = distance.to(device, torch.float32)
    if protocol not in ("camera", "scene"):
        raise UserError(f"protocol {protocol!r}: expected 'camera' or 'scene'")
    if protocol == "scene" and (q_scene is None or g_scene is None):
        raise UserError("protocol 'scene' needs q_scene and g_scene; use 'camera' for data without scenes")
    q_place, g_place = (q_cam, g_cam) if protocol == "camera" else (q_scene, g_scene)
    q_pid, g_pid, q_place, g_place = (torch.as_tensor(x, device=device) for x in (q_pid, g_pid, q_place, g_place))
    if {tuple(distance.shape)} != {(len(q_pid), len(g_pid)), (len(q_place), len(g_place))}:
        raise UserError(
            f"distance is {tuple(distance.shape)}, but of queries there are {len(q_pid)} ids and {len(q_place)} "
            f"{protocol}s, of gallery entries {len(g_pid)} and {len(g_place)}"
        )
    if distance.isnan().any():
        raise UserError(f"{int(distance.isnan().sum())} of {distance.numel()} distances are NaN: check the features")

    first_match, precision = [], []
    for rows in torch.arange(len(q_pid), device=device).split(CHUNK):
        same_pid = q_pid[rows, None] == g_pid
        left_out = same_pid & (q_place[rows, None] == g_place)
        hits = _ranked_hits(distance[rows], same_pid, left_out)
        query, rank = hits.nonzero(as_tuple=True)  # row by row, nearest first
        matches = query.bincount(minlength=len(rows))
        start = matches.cumsum(0) - matches
        found = torch.arange(1, len(rank) + 1, device=device) - start[query]  # matches up to and with this one
        total = torch.zeros(len(rows), dtype=torch.float64, device=device)
        total.index_add_(0, query, found.double() / (rank + 1))
        counts = matches > 0
        precision.append(total[counts] / matches[counts])
        first_match.append(rank[start[counts]])
    first_match, precision = torch.cat(first_match), torch.cat(precision)
    if len(precision) == 0:
        raise UserError(f"no query has a match in the gallery under the {protocol} protocol: check ids and {protocol}s")
    reached = first_match[:, None] <= torch.arange(max_rank, device=device)
    return reached.double().mean(dim=0).cpu().numpy(), precision.mean().item()


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
