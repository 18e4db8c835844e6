"""What a run's checkpoint does on its test images: rankings, distances, a map of the features, looks at single samples.

Shape letters: N test images, D channels, M modalities.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from yacs.config import CfgNode

from data import EvalLoader, make_dataloader
from engine.device import autocast_dtype, describe, select_device
from engine.evaluator import extract_features
from modeling import ReIDModel
from modeling.trained import load_trained
from tools.report.ranking import Ranking, Separation, choose_queries, rank_queries, separate
from tools.report.tiles import Look, to_pixels
from tools.report.tsne import tsne
from utils.checkpoint import read_file
from utils.metrics import pairwise_distance, rank_metrics
from utils.modalities import MODALITIES
from utils.reranking import re_ranking

MAX_RANK = 50
LISTED = 8  # gallery entries of a ranking list
MAPPED = 800  # points of the map


@dataclass
class RankedQuery:
    """A query with its first gallery entries; images are numbered as in the loader."""

    image: int
    precision: float
    first: int
    entries: list[tuple[int, float, bool]]
    """(image, distance, whether it is a match), nearest first."""


@dataclass
class Evaluation:
    """What a checkpoint does on the test images.

    Attributes:
        checkpoint, epoch, device: what was evaluated, and where.
        metrics, cmc: of each branch; mAP, R1, R5, R10 and CMC in percent.
        branch: the branch that rankings, distances and map are of.
        groups: "best", "typical", "worst" -> queries.
        separation: distances of pairs, as square roots where they are Euclidean.
        places: (points, 2), the map; `mapped` the images that they are.
        looks: image -> its pictures.
        grid: patches down and across.
        kept_share: (M, patches) share of the test images that keep each patch; None without SDTPS.
        statistics: see `engine.monitor.SelectionMonitor`.
        names, pids, camids: of every image.
        counts: query images, gallery images, identities of the queries.
        seconds: what the evaluation took.
    """

    checkpoint: Path
    epoch: int | None
    device: str
    metrics: dict[str, dict[str, float]]
    cmc: dict[str, np.ndarray]
    branch: str
    groups: dict[str, list[RankedQuery]]
    separation: Separation
    places: Tensor
    mapped: list[int]
    looks: dict[int, Look]
    grid: tuple[int, int]
    kept_share: Tensor | None
    statistics: dict[str, float]
    names: list[str]
    pids: list[int]
    camids: list[int]
    counts: tuple[int, int, int]
    seconds: float


def evaluate_run(cfg: CfgNode, checkpoint: Path) -> Evaluation:
    """Evaluates a checkpoint on the test images of its config, with all modalities.

    Raises:
        UserError: the data, the checkpoint or the device cannot be used.
    """
    start = time.perf_counter()
    device = select_device(cfg.MODEL.DEVICE)
    dtype = autocast_dtype(cfg.SOLVER.AMP, device)
    stored = read_file(checkpoint)
    data = make_dataloader(cfg, train=False)
    val = data.val
    model = load_trained(cfg, stored, checkpoint, cameras=int(val.camids.max()) + 1).to(device).eval()

    extraction = extract_features(model, val, dtype=dtype)[""]
    features = extraction.joined()
    branch = "both" if "both" in features else next(iter(features))
    metrics, cmc, ranking = {}, {}, None
    for name, values in features.items():
        distance = _distance(cfg, values, val)
        cmc[name], metrics[name] = _score(distance, val)
        if name == branch:
            ranking = rank_queries(distance, *_labels(val))
    assert ranking is not None

    groups = _ranked(cfg, ranking, val)
    shown = [image for queries in groups.values() for q in queries for image in (q.image, *(e[0] for e in q.entries))]
    mapped = torch.randperm(len(val.pids), generator=torch.Generator().manual_seed(0))[:MAPPED].sort().values
    points = features[branch][mapped.to(features[branch].device)]
    places = tsne(F.normalize(points, dim=-1) if cfg.TEST.FEAT_NORM else points)
    monitor = extraction.monitor
    share = monitor.cell_share() if monitor is not None else None
    return Evaluation(
        checkpoint=checkpoint,
        epoch=stored.get("epoch"),
        device=describe(device, dtype),
        metrics=metrics,
        cmc=cmc,
        branch=branch,
        groups=groups,
        separation=separate(_shown(cfg, ranking.distance), ranking.same, ranking.left_out),
        places=places,
        mapped=mapped.tolist(),
        looks=look_at(cfg, model, val, sorted(set(shown)), dtype),
        grid=model.backbone.grid,
        kept_share=torch.stack([share[m] for m in MODALITIES]) if share else None,
        statistics=monitor.read() if monitor is not None else {},
        names=[Path(path).stem for path in val.paths],
        pids=val.pids.tolist(),
        camids=val.camids.tolist(),
        counts=(len(val.query), len(val.gallery), len(val.pids[val.query].unique())),
        seconds=time.perf_counter() - start,
    )


def _distance(cfg: CfgNode, features: Tensor, val: EvalLoader) -> Tensor:
    """(Q, G) as TEST.* ranks by: squared Euclidean, or that of re-ranking."""
    features = F.normalize(features, dim=-1) if cfg.TEST.FEAT_NORM else features
    query, gallery = (features[index.to(features.device)] for index in (val.query, val.gallery))
    compare = re_ranking if cfg.TEST.RE_RANKING else pairwise_distance
    return torch.as_tensor(compare(query, gallery)).cpu()


def _shown(cfg: CfgNode, distance: Tensor) -> Tensor:
    """Distances as people read them: Euclidean ones without their square."""
    return distance if cfg.TEST.RE_RANKING else distance.sqrt()


def _labels(val: EvalLoader) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    places = val.camids if val.protocol == "camera" else val.sceneids
    return val.pids[val.query], val.pids[val.gallery], places[val.query], places[val.gallery]


def _score(distance: Tensor, val: EvalLoader) -> tuple[np.ndarray, dict[str, float]]:
    q_pid, g_pid, q_place, g_place = _labels(val)
    cmc, mean_ap = rank_metrics(distance, q_pid, g_pid, q_place, g_place, max_rank=MAX_RANK)
    return 100 * cmc, {"mAP": 100 * mean_ap} | {f"R{k}": 100 * float(cmc[k - 1]) for k in (1, 5, 10)}


def _ranked(cfg: CfgNode, ranking: Ranking, val: EvalLoader) -> dict[str, list[RankedQuery]]:
    """The queries that are worth a look, with their first entries."""

    def ranked(query: int) -> RankedQuery:
        near = ranking.nearest(query, LISTED)
        distances = _shown(cfg, ranking.distance[query, near]).tolist()
        matches = ranking.same[query, near].tolist()
        images = val.gallery[near].tolist()
        entries = list(zip(images, distances, matches, strict=True))
        return RankedQuery(int(val.query[query]), float(ranking.precision[query]), int(ranking.first[query]), entries)

    chosen = choose_queries(ranking, val.pids[val.query])
    return {name: [ranked(query) for query in queries] for name, queries in chosen.items()}


@torch.no_grad()
def look_at(
    cfg: CfgNode, model: ReIDModel, val: EvalLoader, images: Sequence[int], dtype: torch.dtype | None = None
) -> dict[int, Look]:
    """Pixels, kept patches and scores of some test images."""
    device = next(model.parameters()).device
    everything, val.indices = val.indices, images
    looks: dict[int, Look] = {}
    try:
        for batch in tqdm(val.batches(device), desc="pictures", total=len(val), leave=False, disable=None):
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                selection = model(batch.images, batch.camid).selection
            for i, image in enumerate(batch.index.tolist()):
                pixels = to_pixels(batch.images, i, cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD)
                chosen: tuple[Tensor, ...] = ()
                if selection is not None:
                    chosen = tuple(
                        torch.stack([of[m][i] for m in MODALITIES]).cpu() for of in (selection.mask, selection.scores)
                    )
                looks[image] = Look(pixels, *chosen)
    finally:
        val.indices = everything
    return looks
