"""How a person is drawn: an identity, a view and a moment of walking become a layer of materials."""

from __future__ import annotations

import numpy as np

from data.synthetic.body import Pose, walk
from data.synthetic.canvas import Canvas, Paint, View
from data.synthetic.identity import LEG_PATTERNS, SLEEVE_PATTERNS, TORSO_PATTERNS, Identity
from data.synthetic.imaging import TI, Layer, layer_from_labels, smooth_noise

SIZE = HEIGHT, WIDTH = 256, 128
"""Size of a picture of a person, in pixels."""
SLEEVES = {"tee": 0.62, "vest": 0.06, "puffer": 2.0}
"""How far a sleeve reaches: 0 shoulder, 1 elbow, 2 wrist; long where nothing is said."""
SLOTS = ("skin", "hands", "hair", "features", "top", "inner", "bottom", "shoes", "soles", "bag", "hat", "socks")
_FIRST = {slot: 4 * number + 1 for number, slot in enumerate(SLOTS)}
"""Label of a slot's first material of four: base, accent, hidden, accent and hidden."""


def draw_person(
    person: Identity, view: View, phase: float, light_side: float, heat_drift: np.ndarray, rng: np.random.Generator
) -> Layer:
    """Draw `person` at `phase` of its walk.

    `heat_drift` (slots,) is how much warmer than usual each piece of clothing is now: wind, sun and walking change that
    from one encounter to the next. `rng` adds what differs from frame to frame (arm swing, folds).
    """
    canvas = Canvas(view, light_side, HEIGHT, WIDTH)
    standing = rng.random() < 0.2
    stride = (
        person.stride * (0.06 if standing else rng.uniform(0.2, 0.4)) * (0.5 if person.bottom == "long skirt" else 1.0)
    )
    pose = walk(phase, stride, person.build, rng.uniform(0.5, 1.0) * stride, rng.uniform(0.1, 0.45))
    _draw_legs(canvas, person, pose)
    _draw_torso(canvas, person, pose)
    _draw_arms(canvas, person, pose)
    _draw_head(canvas, person, pose)
    _draw_bag(canvas, person, pose)
    folds = 0.09 * smooth_noise(rng, *canvas.labels.shape, 22, 14) + 0.06 * smooth_noise(
        rng, *canvas.labels.shape, 9, 5
    )
    materials = np.array([material for slot in SLOTS for material in person.garments[slot].materials])
    materials[:, TI] += np.repeat(heat_drift, len(materials) // len(SLOTS))
    warmth = 0.84 + 0.18 * np.clip(canvas.shade, 0, 1) + 0.35 * folds
    return layer_from_labels(canvas.labels, materials, np.clip(canvas.shade * (1 + folds), 0, 1.3), warmth)


def _labels(person: Identity, slot: str, patterns: dict, azimuth: np.ndarray, position: np.ndarray) -> np.ndarray:
    """The slot's label at each pixel, with accent and hidden cloth where the garment's patterns show."""
    garment = person.garments[slot]
    labels = np.full(azimuth.shape, _FIRST[slot], np.uint8)
    if garment.pattern in patterns:
        labels += patterns[garment.pattern](azimuth, position).astype(np.uint8)
    if garment.hidden in patterns:
        labels += 2 * patterns[garment.hidden](azimuth, position).astype(np.uint8)
    return labels


def _solid(slot: str, offset: int = 0) -> Paint:
    label = _FIRST[slot] + offset
    return lambda azimuth, along: np.full(azimuth.shape, label, np.uint8)


def _draw_legs(canvas: Canvas, person: Identity, pose: Pose) -> None:
    end = {"shorts": 0.85, "skirt": 0.3, "long skirt": 0.3}.get(person.bottom, 1.93)
    loose = {"trousers": 0.006, "wide trousers": 0.02, "shorts": 0.014}.get(person.bottom, 0.0) * person.build

    def paint(start: float) -> Paint:
        def leg(azimuth: np.ndarray, along: np.ndarray) -> np.ndarray:
            position = start + along
            labels = _labels(person, "bottom", LEG_PATTERNS, azimuth, position)
            bare = position > end
            labels[bare] = np.where(position[bare] > 1.72, _FIRST["socks"], _FIRST["skin"])
            return labels

        return leg

    build = 0.5 + 0.5 * person.build
    for limb in pose.legs:
        thigh = np.array([0.058, 0.052, 0.042]) * build + loose
        canvas.tube(limb.root, limb.middle, thigh, None, paint(0.0), round_ends=False)
        shin_loose = loose if end > 1 else 0
        canvas.tube(limb.middle, limb.tip, np.array([0.042, 0.039, 0.031]) * build + shin_loose, None, paint(1.0))
        heel, toe = limb.tip + [0, -0.014, -0.022], limb.tip + [0.012 * limb.side, -0.022, 0.088]
        if person.boots:
            canvas.tube(limb.tip + [0, 0.075, 0], heel, [0.035, 0.034, 0.030], None, _solid("shoes"))
        canvas.tube(heel, toe, [0.027, 0.027, 0.020], None, _solid("shoes"))
        canvas.tube(heel + [0, -0.017, 0], toe + [0, -0.008, 0], [0.022, 0.023, 0.018], None, _solid("soles"))


def _draw_torso(canvas: Canvas, person: Identity, pose: Pose) -> None:
    build, sink = person.build, pose.sink
    puffy = {"puffer": 0.016, "coat": 0.01, "jacket": 0.008, "open jacket": 0.008, "sweater": 0.005}.get(
        person.top, 0.0
    )
    hem = {"shirt": 0.86, "tee": 0.83, "vest": 0.83, "puffer": 0.8}.get(person.top, 0.92)
    stretch = 0.95 if person.top == "coat" else hem

    def paint(azimuth: np.ndarray, along: np.ndarray) -> np.ndarray:
        labels = _labels(person, "top", TORSO_PATTERNS, azimuth, along / stretch)
        if person.top == "open jacket":
            labels[np.abs(azimuth) < 0.5] = _FIRST["inner"]
        labels[(along < 0.075) & (np.abs(azimuth) < 0.8)] = _FIRST["skin"]
        below = along > hem
        labels[below] = _labels(person, "bottom", LEG_PATTERNS, azimuth[below], along[below] * 0)
        labels[_strap(person, azimuth, along)] = _FIRST["bag"]
        return labels

    widths = np.array([0.040, 0.070, 0.100, 0.098, 0.086, 0.081, 0.089, 0.094, 0.070]) * build + puffy
    depths = np.array([0.042, 0.054, 0.064, 0.070, 0.066, 0.062, 0.067, 0.072, 0.056]) * (0.3 + 0.7 * build) + puffy
    at = [0.0, 0.055, 0.12, 0.3, 0.5, 0.62, 0.76, 0.87, 1.0]
    canvas.tube([0, 0.85 - sink, 0.005], [0, 0.47 - sink, 0], widths, depths, paint, at, round_ends=False)
    if person.bottom in ("skirt", "long skirt"):
        low, flare = (0.29, 0.132) if person.bottom == "skirt" else (0.1, 0.15)
        skirt = lambda azimuth, along: _labels(person, "bottom", LEG_PATTERNS, azimuth, along * 1.2)  # noqa: E731
        canvas.tube(
            [0, 0.55 - sink, 0],
            [0, low - sink, 0],
            np.array([0.092, 0.108, flare]) * build,
            [0.076, 0.1, 0.135],
            skirt,
            round_ends=False,
        )
    if person.top == "coat":
        tail = lambda azimuth, along: _labels(person, "top", TORSO_PATTERNS, azimuth, 0.95 + 0.3 * along)  # noqa: E731
        canvas.tube(
            [0, 0.56 - sink, 0],
            [0, 0.33 - sink, 0],
            np.array([0.104, 0.113, 0.128]) * build,
            [0.084, 0.1, 0.118],
            tail,
            round_ends=False,
        )


def _strap(person: Identity, azimuth: np.ndarray, along: np.ndarray) -> np.ndarray:
    """Where straps of the bag run over the torso."""
    if person.bag == "backpack":
        return (np.abs(np.abs(azimuth) - 0.72) < 0.13) & (along < 0.5)
    if person.bag == "crossbody":
        return np.abs(along - 0.45 - person.bag_side * 0.4 * np.sin(azimuth)) < 0.028
    return np.zeros(azimuth.shape, bool)


def _draw_arms(canvas: Canvas, person: Identity, pose: Pose) -> None:
    reach = SLEEVES.get(person.top, 1.93)
    puffy = {"puffer": 0.013, "coat": 0.008, "jacket": 0.007, "open jacket": 0.007, "sweater": 0.005, "tee": 0.006}.get(
        person.top, 0.003
    )
    build = 0.5 + 0.5 * person.build

    def paint(start: float) -> Paint:
        def sleeve(azimuth: np.ndarray, along: np.ndarray) -> np.ndarray:
            position = start + along
            labels = _labels(person, "top", SLEEVE_PATTERNS, azimuth, position)
            labels[position > reach] = _FIRST["skin"]
            return labels

        return sleeve

    for limb in pose.arms:
        upper = np.array([0.037, 0.032, 0.028]) * build + puffy * (reach > 0.3)
        canvas.tube(limb.root, limb.middle, upper, None, paint(0.0))
        canvas.tube(
            limb.middle, limb.tip, np.array([0.030, 0.028, 0.021]) * build + puffy * (reach > 1), None, paint(1.0)
        )
        hand = limb.tip + 0.35 * (limb.tip - limb.middle)
        canvas.tube(limb.tip, hand, [0.018, 0.021, 0.014], None, _solid("hands"))


def _draw_head(canvas: Canvas, person: Identity, pose: Pose) -> None:
    sink = pose.sink
    glasses, beard = person.features
    hairline = {"cropped": 0.14}.get(person.hair, 0.25)
    nape = {"cropped": 0.3, "short": 0.62, "bun": 0.66, "ponytail": 0.66}.get(person.hair, 0.95)
    sides = {"bob": 1.0, "long": 1.0}.get(person.hair, 1.35)

    def face(azimuth: np.ndarray, along: np.ndarray) -> np.ndarray:
        labels = np.full(azimuth.shape, _FIRST["skin"], np.uint8)
        front = np.abs(azimuth)
        labels[(np.abs(along - 0.47) < 0.035) & (np.abs(front - 0.42) < 0.17)] = _FIRST["features"]
        labels[(np.abs(along - 0.78) < 0.018) & (front < 0.3)] = _FIRST["features"]
        if glasses:
            labels[(np.abs(along - 0.47) < np.where((front > 0.12) & (front < 0.75), 0.05, 0.014)) & (front < 1.3)] = (
                _FIRST["features"]
            )
        if beard:
            labels[(along > 0.7) & (front < 1.3)] = _FIRST["hair"]
        labels[(along < hairline + 0.06 * np.cos(2 * azimuth)) | ((front > sides) & (along < nape))] = _FIRST["hair"]
        if person.hat in ("cap", "beanie"):
            labels[along < 0.31] = _FIRST["hat"]
        if person.hat == "hood":
            labels[(front > 0.85) | (along < 0.2)] = _FIRST["hat"]
        return labels

    volume = {"short": 0.003, "bob": 0.008, "long": 0.006}.get(person.hair, 0.0) + {"beanie": 0.005, "hood": 0.009}.get(
        person.hat, 0.0
    )
    round_profile = np.array([0.35, 0.72, 0.93, 1.0, 0.98, 0.9, 0.76, 0.45])
    canvas.tube([0, 0.875 - sink, -0.005], [0, 0.82 - sink, -0.005], [0.030, 0.034], None, _solid("skin"))
    canvas.tube(
        [0, 1.0 + volume - sink, 0.004],
        [0, 0.862 - sink, 0.012],
        0.050 * round_profile + volume,
        0.061 * round_profile + volume,
        face,
        at=[0.0, 0.1, 0.24, 0.42, 0.58, 0.74, 0.88, 1.0],
        round_ends=False,
    )
    if person.hair in ("long", "bob") and person.hat != "hood":
        low = 0.74 if person.hair == "long" else 0.845
        canvas.tube(
            [0, 0.95 - sink, -0.022], [0, low - sink, -0.05], [0.047, 0.057, 0.05], [0.042, 0.04, 0.026], _solid("hair")
        )
    if person.hair == "ponytail" and person.hat != "hood":
        canvas.tube([0, 0.955 - sink, -0.06], [0, 0.80 - sink, -0.092], [0.016, 0.024, 0.012], None, _solid("hair"))
    if person.hair == "bun" and person.hat in ("none", "cap"):
        canvas.tube([0, 0.975 - sink, -0.06], [0, 0.965 - sink, -0.064], [0.028, 0.028], None, _solid("hair"))
    if person.hat == "cap":
        canvas.tube([0, 0.957 - sink, 0.04], [0, 0.949 - sink, 0.098], [0.044, 0.036], [0.008, 0.005], _solid("hat"))
    if person.hat == "beanie":
        canvas.tube([0, 1.008 - sink, -0.002], [0, 0.99 - sink, -0.002], [0.02, 0.03], None, _solid("hat"))
    if person.hat == "hood":
        canvas.tube([0, 0.88 - sink, -0.03], [0, 0.835 - sink, -0.035], [0.056, 0.068], [0.045, 0.05], _solid("hat"))


def _draw_bag(canvas: Canvas, person: Identity, pose: Pose) -> None:
    sink, side = pose.sink, person.bag_side

    def paint(azimuth: np.ndarray, along: np.ndarray) -> np.ndarray:
        return _labels(person, "bag", TORSO_PATTERNS, azimuth, along)

    if person.bag == "backpack":
        canvas.tube(
            [0, 0.80 - sink, -0.115],
            [0, 0.57 - sink, -0.125],
            [0.07, 0.088, 0.09, 0.08],
            [0.04, 0.055, 0.06, 0.05],
            paint,
        )
    elif person.bag in ("shoulder bag", "crossbody"):
        x, top = side * (0.108 * person.build + 0.02), 0.58 if person.bag == "shoulder bag" else 0.535
        canvas.tube(
            [x, top - sink, 0.02], [x, top - 0.125 - sink, 0.02], [0.026, 0.034, 0.034], [0.07, 0.082, 0.08], paint
        )
        if person.bag == "shoulder bag":
            canvas.tube(
                [side * 0.1 * person.build, 0.83 - sink, 0.0],
                [x + 0.012 * side, 0.55 - sink, 0.02],
                [0.009, 0.009],
                None,
                _solid("bag"),
            )
    elif person.bag == "tote":
        hand = pose.arms[0 if side == 1 else 1].tip + [0, -0.045, 0]
        canvas.tube(hand, hand + [0, -0.045, 0], [0.006, 0.014], [0.02, 0.05], _solid("bag"), round_ends=False)
        canvas.tube(
            hand + [0, -0.045, 0],
            hand + [0, -0.19, 0],
            [0.026, 0.032, 0.032],
            [0.068, 0.078, 0.08],
            paint,
            round_ends=False,
        )
