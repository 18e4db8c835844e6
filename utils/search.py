"""Nearest neighbours among many features: exactly, piece by piece of the gallery; or by an index of faiss on the disk.

Shape letters: Q queries, G gallery entries, D channels, K neighbours.
"""

import logging
import math
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from utils.errors import UserError

log = logging.getLogger(__name__)

PIECE = 2**24
"""Numbers of the gallery that are compared at once: 64 MiB in float32, whatever its size."""
PROBES = 32
"""Lists of an index that a query looks into, of about the square root of G."""
TRAINING = 64
"""Entries for each list from which an index learns where its lists lie."""


def nearest(query: Tensor, gallery: Tensor, k: int, *, normalised: bool = True) -> tuple[Tensor, Tensor]:
    """The K most similar entries of each query, the best first.

    Args:
        query, gallery: (Q, D) and (G, D) on the CPU; the gallery may be a memory-mapped file.
        k: cut to G.
        normalised: all have length 1; the similarity is then the cosine, else minus the squared Euclidean distance.

    Returns:
        Similarities (Q, K) float32 and indices (Q, K) int64.

    Raises:
        UserError: query and gallery differ in D.
    """
    _check(query, gallery.shape[1])
    query, k = query.float(), min(k, len(gallery))
    best, where = query.new_empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.long)
    rows = max(1, PIECE // max(1, gallery.shape[1]))
    for start in range(0, len(gallery), rows):
        piece = gallery[start : start + rows].float()
        similarity = query @ piece.T
        if not normalised:
            squares = [torch.linalg.vector_norm(x, dim=1).square() for x in (query, piece)]
            similarity = 2 * similarity - squares[0][:, None] - squares[1]
        values, indices = similarity.topk(min(k, len(piece)), dim=1)
        best, where = torch.cat([best, values], dim=1), torch.cat([where, indices + start], dim=1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        where = where.gather(1, order)
    return best, where


def import_faiss() -> ModuleType:
    """The optional package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise UserError(
            "faiss is not installed: pip install faiss-cpu; or leave --index faiss out for the exact search, which "
            "needs no index and reads the gallery piece by piece."
        ) from None
    return faiss


def build_index(gallery: Tensor, path: Path, *, normalised: bool = True) -> None:
    """Writes an index: entries as one byte a channel, in about sqrt(G) lists by likeness, of which a query reads some.

    Args:
        gallery: (G, D), read piece by piece; those that find the lists are evenly spaced entries.
        path: of the index; it takes about D bytes an entry.
        normalised: see `nearest`.

    Raises:
        UserError: faiss is not installed.
    """
    faiss = import_faiss()
    count, width = gallery.shape
    lists = max(1, min(round(math.sqrt(count)), count // TRAINING))
    metric = faiss.METRIC_INNER_PRODUCT if normalised else faiss.METRIC_L2
    index = faiss.index_factory(width, f"IVF{lists},SQ8" if count >= TRAINING else "Flat", metric)
    places = torch.linspace(0, count - 1, min(count, max(256, TRAINING * lists))).long()
    index.train(gallery[places].float().numpy())
    rows = max(1, PIECE // width)
    for start in range(0, count, rows):
        index.add(gallery[start : start + rows].float().contiguous().numpy())
    faiss.write_index(index, str(path))
    log.info("%s: an index of %d entries in %d lists", path, count, lists)


def nearest_in_index(query: Tensor, path: Path, k: int) -> tuple[Tensor, Tensor]:
    """As `nearest`, from an index that stays on the disk: approximate, and fewer than K may be found (index -1).

    Raises:
        UserError: faiss is not installed, the index cannot be read, or it is of another width.
    """
    faiss = import_faiss()
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    except RuntimeError as error:
        raise UserError(f"{path}: no index that can be read; remove it, and it is made anew. ({error})") from error
    _check(query, index.d)
    if hasattr(index, "nprobe"):
        index.nprobe = PROBES
    values, indices = index.search(query.float().contiguous().numpy(), min(k, index.ntotal))
    similarity = torch.from_numpy(values)
    return (similarity if index.metric_type == faiss.METRIC_INNER_PRODUCT else -similarity), torch.from_numpy(indices)


def _check(query: Tensor, width: int) -> None:
    if query.shape[1] != width:
        raise UserError(
            f"the queries have {query.shape[1]} channels, the gallery {width}: they come from different models or "
            "branches."
        )
