"""Times re-ranking and CMC/mAP against plain NumPy versions of the same, in one run.

Every measurement has a process of its own, and the two sides take turns, so that what else the machine does slows both
alike. The sizes are those of RGBNT100: 1715 queries, 8575 gallery images, the 5120 channels of `both`.

python -m tools.benchmark_ranking --json runs/benchmark_ranking.json
"""

import argparse
import json
import logging
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.cli import run
from utils.files import save_text
from utils.logging import setup_logging
from utils.metrics import rank_metrics
from utils.reranking import normalised_distance, re_ranking

log = logging.getLogger("tools.benchmark_ranking")

GIB = 2**30
IDENTITIES, CAMERAS = 50, 8

Features = tuple[np.ndarray, np.ndarray]
Labels = list[np.ndarray]


def plain_distance(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances (n, n) over query and gallery, each row divided by its maximum."""
    features = np.concatenate([query, gallery])
    squares = (features**2).sum(axis=1)
    distance = squares[:, None] + squares - 2 * features @ features.T
    return (distance / distance.max(axis=0)).T


def plain_re_ranking(
    query: np.ndarray, gallery: np.ndarray, k1: int = 20, k2: int = 6, lambda_value: float = 0.3
) -> tuple[np.ndarray, float]:
    """k-reciprocal re-ranking as its authors published it: a loop over the rows of dense matrices, V in float16.

    Returns:
        Distances (Q, G), and the seconds that the distances before the re-ranking took.
    """
    begin = time.perf_counter()
    distance = plain_distance(query, gallery)
    seconds = time.perf_counter() - begin
    queries, n = len(query), len(distance)
    ranking = np.argsort(distance).astype(np.int32)

    def reciprocal(i: int, k: int) -> np.ndarray:
        near = ranking[i, : k + 1]
        return near[(ranking[near, : k + 1] == i).any(axis=1)]

    encoding = np.zeros((n, n), dtype=np.float16)
    for i in range(n):
        core = reciprocal(i, k1)
        members = core
        for candidate in core:
            offered = reciprocal(candidate, round(k1 / 2))
            if len(np.intersect1d(offered, core)) > 2 / 3 * len(offered):
                members = np.append(members, offered)
        members = np.unique(members)
        weight = np.exp(-distance[i, members])
        encoding[i, members] = weight / weight.sum()
    distance = distance[:queries]
    if k2 > 1:
        averaged = np.zeros_like(encoding)
        for i in range(n):
            averaged[i] = encoding[ranking[i, :k2]].mean(axis=0)
        encoding = averaged

    holders = [np.where(encoding[:, column] != 0)[0] for column in range(n)]
    jaccard = np.zeros_like(distance, dtype=np.float16)
    for i in range(queries):
        overlap = np.zeros(n, dtype=np.float16)
        for column in np.where(encoding[i] != 0)[0]:
            shared = holders[column]
            overlap[shared] += np.minimum(encoding[i, column], encoding[shared, column])
        jaccard[i] = 1 - overlap / (2 - overlap)
    return (jaccard * (1 - lambda_value) + distance * lambda_value)[:, queries:], seconds


def plain_rank_metrics(
    distance: np.ndarray, q_pid: np.ndarray, g_pid: np.ndarray, q_cam: np.ndarray, g_cam: np.ndarray, max_rank: int = 50
) -> tuple[np.ndarray, float]:
    """CMC and mAP under the camera protocol, one query at a time; the arguments are those of `rank_metrics`."""
    curves, precisions = [], []
    for row, pid, camera in zip(distance, q_pid, q_cam, strict=True):
        order = np.argsort(row, kind="stable")
        hits = (g_pid[order] == pid)[(g_pid[order] != pid) | (g_cam[order] != camera)]
        if not hits.any():
            continue
        found = hits.cumsum()
        curves.append(found[:max_rank] > 0)
        precisions.append((found / np.arange(1, len(hits) + 1))[hits].mean())
    return np.mean(curves, axis=0), float(np.mean(precisions))


def make_features(queries: int, gallery: int, channels: int, signal: float, seed: int = 0) -> tuple[Features, Labels]:
    """Normal noise of variance 1 about identity centres of variance `signal`²; ids and cameras of both sides."""
    rng = np.random.default_rng(seed)
    sizes = (queries, gallery)
    pids = [rng.integers(0, IDENTITIES, size) for size in sizes]
    cameras = [rng.integers(0, CAMERAS, size) for size in sizes]
    centres = signal * rng.standard_normal((IDENTITIES, channels), dtype=np.float32)
    query, gallery_ = (rng.standard_normal((size, channels), dtype=np.float32) for size in sizes)
    for features, pid in zip((query, gallery_), pids, strict=True):
        for i, identity in enumerate(pid):
            features[i] += centres[identity]
    return (query, gallery_), [*pids, *cameras]


def timed(function: Callable, *args: object) -> tuple[float, Any]:
    """Seconds that a call took, and what it returned."""
    begin = time.perf_counter()
    result = function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def peak_memory() -> float:
    """The most memory that this process ever held, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB


def measure_plain(size: tuple) -> dict[str, float]:
    """Seconds and GiB of the plain versions."""
    features, labels = make_features(*size)
    before = peak_memory()
    total, (reranked, distance) = timed(plain_re_ranking, *features)
    peak = peak_memory()
    metrics, (_, mean_ap) = timed(plain_rank_metrics, reranked, *labels)
    return _row(total, distance, metrics, peak, peak - before, mean_ap)


def measure(size: tuple, device: str) -> dict[str, float]:
    """Seconds and GiB of `re_ranking` and `rank_metrics`; on CUDA the memory is that of the device."""
    arrays, labels = make_features(*size)
    features = [torch.as_tensor(side, device=device) for side in arrays]
    re_ranking(*(side[:100] for side in features))  # what torch loads on its first call
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() / GIB if device == "cuda" else peak_memory()
    total, reranked = timed(re_ranking, *features)
    peak = torch.cuda.max_memory_allocated() / GIB if device == "cuda" else peak_memory()
    distance, _ = timed(normalised_distance, *features)
    metrics, (_, mean_ap) = timed(rank_metrics, reranked, *labels)
    return _row(total, distance, metrics, peak, peak - before, mean_ap)


def _row(total: float, distance: float, metrics: float, peak: float, added: float, mean_ap: float) -> dict[str, float]:
    return {
        "re_ranking_s": total,
        "distance_s": distance,
        "beyond_distance_s": total - distance,
        "rank_metrics_s": metrics,
        "peak_gib": peak,
        "added_gib": added,
        "mAP": 100 * mean_ap,
    }


def in_own_process(function: Callable, *args: object) -> dict[str, float]:
    """Calls a function of this module in a fresh interpreter, whose peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def benchmark(size: tuple, runs: int) -> dict[str, dict[str, dict[str, float]]]:
    """Per side ("plain NumPy", "cpu", "cuda" where there is one): min and median of every figure over the runs."""
    sides: dict[str, tuple] = {"plain NumPy": (measure_plain, size), "cpu": (measure, size, "cpu")}
    if torch.cuda.is_available():
        sides["cuda"] = (measure, size, "cuda")
    rows: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(1, runs + 1):
        for side, call in sides.items():
            rows[side].append(in_own_process(*call))
            log.info("run %d of %d, %s: %.1f s", number, runs, side, rows[side][-1]["re_ranking_s"])
    return {
        side: {
            name: {"min": min(row[name] for row in of_side), "median": statistics.median(row[name] for row in of_side)}
            for name in of_side[0]
        }
        for side, of_side in rows.items()
    }


def format_results(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """A table, a line per figure, with "min / median" of each side."""
    lines = [f"{'min / median':<18}" + "".join(f"{side:>18}" for side in results)]
    for name in results["cpu"]:
        cells = (f"{side[name]['min']:.2f} / {side[name]['median']:.2f}" for side in results.values())
        lines.append(f"{name:<18}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    setup_logging()
    size = (args.queries, args.gallery, args.channels, args.signal)
    results = benchmark(size, args.runs)
    log.info("%d queries, %d gallery images, %d channels\n%s", *size[:3], format_results(results))
    if args.json:
        summary = {"size": size, "threads": torch.get_num_threads(), "results": results}
        save_text(json.dumps(summary, indent=2) + "\n", args.json)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=1715)
    parser.add_argument("--gallery", type=int, default=8575)
    parser.add_argument("--channels", type=int, default=5120)
    parser.add_argument(
        "--signal",
        type=float,
        default=0.0,
        help="spread of the identities' centres: at 0 all is noise, at 0.3 most matches are found",
    )
    parser.add_argument("--runs", type=int, default=3, help="measurements of each side")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    sys.exit(run(lambda: main(args), args.debug))
