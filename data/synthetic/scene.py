"""Where it happens: a place seen by one camera, drawn as a wide panorama, and the things that stand in the way.

Scenes are drawn with flat materials and then textured; they know nothing of who passes through them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.synthetic.imaging import REFLECTANCE, TI, smooth_noise
from data.synthetic.props import DARK, METAL, WOOD, Painter, draw_bin, draw_car, draw_leaves, draw_sign, tone


@dataclass(frozen=True)
class Scene:
    """A panorama (H, width, 6), and what stands in the way of this camera."""

    panorama: np.ndarray
    occluders: tuple[str, ...]

    def crop(self, position: float, width: int) -> np.ndarray:
        """The (H, W, 6) part at `position` in [0, 1] from the left end to the right."""
        left = round(position * (self.panorama.shape[1] - width))
        return self.panorama[:, left : left + width].copy()


def texture(surface: np.ndarray, rng: np.random.Generator) -> None:
    """Uneven reflectance, coarse and fine, and uneven heat, on a surface (H, W, 6) of flat materials."""
    height, width = surface.shape[:2]
    grain = 0.10 * smooth_noise(rng, height, width, 28, 34) + 0.07 * smooth_noise(rng, height, width, 7, 7)
    grain += 0.07 * smooth_noise(rng, height, width, 2, 2)
    surface[..., REFLECTANCE] *= 1 + grain[..., None]
    surface[..., TI] += 0.025 * smooth_noise(rng, height, width, 30, 40)


def draw_backdrop(painter: Painter, rng: np.random.Generator, horizon: float) -> None:
    """Buildings, walls, shops and trees side by side."""
    kinds = list(rng.permutation(["brick", "office", "shop", "concrete", "hedge", "trees", "tiles"])[:4])
    x, number = -20.0, 0
    while x < painter.width:
        width = rng.uniform(110, 240)
        _BACKDROPS[kinds[number % len(kinds)]](painter, rng, x, x + width, horizon)
        x, number = x + width, number + 1


def _draw_brick(painter: Painter, rng: np.random.Generator, left: float, right: float, foot: float) -> None:
    colour = tone(rng, [(0.48, 0.26, 0.2), (0.56, 0.42, 0.33), (0.4, 0.3, 0.28), (0.62, 0.57, 0.5)][rng.integers(4)])
    ni, heat = rng.uniform(0.35, 0.6), rng.uniform(0.28, 0.38)
    painter.box(left, 0, right, foot, (*colour, ni, heat, 0.0))
    mortar = (*(np.array(colour) * 0.78), ni * 0.85, heat - 0.01, 0.0)
    for row, y in enumerate(np.arange(0, foot, 7)):
        painter.box(left, y, right, y + 1, mortar)
        for x in np.arange(left + 6 * (row % 2), right, 12):
            painter.box(x, y, x + 1, y + 7, mortar)
    _draw_windows(painter, rng, left, right, foot, 26, 38, 50)


def _draw_office(painter: Painter, rng: np.random.Generator, left: float, right: float, foot: float) -> None:
    painter.box(left, 0, right, foot, (*tone(rng, (0.55, 0.56, 0.57), 0.08), 0.5, rng.uniform(0.24, 0.34), 0.0))
    _draw_windows(painter, rng, left, right, foot, 22, 30, 30)


def _draw_windows(
    painter: Painter,
    rng: np.random.Generator,
    left: float,
    right: float,
    foot: float,
    width: float,
    height: float,
    step: float,
) -> None:
    frame = (*tone(rng, (0.6, 0.6, 0.58), 0.15), 0.5, 0.3, 0.0)
    for y in np.arange(foot - height - 14, -height, -(height + 14)):
        for x in np.arange(left + 8, right - width, step):
            lit = 0.75 if rng.random() < 0.25 else 0.0
            painter.box(x - 2, y - 2, x + width + 2, y + height + 2, frame)
            painter.box(
                x, y, x + width, y + height, (*tone(rng, (0.22, 0.27, 0.32), 0.05), 0.16, 0.2 + 0.1 * (lit > 0), lit)
            )
            painter.box(x + width / 2 - 1, y, x + width / 2 + 1, y + height, frame)


def _draw_shop(painter: Painter, rng: np.random.Generator, left: float, right: float, foot: float) -> None:
    painter.box(left, 0, right, foot, (*tone(rng, (0.5, 0.47, 0.43), 0.1), 0.45, 0.32, 0.0))
    glass = (*tone(rng, (0.35, 0.37, 0.36), 0.06), 0.25, 0.36, 0.5)
    for x in np.arange(left + 6, right - 40, 58):
        painter.box(x, foot - 62, x + 50, foot - 8, glass)
        for _ in range(5):
            colour = rng.uniform(0.15, 0.8, 3)
            width, height = rng.uniform(5, 13), rng.uniform(8, 26)
            spot = x + rng.uniform(0, 50 - width)
            painter.box(spot, foot - 9 - height, spot + width, foot - 9, (*colour, rng.uniform(0.2, 0.7), 0.36, 0.35))
        painter.box(x + 24, foot - 62, x + 26, foot - 8, METAL)
    sign = (*rng.uniform(0.15, 0.8, 3), rng.uniform(0.3, 0.7), 0.34, 0.6)
    painter.box(left + 4, foot - 82, right - 8, foot - 66, sign)
    for x in np.arange(left + 14, right - 30, 11):
        painter.box(x, foot - 78, x + rng.uniform(3, 8), foot - 70, (0.9, 0.9, 0.85, 0.8, 0.34, 0.9))


def _draw_concrete(painter: Painter, rng: np.random.Generator, left: float, right: float, foot: float) -> None:
    colour = tone(rng, (0.55, 0.54, 0.51), 0.07)
    painter.box(left, 0, right, foot, (*colour, 0.5, rng.uniform(0.26, 0.36), 0.0))
    seam = (*(np.array(colour) * 0.7), 0.38, 0.27, 0.0)
    for x in np.arange(left, right, 46):
        painter.box(x, 0, x + 1.5, foot, seam)
    for y in np.arange(foot - 40, 0, -40):
        painter.box(left, y, right, y + 1.5, seam)
    for _ in range(3):  # posters and graffiti
        x, y = rng.uniform(left, right - 24), rng.uniform(foot - 70, foot - 34)
        painter.box(
            x,
            y,
            x + rng.uniform(12, 26),
            y + rng.uniform(16, 30),
            (*rng.uniform(0.15, 0.8, 3), rng.uniform(0.2, 0.7), 0.3, 0.0),
        )


def _draw_tiles(painter: Painter, rng: np.random.Generator, left: float, right: float, foot: float) -> None:
    first, second = tone(rng, (0.68, 0.68, 0.64), 0.08), tone(rng, (0.45, 0.52, 0.55), 0.1)
    painter.box(left, 0, right, foot, (*first, 0.62, 0.3, 0.0))
    for row, y in enumerate(np.arange(foot - 12, -12, -12)):
        for column, x in enumerate(np.arange(left, right, 12)):
            if row % 6 == 2 or (row + column) % 9 == 0:
                painter.box(x + 1, y + 1, x + 12, y + 12, (*second, 0.45, 0.3, 0.0))
            else:
                painter.box(x + 1, y + 1, x + 12, y + 12, (*(np.array(first) * rng.uniform(0.9, 1.08)), 0.6, 0.3, 0.0))


def _draw_hedge(painter: Painter, rng: np.random.Generator, left: float, right: float, foot: float) -> None:
    painter.box(left, 0, right, foot, (*tone(rng, (0.66, 0.75, 0.84), 0.05), 0.35, 0.08, 0.1))
    draw_leaves(painter, rng, (left, right), (foot - 62, foot), 420)


def _draw_trees(painter: Painter, rng: np.random.Generator, left: float, right: float, foot: float) -> None:
    painter.box(left, 0, right, foot, (*tone(rng, (0.62, 0.7, 0.78), 0.06), 0.32, 0.07, 0.1))
    draw_leaves(painter, rng, (left, right), (foot - 26, foot), 130)
    for x in np.arange(left + 14, right, 44):
        painter.box(x, foot - 70, x + rng.uniform(5, 9), foot + 3, WOOD)
        draw_leaves(painter, rng, (x - 24, x + 30), (foot - 130, foot - 48), 160)


_BACKDROPS = {
    "brick": _draw_brick, "office": _draw_office, "shop": _draw_shop, "concrete": _draw_concrete, "hedge": _draw_hedge,
    "trees": _draw_trees, "tiles": _draw_tiles,
}  # fmt: skip


def draw_objects(painter: Painter, rng: np.random.Generator, horizon: float) -> None:
    """Things at the back of the pavement."""
    kinds = rng.permutation(
        ["car", "car", "pole", "pole", "tree", "bin", "sign", "lamp", "bench", "bollards", "doorway"]
    )
    places = np.linspace(10, painter.width - 90, len(kinds)) + rng.uniform(-14, 14, len(kinds))
    for x, kind in zip(places, kinds, strict=True):
        base = horizon + rng.uniform(8, 24)
        if kind == "car":
            draw_car(painter, rng, x, base + 12, rng.uniform(110, 140))
        elif kind in ("pole", "lamp"):
            width = rng.uniform(3, 6)
            painter.box(x, 0 if kind == "pole" else base - 150, x + width, base, METAL if rng.random() < 0.5 else WOOD)
            if kind == "lamp":
                painter.ellipse(x + width / 2, max(8, base - 150), 9, 5, (0.9, 0.88, 0.75, 0.8, 0.5, 1.0))
        elif kind == "tree":
            painter.box(x, base - 120, x + 9, base, WOOD)
            draw_leaves(painter, rng, (x - 34, x + 42), (base - 190, base - 70), 240)
        elif kind == "bin":
            draw_bin(painter, rng, x, base + 6, 22)
        elif kind == "sign":
            draw_sign(painter, rng, x, base, 20)
        elif kind == "bench":
            for y in (base - 24, base - 17, base - 8):
                painter.box(x, y, x + 58, y + 4, WOOD)
            for leg in (x + 5, x + 50):
                painter.box(leg, base - 24, leg + 3, base + 4, DARK)
        elif kind == "bollards":
            for post in np.arange(x, x + 60, 20):
                painter.box(post, base - 26, post + 5, base, METAL)
        else:
            painter.box(x, base - 96, x + 40, base - 8, WOOD)
            painter.box(x + 3, base - 92, x + 37, base - 8, (*rng.uniform(0.1, 0.5, 3), 0.35, 0.36, 0.0))
