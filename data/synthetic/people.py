"""From a shot to its three images of a person: where, in which light, seen how."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from data.synthetic.canvas import View
from data.synthetic.identity import Identity, sample_identity
from data.synthetic.imaging import LIGHTS, OVERSAMPLING, Camera, cast_shadow, compose, record
from data.synthetic.person import HEIGHT, SLOTS, WIDTH, draw_person
from data.synthetic.plan import Shot, Source, generator
from data.synthetic.scene import Scene
from data.synthetic.street import draw_occluder, sample_street

OCCLUSION, PASSER_BY = 0.24, 0.15
"""How often something stands before the person, and how often somebody walks behind."""
HEAT_DRIFT = 0.04
"""How much the temperature of a piece of clothing differs between two tracks of its wearer (standard deviation)."""


@lru_cache(maxsize=16)
def _place(source: Source, camera: int) -> tuple[Camera, Scene]:
    """A camera (counted from 1) and the street that it watches."""
    rng = generator(source, "camera", camera)
    return Camera.sample(rng, camera - 1), sample_street(rng)


def render_person(source: Source, shot: Shot, person: Identity) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The images of one shot, modality -> (H, W, 3) uint8, and the share of each pixel that shows the person (H, W)."""
    camera, scene = _place(source, shot.place)
    key = (shot.split, shot.number, shot.camera)
    track = generator(source, "track", *key)
    sequence = generator(source, "sequence", *key, shot.sequence)
    rng = generator(source, "frame", *key, shot.index)

    light = LIGHTS[tuple(LIGHTS)[track.choice(3, p=camera.lights)]]
    light_side = float(track.choice([-1, 1])) * light.contrast
    pace = track.uniform(0.7, 1.3)
    heat_drift = track.normal(0, HEAT_DRIFT, len(SLOTS))
    heading = track.uniform(0, 2 * math.pi) + 0.75 * math.pi * (shot.sequence - 1) + sequence.normal(0, 0.3)
    position = np.clip(sequence.uniform(0, 1) + rng.normal(0, 0.02), 0, 1)

    size = HEIGHT * camera.scale * person.height**0.6 * rng.normal(1, 0.025)
    view = View(
        yaw=heading + rng.normal(0, 0.22),
        pitch=camera.pitch,
        scale=OVERSAMPLING * size / math.cos(camera.pitch),
        x=OVERSAMPLING * (WIDTH / 2 + rng.normal(0, 4)),
        ground=OVERSAMPLING * (HEIGHT - 7 + rng.normal(0, 3)),
    )
    surface = scene.crop(float(position), WIDTH)
    if rng.random() < PASSER_BY:
        other = _beside(view, rng)
        surface = compose(
            surface, draw_person(sample_identity(rng), other, rng.uniform(0, 6), light_side, heat_drift, rng)
        )
    surface = cast_shadow(surface, view.x / OVERSAMPLING, view.ground / OVERSAMPLING, 34, 0.25 + 0.35 * light.contrast)
    phase = 1.9 * pace * shot.index + rng.uniform(-0.4, 0.4)
    figure = draw_person(person, view, phase, light_side, heat_drift, rng)
    surface, visible = compose(surface, figure), figure.alpha
    if rng.random() < OCCLUSION:
        obstacle = draw_occluder(scene.occluders[rng.integers(len(scene.occluders))], rng)
        surface, visible = compose(surface, obstacle), visible * (1 - obstacle.alpha)
    return record(surface, camera, light, rng), visible


def _beside(view: View, rng: np.random.Generator) -> View:
    """Farther away, to the left or to the right."""
    size = rng.uniform(0.6, 0.85)
    return View(
        yaw=rng.uniform(0, 2 * math.pi),
        pitch=view.pitch,
        scale=view.scale * size,
        x=view.x + rng.choice([-1, 1]) * OVERSAMPLING * rng.uniform(36, 62),
        ground=view.ground - OVERSAMPLING * (1 - size) * 0.55 * HEIGHT,
    )
