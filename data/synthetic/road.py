"""Where vehicles drive: a road before buildings, and what hides part of a vehicle."""

from __future__ import annotations

import numpy as np

from data.synthetic.imaging import OVERSAMPLING, Layer, smooth_noise
from data.synthetic.props import METAL, WOOD, Painter, draw_leaves, draw_sign, tone
from data.synthetic.scene import Scene, draw_backdrop, draw_objects, texture
from data.synthetic.vehicle import HEIGHT, WIDTH

PANORAMA = 4 * WIDTH
"""Width of a road in pixels; a frame looks at a part of it."""
OCCLUDERS = ("pole", "bush", "guard rail", "sign", "posts")


def sample_road(rng: np.random.Generator) -> Scene:
    """Draw the road of one camera."""
    painter = Painter(HEIGHT, PANORAMA)
    horizon = rng.uniform(14, 46)
    draw_backdrop(painter, rng, horizon)
    _draw_lanes(painter, rng, horizon)
    draw_objects(painter, rng, horizon)
    surface = painter.layer().surface
    texture(surface, rng)
    return Scene(surface, tuple(rng.choice(OCCLUDERS, 3, replace=False)))


def _draw_lanes(painter: Painter, rng: np.random.Generator, horizon: float) -> None:
    """A pavement or verge at the back, a kerb, and asphalt or concrete with lines along it, in perspective."""
    grass = rng.random() < 0.35
    verge = (0.27, 0.36, 0.17, 0.66, 0.26, 0.0) if grass else (*tone(rng, (0.52, 0.5, 0.47)), 0.48, 0.34, 0.0)
    grey, heat = rng.choice([0.22, 0.3, 0.42]), rng.uniform(0.26, 0.42)
    ni = rng.uniform(0.2, 0.4)
    asphalt = tone(rng, (grey, grey, grey + 0.01), 0.03)
    kerb = horizon + rng.uniform(6, 14)
    painter.box(0, horizon, PANORAMA, kerb, verge)
    painter.box(0, kerb, PANORAMA, HEIGHT, (*asphalt, ni, heat, 0.0))
    painter.box(0, kerb, PANORAMA, kerb + 2, (0.6, 0.6, 0.58, 0.55, heat - 0.03, 0.0))
    line = (*[(0.75, 0.75, 0.72), (0.75, 0.62, 0.2)][int(rng.integers(2))], 0.7, heat - 0.02, 0.0)
    for share, dashes in ((0.1, 0), (rng.uniform(0.3, 0.5), 70), (0.88, 0)):
        y, thick = kerb + share * (HEIGHT - kerb), 1.2 + 2.2 * share
        if not dashes:
            painter.box(0, y, PANORAMA, y + thick, line)
            continue
        for x in np.arange(rng.uniform(0, dashes), PANORAMA, dashes):
            painter.polygon(
                [(x, y), (x + 0.5 * dashes, y), (x + 0.5 * dashes + 3, y + thick), (x + 3, y + thick)], line
            )
    for x in rng.uniform(0, PANORAMA, 14):  # patches, stains and tyre marks
        y, shade = rng.uniform(kerb + 6, HEIGHT), rng.uniform(0.75, 1.12)
        patch = (*(np.array(asphalt) * shade), ni * shade, heat + 0.02 * rng.normal(), 0.0)
        painter.ellipse(x, y, rng.uniform(8, 50), rng.uniform(1, 5), patch)


def draw_roadside(kind: str, rng: np.random.Generator) -> Layer:
    """Something between camera and vehicle, over part of the picture."""
    painter, x = Painter(HEIGHT, WIDTH), rng.uniform(0.05, 0.95) * WIDTH
    if kind == "pole":
        width = rng.uniform(5, 14)
        painter.box(x - width / 2, -2, x + width / 2, HEIGHT + 2, METAL if rng.random() < 0.6 else WOOD)
    elif kind == "bush":
        draw_leaves(painter, rng, (x - 50, x + 50), (HEIGHT - rng.uniform(22, 55), HEIGHT), 260)
    elif kind == "guard rail":
        top = HEIGHT - rng.uniform(16, 38)
        painter.box(0, top, WIDTH, top + 9, METAL)
        painter.box(0, top + 4, WIDTH, top + 5.5, (0.25, 0.25, 0.27, 0.22, 0.22, 0.0))
        for post in np.arange(rng.uniform(0, 60), WIDTH, 60):
            painter.box(post, top + 2, post + 5, HEIGHT, METAL)
    elif kind == "posts":
        for post in np.arange(rng.uniform(0, 45), WIDTH, 45):
            top = HEIGHT - 42
            painter.box(post, top, post + 6, HEIGHT, (0.75, 0.74, 0.7, 0.7, 0.27, 0.0))
            painter.box(post, top + 6, post + 6, top + 13, (0.7, 0.12, 0.1, 0.6, 0.27, 0.0))
    else:
        draw_sign(painter, rng, x, HEIGHT + 4, rng.uniform(18, 27))
    shade = 1 + 0.12 * smooth_noise(rng, HEIGHT * OVERSAMPLING, WIDTH * OVERSAMPLING, 6, 6)
    return painter.layer(shade)
