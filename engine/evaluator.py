"""Evaluation: features of every image once, ranking of every branch, tables."""

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from yacs.config import CfgNode

from data import EvalLoader, ReidData, tell_lost_workers
from data.masks import person_patches
from engine.device import autocast_dtype
from engine.monitor import SelectionMonitor
from modeling import ReIDModel
from modeling.regions import is_compiled, uncompiled
from modeling.sdtps import Selection
from utils.distributed import from_main, gather_objects, gather_rows, is_main, world_size
from utils.errors import UserError
from utils.files import read_json, save_text
from utils.metrics import begin_ranking, rank_metrics
from utils.modalities import MODALITIES
from utils.pictures import draw_selection, draw_share, stack_samples
from utils.reranking import re_ranking

log = logging.getLogger(__name__)

MISSING_PATTERNS = ("r", "n", "t", "rn", "rt", "nt")
"""Initials of the modalities that are taken away, as TEST.MISS writes them; "nothing" keeps all."""


@dataclass
class EvalResult:
    """What an evaluation found."""

    metrics: dict[str, dict[str, float]]
    """Per branch: mAP, R1, R5, R10, in percent."""
    statistics: dict[str, float] = field(default_factory=dict)
    """Mean feature norm of each branch, and what SDTPS chose (see `engine.monitor.SelectionMonitor`)."""
    pictures: dict[str, Tensor] = field(default_factory=dict)
    """(3, H, W) uint8: `selection`, kept patches and scores on a few fixed test images; `kept_share`, the share of test
    images that keep each patch of the grid."""


@dataclass
class Extraction:
    """What one pass gave: float32 features (N, D) of each branch and `both`, and, with SDTPS, what it chose."""

    features: dict[str, list[Tensor]]
    monitor: SelectionMonitor | None
    kept: list["Kept"] = field(default_factory=list)

    def joined(self) -> dict[str, Tensor]:
        return {name: torch.cat(parts) for name, parts in self.features.items()}

    def join_ranks(self) -> None:
        """Brings what the ranks found on their shares to the main rank."""
        self.features = {name: [gather_rows(rows)] for name, rows in self.joined().items()}
        if world_size() > 1:
            shares = gather_objects([kept.to("cpu") for kept in self.kept])
            self.kept = [kept for share in shares for kept in share]
        if self.monitor is not None:
            self.monitor.join_ranks()


@torch.no_grad()
def extract_features(
    model: ReIDModel,
    loader: EvalLoader,
    *,
    dtype: torch.dtype | None = None,
    missing: Sequence[str] = ("",),
    keep: Sequence[int] = (),
) -> dict[str, Extraction]:
    """Runs the backbone once over a loader, and what lies behind it once for each pattern of missing modalities.

    With all modalities, nothing here waits for the device before the last batch is under way.

    Of several ranks, each runs over its share, and the main one gets what all of them found.

    Args:
        model: put into evaluation mode and back.
        loader: batches in a fixed order.
        dtype: autocast type, None for float32.
        missing: patterns, each the initials of the modalities that are taken away; "" keeps all.
        keep: places of samples in that order whose images and selection shall be kept.

    Returns:
        Pattern -> what it gave, on the model's device.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    names = (*model.branches, "both") if len(model.branches) > 1 else model.branches
    person = None if model.sdtps is None else _person_patches(model, loader.paths, device)
    result = {
        pattern: Extraction({name: [] for name in names}, SelectionMonitor(person) if model.sdtps is not None else None)
        for pattern in missing
    }
    stays = torch.tensor([[m[0].lower() not in pattern for m in MODALITIES] for pattern in missing], device=device)
    first, size = 0, 0
    silent = None if is_main() else True
    for batch in tqdm(loader.batches(device), desc="features", total=len(loader), leave=False, disable=silent):
        places = loader.indices[first : first + len(batch.pid)]
        inside = [row for row, place in enumerate(places) if place in keep]
        first += len(batch.pid)
        size = max(size, len(batch.pid))
        last = is_compiled(model) and len(batch.pid) < size  # would be compiled anew
        regions = uncompiled(model) if last else nullcontext()
        with regions, torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            encoded = model.encode(batch.images, batch.camid, batch.present)
            for (pattern, extraction), stay in zip(result.items(), stays, strict=True):
                present = stay.expand(len(batch.pid), -1) if batch.present is None else batch.present & stay
                view = model.leave_out(encoded, present, batch.camid) if pattern else encoded
                output = model.decode(view)
                for name in names:
                    extraction.features[name].append(output.features[name].float())
                if extraction.monitor is not None and output.selection is not None:
                    extraction.monitor.update(output.selection, batch.index)
                    extraction.kept += [Kept.of(batch.images, output.selection, i) for i in inside]
    model.train(training)
    for extraction in result.values():
        extraction.join_ranks()
    return result


def _person_patches(model: ReIDModel, paths: Sequence[str], device: torch.device) -> Tensor | None:
    """Which patches show the person (images, N), where masks lie beside the images."""
    embed = model.backbone.vit.patch_embed
    person = person_patches(paths, model.backbone.img_size, embed.patch_size, embed.proj.stride)
    return None if person is None else person.to(device)


@dataclass
class Kept:
    """One sample with what SDTPS chose on it: images (M, 3, H, W), mask and scores (M, N)."""

    images: Tensor
    mask: Tensor
    scores: Tensor

    @classmethod
    def of(cls, images: dict[str, Tensor], selection: Selection, i: int) -> "Kept":
        fields = (images, selection.mask, selection.scores)
        return cls(*(torch.stack([values[m][i] for m in MODALITIES]) for values in fields))

    def to(self, device: torch.device | str) -> "Kept":
        return Kept(self.images.to(device), self.mask.to(device), self.scores.to(device))


def rank(cfg: CfgNode, features: Tensor, val: EvalLoader) -> dict[str, float]:
    """mAP and Rank-1, 5, 10 in percent of one branch's features (N, D), ranked as TEST.* says."""
    return begin_rank(cfg, features, val)()


def begin_rank(cfg: CfgNode, features: Tensor, val: EvalLoader) -> Callable[[], dict[str, float]]:
    """`rank` under way on the device: what this returns waits for it."""
    sides = (val.query, val.gallery)
    known: list = [values[side] for values in (val.pids, val.camids, val.sceneids) for side in sides]
    known.append(val.protocol)
    if cfg.TEST.RE_RANKING:
        features = F.normalize(features, dim=-1) if cfg.TEST.FEAT_NORM else features
        distance = re_ranking(*(_rows(features, side) for side in sides))
        found = rank_metrics(distance, *known)  # at once: distances are large
        return lambda: _percent(*found)
    query, gallery = (_rows(features, side) for side in sides)
    wait = begin_ranking(query, gallery, *known, normalise=cfg.TEST.FEAT_NORM)
    return lambda: _percent(*wait())


def _percent(cmc: np.ndarray, mean_ap: float) -> dict[str, float]:
    return {"mAP": 100 * mean_ap} | {f"R{k}": 100 * float(cmc[min(k, len(cmc)) - 1]) for k in (1, 5, 10)}


def _rows(features: Tensor, index: Tensor) -> Tensor:
    """Rows of (N, D) features; a view where they lie one after the other, since a large gallery fits only once."""
    first, last = int(index[0]), int(index[-1]) + 1
    in_order = len(index) == last - first and torch.equal(index, torch.arange(first, last))
    return features[first:last] if in_order else features[index.to(features.device)]


def evaluate(cfg: CfgNode, model: ReIDModel, val: EvalLoader, *, pictures: int = 0) -> EvalResult:
    """Evaluates every branch from one pass over the distinct images; see `evaluate_missing`."""
    return evaluate_missing(cfg, model, val, ("",), pictures=pictures)[""]


def evaluate_missing(
    cfg: CfgNode, model: ReIDModel, val: EvalLoader, patterns: Sequence[str], *, pictures: int = 0
) -> dict[str, EvalResult]:
    """Evaluates every branch under patterns of missing modalities, from one pass of the backbone over the images.

    Args:
        cfg: TEST.* and SOLVER.AMP are read.
        model: see `modeling.make_model`.
        val: the `.val` of `data.make_dataloader`.
        patterns: each the initials of the modalities to take away, such as "rn"; "" keeps all.
        pictures: how many test images to draw with what SDTPS chose.

    Raises:
        UserError: features that are not finite; names branches and an image.
    """
    dtype = autocast_dtype(cfg.SOLVER.AMP, next(model.parameters()).device)
    keep = sorted(set(torch.linspace(0, len(val.pids) - 1, pictures).long().tolist()))
    found = extract_features(model, val, dtype=dtype, missing=patterns, keep=keep)
    grid = model.backbone.grid
    return from_main(lambda: {pattern: _result(cfg, extraction, val, grid) for pattern, extraction in found.items()})


def _result(cfg: CfgNode, extraction: Extraction, val: EvalLoader, grid: tuple[int, int]) -> EvalResult:
    features, monitor, pictures = extraction.joined(), extraction.monitor, {}
    _refuse_not_finite(features, val.paths)
    rankings = {name: begin_rank(cfg, f, val) for name, f in features.items()}
    metrics = {name: wait() for name, wait in rankings.items()}
    norms = torch.stack([f.norm(dim=-1).mean() for f in features.values()]).tolist()
    statistics = {f"feature_norm/{name}": norm for name, norm in zip(features, norms, strict=True)}
    if extraction.kept:
        mean_std = (cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD)
        device = next(iter(features.values())).device  # its host would draw them by all its threads
        kept = [one.to(device) for one in extraction.kept]
        samples = [draw_selection(k.images, k.mask, k.scores, grid, *mean_std) for k in kept]
        pictures["selection"] = stack_samples(samples).cpu()
    if monitor is not None:
        statistics |= monitor.read()
        share = monitor.cell_share()
        pictures["kept_share"] = draw_share(torch.stack([share[m] for m in MODALITIES]), grid)
    return EvalResult(metrics, statistics, pictures)


def _refuse_not_finite(features: dict[str, Tensor], paths: Sequence[str]) -> None:
    bad = torch.stack([(~f.isfinite()).any(dim=1) for f in features.values()]).cpu()  # (branches, N)
    branches = [name for name, rows in zip(features, bad, strict=True) if rows.any()]
    if branches:
        rows = bad[bad.any(dim=1)][0]
        raise UserError(
            f"Not finite in the evaluation: the features of {', '.join(branches)} for {int(rows.sum())} of {len(rows)} "
            f"test images, such as {paths[int(rows.int().argmax())]}. Nothing was ranked or saved. A weight is NaN or "
            "infinite, or too large for the arithmetic: take an earlier checkpoint, or try SOLVER.AMP float32."
        )


def format_table(rows: dict[str, dict[str, float]], first: str = "branch") -> str:
    """A plain table: one row per name, columns mAP, R1, R5, R10 in percent."""
    width = max(len(first), *(len(name) for name in rows))
    columns = list(next(iter(rows.values())))
    lines = [f"{first:<{width}}  " + "  ".join(f"{c:>5}" for c in columns)]
    lines += [f"{name:<{width}}  " + "  ".join(f"{row[c]:5.1f}" for c in columns) for name, row in rows.items()]
    return "\n".join(lines)


def write_metrics(path: Path, **sections: dict) -> None:
    """Puts sections into a metrics.json, keeping those that other commands wrote; the main rank does."""
    if is_main():
        save_text(json.dumps(read_json(path) | sections, indent=2) + "\n", path)


@tell_lost_workers()
def do_inference(cfg: CfgNode, model: ReIDModel, data: ReidData) -> dict[str, dict[str, dict[str, float]]]:
    """Evaluates as TEST.* says, logs one table and writes it under "test" into OUTPUT_DIR/metrics.json.

    TEST.MISS names modalities to take away; "all" goes through every pattern and gives the average.

    Returns:
        Per pattern ("nothing", "r", …): per branch mAP, R1, R5, R10 in percent.
    """
    patterns = ("nothing", *MISSING_PATTERNS) if cfg.TEST.MISS == "all" else (cfg.TEST.MISS,)
    spelt = {"" if pattern == "nothing" else pattern: pattern for pattern in patterns}
    found = evaluate_missing(cfg, model, data.val, tuple(spelt))
    results = {spelt[pattern]: result.metrics for pattern, result in found.items()}
    if len(patterns) == 1:
        log.info("missing modalities: %s\n%s", patterns[0], format_table(results[patterns[0]]))
    if len(patterns) > 1:
        for branch in results["nothing"]:
            rows = {pattern: results[pattern][branch] for pattern in MISSING_PATTERNS}
            mean = {c: sum(row[c] for row in rows.values()) / len(rows) for c in rows["r"]}
            table = {"nothing": results["nothing"][branch]} | rows | {"mean of six": mean}
            log.info("branch %s\n%s", branch, format_table(table, "missing"))
    path, settings = Path(cfg.OUTPUT_DIR) / "metrics.json", {k: v for k, v in cfg.TEST.items() if k != "MISS"}
    before = read_json(path).get("test", {})
    known = before.get("results", {}) if before.get("config") == settings else {}  # of other patterns, to be kept
    write_metrics(path, test={"config": settings, "results": known | results})
    return results
