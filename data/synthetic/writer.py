"""Writes the sample data to files, all of a set or nothing."""

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
from PIL import Image, ImageDraw
from tqdm import tqdm

from data.synthetic.imaging import HEIGHT, WIDTH
from data.synthetic.plan import GENERATOR_VERSION, PRESETS, Preset, Shot, plan
from data.synthetic.render import identities, render
from utils.errors import UserError
from utils.modalities import MODALITIES

logger = logging.getLogger(__name__)

DATASET = "RGBNT201"
DESCRIPTION = "sample_data.json"
JPEG_QUALITY = 92


def generate(
    out: str | os.PathLike,
    preset: str | Preset = "mini",
    seed: int = 0,
    workers: int | None = None,
    masks: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write the data set to `out`/RGBNT201 and return `out`.

    Args:
        preset: a name of `PRESETS`, or counts of one's own.
        seed: other seeds give other people in other streets.
        workers: processes that draw; None = one a core.
        masks: also write what is visible of the person to <split>/MASK/*.png (0 or 255).
        overwrite: replace other sample data that is there. Data that this generator did not write is never replaced.

    Raises:
        UserError: for an unknown preset, a negative seed, fewer than one worker, other data in the way, or a place that
            cannot be written.
    """
    out, preset = Path(out), _find_preset(preset)
    if seed < 0:
        raise UserError(f"seed is {seed}: expected 0 or more.")
    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}: expected 1 or more.")
    description = {
        "generator_version": GENERATOR_VERSION,
        "preset": preset.name,
        "seed": seed,
        "masks": masks,
        "counts": preset.counts(),
    }
    shots, target = plan(preset, seed), out / DATASET
    if target.exists() and _is_ready(target, description, shots, overwrite):
        logger.info("%s holds this sample data already (%d triples): nothing to do.", target, len(shots))
        return out
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{DATASET}-", dir=out) as scratch:
            fresh = Path(scratch) / DATASET
            _write_images(fresh, preset, seed, shots, workers or _available_cores(), masks)
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


def contact_sheet(preset: str | Preset = "mini", seed: int = 0, people: int = 6) -> Image.Image:
    """The first test identities, one a row: two frames from each of cameras 1 and 2, in the three modalities."""
    preset = _find_preset(preset)
    people = min(people, preset.splits["test"].num_identities)
    persons = identities(seed, "test", preset.splits["test"].num_identities)
    margin, gap = 16, 2
    sheet = Image.new("RGB", (12 * (WIDTH + gap) - gap, margin + people * (HEIGHT + gap) - gap), "white")
    draw = ImageDraw.Draw(sheet)
    shots = [shot for shot in plan(preset, seed) if shot.split == "test" and shot.number < people]
    for row in range(people):
        chosen = []
        for camera in (1, 2):
            track = [shot for shot in shots if (shot.number, shot.camera) == (row, camera)]
            chosen += [track[0], track[-1]]
        cells = []
        for shot in chosen:
            images, _ = render(seed, shot, persons[row])
            cells += [(f"{shot.pid:06d} cam{shot.camera}", modality, images[modality]) for modality in MODALITIES]
        for column, (caption, modality, image) in enumerate(cells):
            x, y = column * (WIDTH + gap), margin + row * (HEIGHT + gap)
            sheet.paste(Image.fromarray(image), (x, y))
            draw.text((x + 3, y + 2), caption, "white", stroke_width=1, stroke_fill="black")
            draw.text((x + 3, 2), modality, "black")
    return sheet


def _find_preset(preset: str | Preset) -> Preset:
    if isinstance(preset, Preset):
        return preset
    if preset not in PRESETS:
        raise UserError(f"preset is '{preset}': expected one of {', '.join(PRESETS)}.")
    return PRESETS[preset]


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_ready(target: Path, wanted: dict, shots: list[Shot], overwrite: bool) -> bool:
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
    expected = {path for shot in shots for path in _paths(target, shot, wanted["masks"]).values()}
    missing = sum(not path.exists() for path in expected)
    if same and not missing:
        return True
    if overwrite:
        return False
    reason = f"lacks {missing} of {len(expected)} files" if same else "is another sample set (version, preset or seed)"
    raise UserError(f"{target} {reason}. Give --overwrite to replace it, or another --out.")


def _paths(root: Path, shot: Shot, masks: bool) -> dict[str, Path]:
    """Folder name -> file of a shot."""
    paths = {modality: root / shot.split / modality / f"{shot.stem}.jpg" for modality in MODALITIES}
    return paths | {"MASK": root / shot.split / "MASK" / f"{shot.stem}.png"} if masks else paths


def _write_images(root: Path, preset: Preset, seed: int, shots: list[Shot], workers: int, masks: bool) -> None:
    for folder in {path.parent for shot in shots for path in _paths(root, shot, masks).values()}:
        folder.mkdir(parents=True, exist_ok=True)
    write = partial(_write_shot, root, preset, seed, masks)
    for _ in tqdm(
        _run(write, shots, workers), total=len(shots), desc=f"Drawing {preset.name}", unit="triple", disable=None
    ):
        pass


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


def _write_shot(root: Path, preset: Preset, seed: int, masks: bool, shot: Shot) -> None:
    person = identities(seed, shot.split, preset.splits[shot.split].num_identities)[shot.number]
    images, visible = render(seed, shot, person)
    paths = _paths(root, shot, masks)
    for modality in MODALITIES:
        Image.fromarray(images[modality]).save(paths[modality], quality=JPEG_QUALITY)
    if masks:
        Image.fromarray(np.where(visible >= 0.5, 255, 0).astype(np.uint8)).save(paths["MASK"])
