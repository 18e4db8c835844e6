"""Where people walk: a pavement before buildings, and what hides part of a person."""

from __future__ import annotations

import numpy as np

from data.synthetic.imaging import OVERSAMPLING, Layer, smooth_noise
from data.synthetic.person import HEIGHT, WIDTH
from data.synthetic.props import METAL, WOOD, Painter, draw_bin, draw_car, draw_leaves, draw_sign, tone
from data.synthetic.scene import Scene, draw_backdrop, draw_objects, texture

PANORAMA = 6 * WIDTH
"""Width of a street in pixels; a frame looks at a part of it."""
OCCLUDERS = ("pole", "bush", "car", "railing", "bin", "sign")


def sample_street(rng: np.random.Generator) -> Scene:
    """Draw the street of one camera."""
    painter = Painter(HEIGHT, PANORAMA)
    horizon = rng.uniform(62, 118)
    draw_backdrop(painter, rng, horizon)
    _draw_pavement(painter, rng, horizon)
    draw_objects(painter, rng, horizon)
    surface = painter.layer().surface
    texture(surface, rng)
    return Scene(surface, tuple(rng.choice(OCCLUDERS, 3, replace=False)))


def _draw_pavement(painter: Painter, rng: np.random.Generator, horizon: float) -> None:
    """A pavement of one kind from the horizon to the viewer, its joints in perspective, behind it a kerb and a road."""
    kind = rng.choice(["asphalt", "slabs", "cobbles", "grass"], p=[0.3, 0.35, 0.2, 0.15])
    base = {
        "asphalt": (0.31, 0.31, 0.32),
        "slabs": (0.56, 0.54, 0.5),
        "cobbles": (0.43, 0.4, 0.37),
        "grass": (0.27, 0.36, 0.17),
    }[kind]
    colour = tone(rng, base, 0.04)
    ni = {"asphalt": 0.28, "slabs": 0.5, "cobbles": 0.4, "grass": 0.68}[kind]
    heat = {"asphalt": 0.38, "slabs": 0.34, "cobbles": 0.36, "grass": 0.24}[kind] + rng.uniform(-0.04, 0.04)
    painter.box(0, horizon, PANORAMA, HEIGHT, (*colour, ni, heat, 0.0))
    strip = horizon + rng.uniform(10, 26)
    painter.box(0, horizon, PANORAMA, strip, (*tone(rng, (0.26, 0.26, 0.27)), 0.25, heat + 0.03, 0.0))
    painter.box(0, strip, PANORAMA, strip + 4, (*tone(rng, (0.64, 0.63, 0.6)), 0.55, heat - 0.02, 0.0))
    joint = (*(np.array(colour) * 0.72), ni * 0.75, heat - 0.01, 0.0)
    if kind in ("slabs", "cobbles"):
        spacing, vanish = (0.16, 34) if kind == "slabs" else (0.08, 15)
        distance = 1.0
        while (y := strip + 5 + (HEIGHT - strip) * (1 / distance - 0.28)) > strip + 5:
            if y < HEIGHT:
                painter.box(0, y, PANORAMA, y + 1.2, joint)
            distance += spacing
        for x in np.arange(-PANORAMA, 2.0 * PANORAMA, vanish):
            far = PANORAMA / 2 + (x - PANORAMA / 2) * 0.72
            painter.polygon([(far, strip + 5), (far + 0.8, strip + 5), (x + 1.6, HEIGHT), (x, HEIGHT)], joint)
    if kind == "asphalt":
        for x in np.arange(rng.uniform(0, 90), PANORAMA, 150):
            painter.polygon(
                [(x, 200), (x + 70, 200), (x + 78, 209), (x + 2, 209)], (0.72, 0.72, 0.7, 0.65, heat - 0.03, 0.0)
            )
    if kind == "grass":
        for x, y in zip(rng.uniform(0, PANORAMA, 2200), rng.uniform(strip + 6, HEIGHT, 2200), strict=True):
            shade = rng.uniform(0.6, 1.3)
            painter.polygon(
                [(x, y), (x + 1.5, y), (x + rng.uniform(-1, 2.5), y - 5)],
                (*(np.array(colour) * shade), ni * (0.6 + 0.4 * shade), heat, 0.0),
            )


def draw_occluder(kind: str, rng: np.random.Generator) -> Layer:
    """Something between camera and person, over part of the picture."""
    painter, x = Painter(HEIGHT, WIDTH), rng.uniform(0.1, 0.9) * WIDTH
    if kind == "pole":
        width = rng.uniform(6, 14)
        painter.box(x - width / 2, -2, x + width / 2, HEIGHT + 2, METAL if rng.random() < 0.6 else WOOD)
    elif kind == "bush":
        draw_leaves(painter, rng, (x - 40, x + 40), (HEIGHT - rng.uniform(50, 105), HEIGHT), 260)
    elif kind == "car":
        draw_car(painter, rng, x - rng.choice([0.0, 1.0]) * 210 + rng.uniform(-25, 25), HEIGHT + 22, 210)
    elif kind == "railing":
        top = HEIGHT - rng.uniform(55, 95)
        painter.box(0, top, WIDTH, top + 5, METAL)
        for bar in np.arange(rng.uniform(0, 16), WIDTH, 16):
            painter.box(bar, top, bar + 3, HEIGHT, METAL)
    elif kind == "bin":
        draw_bin(painter, rng, x - 24, HEIGHT + 8, rng.uniform(38, 54))
    else:
        draw_sign(painter, rng, x, HEIGHT + 4, rng.uniform(34, 46))
    shade = 1 + 0.12 * smooth_noise(rng, HEIGHT * OVERSAMPLING, WIDTH * OVERSAMPLING, 6, 6)
    return painter.layer(shade)
