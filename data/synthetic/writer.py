"""Writes sample data to files, all of a set or nothing."""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.synthetic.layout import MASK, Files
from data.synthetic.plan import Preset, Shot, plan
from data.synthetic.sets import SETS, SampleSet, find_set
from utils.errors import UserError

logger = logging.getLogger(__name__)

DESCRIPTION = "sample_data.json"
JPEG_QUALITY = 92


def generate(
    out: str | os.PathLike,
    preset: str | Preset = "mini",
    seed: int = 0,
    workers: int | None = None,
    masks: bool = False,
    overwrite: bool = False,
    dataset: str = "RGBNT201",
) -> Path:
    """Write a data set to `out`/`dataset` and return `out`.

    Args:
        preset: a name of the data set's presets, or counts of one's own.
        seed: other seeds give other subjects in other places.
        workers: processes that draw; None = one a core.
        masks: also write what is visible of the subject to MASK/*.png (0 or 255) in the folders of the layout.
        overwrite: replace other sample data that is there. Data that this generator did not write is never replaced.
        dataset: a name of `SETS`.

    Raises:
        UserError: for an unknown data set or preset, a negative seed, fewer than one worker, other data in the way, or
            a place that cannot be written.
    """
    sample_set = find_set(dataset)
    out, preset = Path(out), sample_set.find_preset(preset)
    if seed < 0:
        raise UserError(f"seed is {seed}: expected 0 or more.")
    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}: expected 1 or more.")
    description = {
        "generator_version": sample_set.version,
        "preset": preset.name,
        "seed": seed,
        "masks": masks,
        "counts": preset.counts(),
    }
    shots, target = plan(preset, sample_set.source(seed)), out / dataset
    files = [file for shot in shots for file in _files(sample_set, shot, masks)]
    if target.exists() and _is_ready(target, description, files, overwrite):
        logger.info("%s holds this sample data already (%d triples): nothing to do.", target, len(shots))
        return out
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{dataset}-", dir=out) as scratch:
            fresh = Path(scratch) / dataset
            for folder in {(fresh / file).parent for file in files}:
                folder.mkdir(parents=True, exist_ok=True)
            write = partial(_write_shot, fresh, dataset, preset, seed, masks)
            drawing = _run(write, shots, workers or _available_cores())
            for _ in tqdm(drawing, total=len(shots), desc=f"Drawing {preset.name}", unit="triple", disable=None):
                pass
            (fresh / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
            if target.exists():
                target.rename(Path(scratch) / "replaced")
            fresh.rename(target)
    except OSError as error:
        raise UserError(
            f"Cannot write sample data to {target}: {error}. Give another folder, or make room there."
        ) from error
    logger.info("Wrote %d triples of %s sample data to %s.", len(shots), preset.name, target)
    return out


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_ready(target: Path, wanted: dict, files: list[str], overwrite: bool) -> bool:
    """Whether the wanted set is at `target`, complete; False where something else is and may be replaced.

    Raises:
        UserError: where it may not.
    """
    try:
        found = json.loads((target / DESCRIPTION).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{target} exists and was not written by this generator (no readable {DESCRIPTION}): "
            "it is left alone. Give another --out, or move it away."
        ) from error
    same = isinstance(found, dict) and all(found.get(key) == wanted[key] for key in wanted.keys() - {"masks"})
    missing = sum(not (target / file).exists() for file in files)
    if same and not missing:
        return True
    if overwrite:
        return False
    reason = f"lacks {missing} of {len(files)} files" if same else "is another sample set (version, preset or seed)"
    raise UserError(f"{target} {reason}. Give --overwrite to replace it, or another --out.")


def _files(sample_set: SampleSet, shot: Shot, masks: bool) -> Files:
    """File of a shot -> the images that lie side by side in it."""
    return {file: parts for file, parts in sample_set.layout(shot).items() if masks or MASK not in parts}


def _run(write: partial, shots: list[Shot], workers: int) -> Iterator[None]:
    """Call `write` for every shot, in this process or in several."""
    if workers == 1:
        yield from map(write, shots)
        return
    pool = ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        yield from pool.map(write, shots, chunksize=8)
    finally:
        pool.shutdown(cancel_futures=True)


def _write_shot(root: Path, dataset: str, preset: Preset, seed: int, masks: bool, shot: Shot) -> None:
    sample_set = SETS[dataset]
    subject = sample_set.identities(seed, preset, shot.split)[shot.number]
    images, visible = sample_set.render(sample_set.source(seed), shot, subject)
    images[MASK] = np.where(visible >= 0.5, 255, 0).astype(np.uint8)
    for file, parts in _files(sample_set, shot, masks).items():
        picture = Image.fromarray(np.hstack([images[part] for part in parts]))
        picture.save(root / file, quality=JPEG_QUALITY)
