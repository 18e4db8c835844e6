"""From a shot to its three images of a vehicle: where, in which light, seen how."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from data.synthetic.canvas import View
from data.synthetic.imaging import LIGHTS, OVERSAMPLING, Camera, add_halo, cast_shadow, compose, record
from data.synthetic.plan import Shot, Source, generator
from data.synthetic.road import draw_roadside, sample_road
from data.synthetic.scene import Scene
from data.synthetic.vehicle import HEIGHT, SLOTS, WIDTH, draw_vehicle, headlight_places
from data.synthetic.vehicle_body import BODIES
from data.synthetic.vehicle_identity import Vehicle

OCCLUSION = 0.22
"""How often something stands before the vehicle."""
HEAT_DRIFT = 0.03
"""How much the temperature of a part differs between two tracks of a vehicle (standard deviation)."""


@lru_cache(maxsize=32)
def _place(source: Source, place: int) -> tuple[Camera, Scene, float, float]:
    """A camera or scene (counted from 1), its road, how far it looks down, and where the road leads (radians)."""
    rng = generator(source, "place", place)
    return Camera.sample(rng, place - 1), sample_road(rng), rng.uniform(0.08, 0.32), rng.uniform(0, math.pi)


def render_vehicle(source: Source, shot: Shot, vehicle: Vehicle) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The images of one shot, modality -> (H, W, 3) uint8, and the share of each pixel that shows the vehicle (H, W).

    A camera sees vehicles drive up or down its road; in a scene, `shot.camera` is the view, in steps of 45 degrees.
    """
    camera, scene, pitch, road = _place(source, shot.place)
    key = (shot.split, shot.number, shot.place)
    track = generator(source, "track", *key)
    sequence = generator(source, "sequence", *key, shot.sequence)
    rng = generator(source, "frame", *key, shot.index)

    light = LIGHTS[tuple(LIGHTS)[track.choice(3, p=camera.lights)]]
    light_side = float(track.choice([-1, 1])) * light.contrast
    running = track.uniform(0.55, 1.0) if track.random() < 0.8 else track.uniform(0, 0.25)
    lamps = light.glow > 0 or track.random() < 0.15
    drift = track.normal(0, HEAT_DRIFT, len(SLOTS))
    upwards = math.pi * track.integers(2)
    heading = road + upwards + sequence.normal(0, 0.22) if shot.scene is None else shot.camera * math.pi / 4
    position = np.clip(sequence.uniform(0, 1) + rng.normal(0, 0.02), 0, 1)

    view = _frame_view(vehicle, camera, heading + rng.normal(0, 0.09), pitch + rng.normal(0, 0.02), rng)
    surface = scene.crop(float(position), WIDTH)
    x, ground = view.x / OVERSAMPLING, view.ground / OVERSAMPLING
    reach = 0.5 * BODIES[vehicle.body].length * view.scale / OVERSAMPLING
    surface = cast_shadow(surface, x, ground, reach * (0.45 + 0.45 * abs(math.sin(view.yaw))), 0.75)
    figure = draw_vehicle(vehicle, view, light_side, running, lamps, drift, rng)
    surface, visible = compose(surface, figure), figure.alpha
    if lamps:
        for x, y, _ in headlight_places(vehicle, view):
            strength = rng.uniform(0.3, 1.0) * math.cos(view.yaw)
            surface = add_halo(surface, x / OVERSAMPLING, y / OVERSAMPLING, rng.uniform(5, 11), strength)
    if rng.random() < OCCLUSION:
        obstacle = draw_roadside(scene.occluders[rng.integers(len(scene.occluders))], rng)
        surface, visible = compose(surface, obstacle), visible * (1 - obstacle.alpha)
    return record(surface, camera, light, rng), visible


def _frame_view(vehicle: Vehicle, camera: Camera, yaw: float, pitch: float, rng: np.random.Generator) -> View:
    """The view in which the vehicle fills the picture, as the crop of a detector does, not quite exactly."""
    body = BODIES[vehicle.body]
    across = body.length * abs(math.sin(yaw)) + body.width * abs(math.cos(yaw))
    deep = body.length * abs(math.cos(yaw)) + body.width * abs(math.sin(yaw))
    above = body.height * math.cos(pitch) + 0.3 * deep * math.sin(pitch)  # of the middle of the vehicle's footprint
    below = 0.5 * deep * math.sin(pitch)
    fill = camera.scale * rng.normal(1, 0.03)
    scale = fill * min(0.98 * WIDTH / across, 0.98 * HEIGHT / (above + below))
    return View(
        yaw=yaw,
        pitch=pitch,
        scale=OVERSAMPLING * scale,
        x=OVERSAMPLING * (WIDTH / 2 + rng.normal(0, 5)),
        ground=OVERSAMPLING * (HEIGHT / 2 + scale * (above - below) / 2 + rng.normal(0, 2)),
    )
