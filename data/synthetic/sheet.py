"""A picture of some identities of a data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data.synthetic.plan import Preset, Shot, plan
from data.synthetic.sets import find_set
from utils.modalities import MODALITIES


def contact_sheet(
    preset: str | Preset = "mini", seed: int = 0, rows: int = 6, dataset: str = "RGBNT201"
) -> Image.Image:
    """Test identities, one a row: frames from the first two places that saw each, in the three modalities.

    Upright pictures are shown in two frames a place, wide ones in one.
    """
    sample_set = find_set(dataset)
    preset = sample_set.find_preset(preset)
    split = list(preset.splits)[-1]
    identities = sample_set.identities(seed, preset, split)
    tracks: dict[int, dict[int, list[Shot]]] = {}
    for shot in plan(preset, sample_set.source(seed)):
        if shot.split == split:
            tracks.setdefault(shot.number, {}).setdefault(shot.place, []).append(shot)
    height, width = sample_set.size
    numbers = [number for number, places in tracks.items() if len(places) > 1][:rows]
    cells = []
    for number in numbers:
        row = []
        for track in list(tracks[number].values())[:2]:
            for shot in (track[0], track[-1]) if height > width else track[:1]:
                images, _ = sample_set.render(sample_set.source(seed), shot, identities[number])
                caption = Path(next(iter(sample_set.layout(shot)))).stem
                row += [(caption, modality, images[modality]) for modality in MODALITIES]
        cells.append(row)
    return _tabulate(cells)


def _tabulate(cells: list[list[tuple[str, str, np.ndarray]]], margin: int = 16, gap: int = 2) -> Image.Image:
    """Images of one size in rows, the modality over each column and a caption in each cell."""
    height, width = cells[0][0][2].shape[:2]
    size = (len(cells[0]) * (width + gap) - gap, margin + len(cells) * (height + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, line in enumerate(cells):
        for column, (caption, modality, image) in enumerate(line):
            x, y = column * (width + gap), margin + row * (height + gap)
            sheet.paste(Image.fromarray(image), (x, y))
            draw.text((x + 3, y + 2), caption, "white", stroke_width=1, stroke_fill="black")
            draw.text((x + 3, 2), modality, "black")
    return sheet
