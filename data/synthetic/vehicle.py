"""How a vehicle is drawn: an identity and a view become a layer of materials.

The body is lofted from cross-sections; lights, windows, doors and livery are painted on it by where a pixel lies.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from data.synthetic.canvas import Canvas, FacePaint, View
from data.synthetic.imaging import GLOW, TI, Layer, layer_from_labels, smooth_noise
from data.synthetic.vehicle_body import BODIES, Body
from data.synthetic.vehicle_identity import LIVERIES, Vehicle

SIZE = HEIGHT, WIDTH = 128, 256
"""Size of a picture of a vehicle, in pixels."""
SLOTS = (
    "paint", "cargo", "bumper", "glass", "trim", "seam", "dent", "chrome", "grille", "tyre", "rim", "lamp",
    "tail light", "plate", "sticker", "under", "exhaust", "extra", "sign",
)  # fmt: skip
WARM_SLOTS = {"grille": 0.6, "rim": 0.45, "tyre": 0.2, "under": 0.4, "exhaust": 0.5}
"""What else gets warm when the engine runs, relative to the bonnet."""
_FIRST = {slot: 4 * number + 1 for number, slot in enumerate(SLOTS)}
"""Label of a slot's first material of four: base, accent, hidden, accent and hidden."""
_BONNET = 4 * len(SLOTS) + 1
"""Label of the first of the four materials of the paint over the engine."""


def draw_vehicle(
    vehicle: Vehicle, view: View, light_side: float, running: float, lamps: bool, drift: np.ndarray,
    rng: np.random.Generator,
) -> Layer:  # fmt: skip
    """Draw `vehicle`; the view's unit is a metre.

    `running` from 0 (cold engine) to 1 warms bonnet, wheels and exhaust; `lamps` says whether the lights are on;
    `drift` (slots,) is how much warmer than usual each part is now. `rng` adds what differs from frame to frame:
    wheels, reflections.
    """
    body = BODIES[vehicle.body]
    canvas = Canvas(view, light_side, HEIGHT, WIDTH)
    _draw_under(canvas, vehicle, body)
    _draw_lower_body(canvas, vehicle, body)
    _draw_cabin(canvas, vehicle, body)
    _draw_wheels(canvas, vehicle, body, rng.uniform(0, 2 * math.pi))
    _draw_extra(canvas, vehicle, body)

    materials = np.array([material for slot in SLOTS for material in vehicle.finishes[slot].materials])
    materials[:, TI] += np.repeat(drift, 4)
    heat = running * vehicle.engine
    for slot, share in WARM_SLOTS.items():
        materials[_FIRST[slot] - 1 : _FIRST[slot] + 3, TI] += share * (heat + 0.2 * running)
    for slot, glow in (("lamp", 1.0), ("tail light", 0.2)):
        materials[_FIRST[slot] - 1 : _FIRST[slot] + 3, GLOW] = glow * lamps
    bonnet = materials[:4].copy()
    bonnet[:, TI] += heat
    reflections = 0.10 * smooth_noise(rng, *canvas.labels.shape, 14, 60) + 0.05 * smooth_noise(
        rng, *canvas.labels.shape, 6, 12
    )
    warmth = 0.92 + 0.08 * canvas.shade + reflections
    return layer_from_labels(
        canvas.labels, np.vstack([materials, bonnet]), np.clip(canvas.shade * (1 + reflections), 0, 1.35), warmth
    )


def headlight_places(vehicle: Vehicle, view: View) -> list[np.ndarray]:
    """Where the headlights are on the screen (x, y, nearness); none where the vehicle drives away."""
    body = BODIES[vehicle.body]
    if math.cos(view.yaw) < 0.15:
        return []
    return [view.project(np.array([side * 0.36 * body.width, body.nose - 0.1, body.length / 2])) for side in (1, -1)]


def _solid(slot: str) -> FacePaint:
    return lambda lateral, up, front: np.full(lateral.shape, _FIRST[slot], np.uint8)


def _livery(vehicle: Vehicle, slot: str, s: np.ndarray, h: np.ndarray, lateral: np.ndarray) -> np.ndarray:
    """Labels of the slot's finish with its patterns."""
    finish = vehicle.finishes[slot]
    labels = np.full(s.shape, _FIRST[slot], np.uint8)
    labels += LIVERIES[finish.pattern](s, h, lateral).astype(np.uint8)
    return labels + 2 * LIVERIES[finish.hidden](s, h, lateral).astype(np.uint8)


def _loft(canvas: Canvas, sections: list[np.ndarray], paint: FacePaint) -> None:
    """Skin over cross-sections from front to rear, each (n, 3) from the driver's left over the top to the right."""
    for one, other in pairwise(sections):
        for i in range(len(one) - 1):
            canvas.face(np.array([one[i], one[i + 1], other[i + 1], other[i]]), paint)
    canvas.face(sections[0][::-1], paint)
    canvas.face(sections[-1], paint)


def _block(canvas: Canvas, low: tuple[float, ...], high: tuple[float, ...], paint: FacePaint) -> None:
    """A box between two corners (lateral, up, front)."""
    (x0, y0, z0), (x1, y1, z1) = low, high
    outline = [(x1, y0), (x1, y1), (x0, y1), (x0, y0), (x1, y0)]
    _loft(canvas, [np.array([(x, y, z) for x, y in outline]) for z in (z1, z0)], paint)


def _draw_under(canvas: Canvas, vehicle: Vehicle, body: Body) -> None:
    half, low = 0.36 * body.width, 0.55 * body.sill
    ends = body.front(0.97), body.front(0.05)
    _block(canvas, (-half, low, ends[0]), (half, body.sill + 0.1, ends[1]), _solid("under"))
    for side in vehicle.exhaust:
        x, z = side * 0.28 * body.width, body.front(1.0)
        _block(canvas, (x - 0.06, low, z - 0.06), (x + 0.06, low + 0.11, z + 0.1), _solid("exhaust"))
    if body.cargo is not None:
        _draw_cargo(canvas, vehicle, body, *body.cargo)


def _draw_cargo(canvas: Canvas, vehicle: Vehicle, body: Body, start: float, floor: float) -> None:
    """The box of a lorry, from s = `start` to the rear, its `floor` above the axles."""
    half, high = 0.52 * body.width, body.height

    def paint(lateral: np.ndarray, up: np.ndarray, front: np.ndarray) -> np.ndarray:
        s, h = 0.5 - front / body.length, (up - floor) / (high - floor)
        labels = _livery(vehicle, "cargo", s, h, lateral)
        edge = (up < floor + 0.07) | (up > high - 0.05) | (np.abs(s - start) < 0.008) | (s > 0.992)
        labels[edge & (np.abs(lateral) > half - 0.05)] = _FIRST["chrome"]
        labels[(s > 0.995) & (np.abs(lateral) < 0.03)] = _FIRST["seam"]
        return labels

    _block(canvas, (-half, floor, body.front(1.0)), (half, high, body.front(start)), paint)
    beam = 0.3 * body.width
    _block(canvas, (-beam, 0.5, body.front(1.0)), (beam, floor, body.front(start - 0.02)), _solid("under"))
    for side in (-1, 1):  # rear lights under the box, and a guard between the axles
        x = side * 0.4 * body.width
        _block(canvas, (x - 0.12, 0.55, body.front(1)), (x + 0.12, 0.72, body.front(0.99)), _solid("tail light"))
        x = side * 0.47 * body.width
        ends = body.front(0.62), body.front(0.36)
        _block(canvas, (x - 0.02, 0.42, ends[0]), (x + 0.02, 0.72, ends[1]), _solid("trim"))


def _draw_lower_body(canvas: Canvas, vehicle: Vehicle, body: Body) -> None:
    at = sorted({0.0, 0.02, 0.07, 0.14, body.cabin[0], 0.5, body.cabin[3], 0.9, 0.96, 0.985, 1.0})
    at = [s for s in at if s <= body.tail] + [body.tail] * (body.tail < 1)
    sections = []
    for s in at:
        half, top = body.half_width(s), body.top(s)
        low = body.sill + 0.05 * (s < 0.03 or s > 0.97)
        profile = [(0.92, 0.0), (0.985, 0.25), (1.0, 0.6), (0.95, 0.9), (0.84, 1.0)]
        left = [(share * half, low + h * (top - low), body.front(s)) for share, h in profile]
        sections.append(np.array(left + [(-x, y, z) for x, y, z in reversed(left)]))
    _loft(canvas, sections, lambda x, y, z: _paint_lower_body(vehicle, body, x, y, z))


def _paint_lower_body(
    vehicle: Vehicle, body: Body, lateral: np.ndarray, up: np.ndarray, front: np.ndarray
) -> np.ndarray:
    s, h = 0.5 - front / body.length, (up - body.sill) / (body.belt - body.sill)
    side = np.abs(lateral) > 0.78 * body.width / 2
    labels = _livery(vehicle, "paint", s, h, lateral)
    over_engine = (s < body.cabin[0] - 0.01) & (up > body.nose - 0.18)
    labels[over_engine] += _BONNET - _FIRST["paint"]
    if vehicle.dent is not None:
        ds, dh = (s - vehicle.dent[0]) / 0.035, (h - vehicle.dent[1]) / 0.16
        labels[(ds**2 + dh**2 < 1) & (lateral > 0)] = _FIRST["dent"]
    for seam in body.doors:
        labels[side & (np.abs(s - seam) * body.length < 0.018) & (h > 0.12)] = _FIRST["seam"]
    for seam in body.doors[1:]:
        ahead = (seam - s) * body.length
        labels[side & (ahead > 0.06) & (ahead < 0.22) & (np.abs(h - 0.8) < 0.035)] = _FIRST["trim"]
    labels[side & (up < body.sill + 0.07)] = _FIRST["trim"]
    across = np.abs(lateral) / (body.width / 2)
    if body.bed:
        labels[(front < body.front(body.cabin[3]) - 0.1) & (s < 0.965) & (across < 0.8) & (h > 0.95)] = _FIRST["trim"]
    _paint_front(vehicle, body, labels, across, up, front)
    if body.cargo is None:
        _paint_rear(vehicle, body, labels, lateral, up, front)
    if vehicle.sticker is not None:
        where, along, high = vehicle.sticker
        on = (lateral > 0) if where == "left" else (lateral < 0)
        place = lateral if where == "rear" else s * body.length
        middle = along if where == "rear" else along * body.length
        on = (s > 0.97) if where == "rear" else side & on
        labels[on & (np.abs(place - middle) < 0.2) & (np.abs(h - high) < 0.14)] = _FIRST["sticker"]
    for axle in body.axles:
        arch = np.hypot(front - body.front(axle), up - body.wheel) < 1.2 * body.wheel
        labels[arch & side] = _FIRST["under"]
    return labels


def _paint_front(
    vehicle: Vehicle, body: Body, labels: np.ndarray, across: np.ndarray, up: np.ndarray, front: np.ndarray
) -> None:
    """Bumper, grille, headlights and plate, in place; `across` is 0 in the middle and 1 at the sides."""
    nose, sill, ahead = body.nose, body.sill, body.length / 2 - front
    face = ahead < 0.10
    labels[(ahead < 0.45) & (up < sill + 0.26)] = _FIRST["bumper"]
    labels[face & (across < 0.55) & (up > sill + 0.05) & (up < sill + 0.15)] = _FIRST["grille"]
    low, high, wide = {
        "wide": (0.30, 0.12, 0.56), "small": (0.24, 0.14, 0.3), "split": (0.28, 0.12, 0.42), "low": (0.36, 0.2, 0.5),
    }[vehicle.grille]  # fmt: skip
    grille = face & (up > nose - low) & (up < nose - high) & (across < wide)
    labels[grille] = _FIRST["grille"]
    if vehicle.grille == "split":
        labels[grille & (across < 0.06)] = _FIRST["chrome"]
    if vehicle.grille in ("wide", "low"):
        labels[grille & (np.abs(up - nose + (low + high) / 2) < 0.02)] = _FIRST["chrome"]
    lamp = {
        "block": (ahead < 0.3) & (across > 0.62) & (np.abs(up - nose + 0.16) < 0.08),
        "round": (ahead < 0.2) & ((across - 0.76) ** 2 / 0.018 + (up - nose + 0.17) ** 2 / 0.011 < 1),
        "slit": (ahead < 0.42) & (across > 0.55) & (np.abs(up - nose + 0.12) < 0.045),
        "corner": (ahead < 0.5) & (across > 0.66) & (up - nose + 0.24 > 0.3 * ahead) & (up < nose - 0.07),
    }[vehicle.headlights]
    labels[lamp] = _FIRST["lamp"]
    labels[face & (across < 0.28) & (np.abs(up - sill - 0.21) < 0.06)] = _FIRST["plate"]


def _paint_rear(
    vehicle: Vehicle, body: Body, labels: np.ndarray, lateral: np.ndarray, up: np.ndarray, front: np.ndarray
) -> None:
    """Bumper, lights, plate and seam of the boot, in place."""
    boot, sill, behind = body.boot, body.sill, front + body.length / 2
    across = np.abs(lateral) / (body.width / 2)
    labels[(behind < 0.45) & (up < sill + 0.26)] = _FIRST["bumper"]
    face = behind < 0.10
    labels[face & (np.abs(up - sill - 0.28) < 0.015) & (across < 0.8)] = _FIRST["seam"]
    lights = {
        "block": (behind < 0.25) & (across > 0.58) & (np.abs(up - boot + 0.22) < 0.09),
        "column": (behind < 0.2) & (across > 0.76) & (up > boot - 0.42) & (up < boot - 0.04),
        "bar": (behind < 0.3) & (np.abs(up - boot + 0.2) < 0.05),
        "round": (behind < 0.15) & ((across - 0.7) ** 2 / 0.018 + (up - boot + 0.22) ** 2 / 0.011 < 1),
    }[vehicle.tail_lights]
    labels[lights] = _FIRST["tail light"]
    labels[face & (across < 0.28) & (np.abs(up - (boot + sill) / 2 + 0.02) < 0.06)] = _FIRST["plate"]


def _draw_cabin(canvas: Canvas, vehicle: Vehicle, body: Body) -> None:
    a, b, c, d = body.cabin
    wide, narrow = 0.46 * body.width, 0.5 * body.roof * body.width
    roof = body.roof_height
    at = [(a, body.belt), (b, roof - 0.04), (0.6 * b + 0.4 * c, roof), (c, roof - 0.04), (d, body.belt)]
    sections = []
    for s, top in at:
        slope = (top - body.belt) / (roof - body.belt)
        half = wide + (narrow - wide) * slope
        left = [(wide, body.belt), (half, top - 0.05 * slope), (half - 0.12, top)]
        right = [(-x, y) for x, y in reversed(left)]
        sections.append(np.array([(x, y, body.front(s)) for x, y in left + right]))

    pillars = [seam for seam in body.doors[1:] if seam < d - 0.06]

    def paint(lateral: np.ndarray, up: np.ndarray, front: np.ndarray) -> np.ndarray:
        s, k = 0.5 - front / body.length, (up - body.belt) / (roof - body.belt)
        labels = _livery(vehicle, "paint", s, 1 + 0.6 * k, lateral)
        edge = wide + (narrow - wide) * k
        first, last = a + (b - a) * k, d + (c - d) * k  # s of windscreen and rear window at this height
        side = np.abs(lateral) > edge - 0.045
        band = (k > 0.06) & (k < 0.86)
        window = side & band & (s > first + 0.022) & (s < np.minimum(last - 0.03, body.windows))
        for pillar in pillars:
            window &= np.abs(s - pillar) * body.length > 0.05
        inside = ~side & (np.abs(lateral) < edge - 0.08) & (k > 0.05) & (k < 0.92)
        labels[window | (inside & (s < first + 0.03))] = _FIRST["glass"]
        if body.windows == 1:
            labels[inside & (s > last - 0.03)] = _FIRST["glass"]
        return labels

    _loft(canvas, sections, paint)
    for side in (-1, 1):  # mirrors
        x, z = side * (0.5 * body.width + 0.06), body.front(a + 0.4 * (b - a)) - 0.1
        _block(canvas, (x - 0.09, body.belt, z - 0.06), (x + 0.09, body.belt + 0.15, z + 0.06), _solid("bumper"))


def _draw_wheels(canvas: Canvas, vehicle: Vehicle, body: Body, turn: float) -> None:
    angles = np.linspace(0, 2 * math.pi, 20, endpoint=False)
    circle = body.wheel * np.stack([np.sin(angles), np.cos(angles)], 1)
    for axle in body.axles:
        middle = body.front(axle)

        def paint(lateral: np.ndarray, up: np.ndarray, front: np.ndarray, middle: float = middle) -> np.ndarray:
            x, y = (front - middle) / body.wheel, up / body.wheel - 1
            return _paint_wheel(vehicle.rim, np.hypot(x, y), np.arctan2(y, x) + turn)

        for side in (-1, 1):
            outer, inner = side * (body.width / 2 + 0.01), side * (body.width / 2 - 0.22)
            rings = [
                np.column_stack([np.full(20, x), circle[:, 0] + body.wheel, circle[:, 1] + middle])
                for x in (outer, inner)
            ]
            for i in range(0, 20, 2):
                j = (i + 2) % 20
                tread = np.array([rings[1][i], rings[1][j], rings[0][j], rings[0][i]])
                canvas.face(tread[::side], _solid("tyre"))
            canvas.face(rings[0][::side], paint)


def _paint_wheel(rim: str, radius: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Labels of a wheel; `radius` is 1 at the outside of the tyre."""
    solid = {
        "five spokes": np.cos(5 * angle) > 0.1 - 0.5 * (0.68 - radius),
        "many spokes": np.cos(12 * angle) > -0.1,
        "disc": np.abs(radius - 0.45) > 0.06,
        "holes": (np.cos(8 * angle) < 0.3) | (np.abs(radius - 0.5) > 0.1),
    }[rim]
    labels = np.full(radius.shape, _FIRST["tyre"], np.uint8)
    labels[radius < 0.68] = _FIRST["under"]
    labels[(radius < 0.68) & (solid | (radius < 0.16) | (radius > 0.62))] = _FIRST["rim"]
    return labels


def _draw_extra(canvas: Canvas, vehicle: Vehicle, body: Body) -> None:
    """What is on the roof."""
    roof, half = body.roof_height, 0.5 * body.roof * body.width
    ahead, back = body.front(body.cabin[1]) - 0.1, body.front(body.cabin[2]) + 0.1
    middle = (ahead + back) / 2
    if vehicle.extra == "rails":
        for x in (half - 0.12, 0.12 - half):
            _block(canvas, (x - 0.03, roof + 0.03, back), (x + 0.03, roof + 0.08, ahead), _solid("chrome"))
        for z in (ahead - 0.25, back + 0.25):
            _block(canvas, (0.1 - half, roof + 0.06, z - 0.04), (half - 0.1, roof + 0.1, z + 0.04), _solid("chrome"))
    elif vehicle.extra == "roof box":
        size = min(0.75, 0.45 * (ahead - back))
        _block(canvas, (-0.4, roof + 0.05, middle - size), (0.4, roof + 0.32, middle + size), _solid("extra"))
    elif vehicle.extra == "taxi sign":
        _block(canvas, (-0.3, roof, middle - 0.07), (0.3, roof + 0.17, middle + 0.07), _solid("sign"))
    elif vehicle.extra == "beacons":
        _block(canvas, (-0.55, roof, middle - 0.12), (0.55, roof + 0.12, middle + 0.12), _solid("sign"))
    elif vehicle.extra == "spoiler":
        z = body.front(max(body.cabin[2], 0.96 if body.cabin[3] < 0.93 else 0))
        y = body.boot + 0.14 if body.cabin[3] < 0.93 else roof - 0.06
        wide = 0.42 * body.width
        _block(canvas, (-wide, y - 0.02, z - 0.2), (wide, y + 0.04, z + 0.05), _solid("bumper"))
