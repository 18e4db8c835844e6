"""Flat drawing, and things that stand in a street: cars, bins, signs, bushes, poles."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from data.synthetic.imaging import CHANNELS, OVERSAMPLING, Layer, Material, layer_from_labels

CAR_COLOURS = (
    (0.75, 0.75, 0.76),
    (0.12, 0.12, 0.14),
    (0.5, 0.1, 0.1),
    (0.15, 0.22, 0.4),
    (0.45, 0.46, 0.47),
    (0.7, 0.66, 0.55),
)
DARK: Material = (0.06, 0.06, 0.07, 0.10, 0.30, 0.0)
RUBBER: Material = (0.07, 0.07, 0.07, 0.08, 0.44, 0.0)
METAL: Material = (0.42, 0.43, 0.45, 0.40, 0.24, 0.0)
WOOD: Material = (0.30, 0.21, 0.14, 0.45, 0.30, 0.0)


class Painter:
    """Draws flat shapes in pixels of the final image; `layer()` gives what was drawn."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.labels = Image.new("I", (width * OVERSAMPLING, height * OVERSAMPLING))
        self._draw = ImageDraw.Draw(self.labels)
        self._materials: list[Material] = []

    def polygon(self, points: list[tuple[float, float]], material: Material) -> None:
        self._draw.polygon([(x * OVERSAMPLING, y * OVERSAMPLING) for x, y in points], fill=self._label(material))

    def box(self, left: float, top: float, right: float, bottom: float, material: Material) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], material)

    def ellipse(self, x: float, y: float, across: float, down: float, material: Material) -> None:
        box = [
            (x - across) * OVERSAMPLING,
            (y - down) * OVERSAMPLING,
            (x + across) * OVERSAMPLING,
            (y + down) * OVERSAMPLING,
        ]
        self._draw.ellipse(box, fill=self._label(material))

    def layer(self, shade: np.ndarray | None = None) -> Layer:
        return layer_from_labels(np.asarray(self.labels), np.array(self._materials).reshape(-1, CHANNELS), shade)

    def _label(self, material: Material) -> int:
        if not self._materials or self._materials[-1] != material:
            self._materials.append(material)
        return len(self._materials)


def tone(rng: np.random.Generator, colour: tuple[float, ...], spread: float = 0.04) -> tuple[float, ...]:
    return tuple(np.clip(np.array(colour) + rng.normal(0, spread) + rng.normal(0, spread / 2, len(colour)), 0.03, 0.95))


def draw_leaves(
    painter: Painter, rng: np.random.Generator, across: tuple[float, float], down: tuple[float, float], count: int
) -> None:
    """Foliage: dark to bright green, bright in near-infrared, cool."""
    shades = np.sort(rng.uniform(0.45, 1.25, count))
    for x, y, shade in zip(rng.uniform(*across, count), rng.uniform(*down, count), shades, strict=True):
        colour = np.clip(np.array([0.21, 0.33, 0.13]) * shade + rng.normal(0, 0.02, 3), 0.02, 0.9)
        size = rng.uniform(2, 7)
        painter.ellipse(
            x, y, size, size * rng.uniform(0.5, 1), (*colour, min(0.9, 0.62 * shade + 0.1), 0.2 + 0.03 * shade, 0.0)
        )


def draw_car(painter: Painter, rng: np.random.Generator, x: float, ground: float, length: float) -> None:
    """A parked car from the side; its wheels and bonnet are warm."""
    height, heat = 0.34 * length, rng.uniform(0.22, 0.34)
    paint: Material = (
        *tone(rng, CAR_COLOURS[rng.integers(len(CAR_COLOURS))], 0.03),
        rng.uniform(0.2, 0.75),
        heat,
        0.0,
    )
    sill, waist, roof = ground - 0.08 * length, ground - 0.6 * height, ground - 1.05 * height

    def along(share: float) -> float:
        return x + share * length

    rear = [(along(0), sill), (along(0.01), waist + 5), (along(0.16), waist), (along(0.3), roof)]
    front = [(along(0.68), roof), (along(0.84), waist), (along(0.98), waist + 5), (along(1), sill)]
    painter.polygon(rear + front, paint)
    painter.polygon(
        [(along(0), sill), (along(0.01), waist + 5), (along(0.2), waist + 1), (along(0.2), sill)],
        (*paint[:4], heat + 0.16, 0.0),
    )
    glass = (0.14, 0.17, 0.2, 0.12, 0.17, 0.0)
    painter.polygon(
        [(along(0.21), waist), (along(0.32), roof + 4), (along(0.48), roof + 4), (along(0.48), waist)], glass
    )
    painter.polygon(
        [(along(0.51), waist), (along(0.51), roof + 4), (along(0.66), roof + 4), (along(0.78), waist)], glass
    )
    painter.box(along(0.01), waist + 8, along(0.05), waist + 13, (0.9, 0.88, 0.8, 0.8, heat, 0.35))
    for wheel in (0.2, 0.79):
        painter.ellipse(along(wheel), ground - 0.08 * length, 0.085 * length, 0.085 * length, RUBBER)
        painter.ellipse(along(wheel), ground - 0.08 * length, 0.045 * length, 0.045 * length, (*METAL[:4], 0.5, 0.0))


def draw_bin(painter: Painter, rng: np.random.Generator, x: float, ground: float, width: float) -> None:
    body: Material = (*tone(rng, (0.16, 0.3, 0.2), 0.08), rng.uniform(0.2, 0.6), 0.27, 0.0)
    painter.polygon(
        [
            (x, ground - 1.7 * width),
            (x + width, ground - 1.7 * width),
            (x + 0.9 * width, ground),
            (x + 0.1 * width, ground),
        ],
        body,
    )
    painter.box(x - 1, ground - 1.85 * width, x + width + 1, ground - 1.65 * width, DARK)


def draw_sign(painter: Painter, rng: np.random.Generator, x: float, ground: float, width: float) -> None:
    painter.box(x - 1.5, ground - 4.6 * width, x + 1.5, ground, METAL)
    colour: Material = (*[(0.7, 0.1, 0.1), (0.12, 0.25, 0.6), (0.8, 0.7, 0.15)][rng.integers(3)], 0.6, 0.22, 0.0)
    painter.ellipse(x, ground - 4.6 * width, width * 0.62, width * 0.62, colour)
    painter.box(
        x - width * 0.36,
        ground - 4.7 * width,
        x + width * 0.36,
        ground - 4.45 * width,
        (0.9, 0.9, 0.88, 0.85, 0.22, 0.0),
    )
