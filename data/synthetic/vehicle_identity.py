"""Which vehicles drive past: they differ in body, paint and fittings, each in what it shows to each modality."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.synthetic.finish import COLOURS, NI_LEVELS, Finish, pick, sample_finish, uniform
from data.synthetic.imaging import TI
from data.synthetic.vehicle_body import BODIES

PAINTS = (
    "white", "white", "white", "grey", "grey", "grey", "charcoal", "black", "black", "navy", "blue", "red", "burgundy",
    "beige", "green", "teal", "brown", "yellow", "orange",
)  # fmt: skip
"""Colours of paint; a name that is here more often is seen more often."""
LIVERIES = {
    "plain": lambda s, h, x: np.zeros(s.shape, bool),
    "waist stripe": lambda s, h, x: np.abs(h - 0.68) < 0.09,
    "low half": lambda s, h, x: h < 0.45,
    "roof": lambda s, h, x: h > 1.02,
    "tail": lambda s, h, x: s > 0.68 - 0.06 * h,
    "doors": lambda s, h, x: (np.abs(s - 0.5) < 0.14) & (h < 1),
    "racing stripes": lambda s, h, x: np.abs(np.abs(x) - 0.2) < 0.11,
    "chequers": lambda s, h, x: (np.abs(h - 0.68) < 0.14) & (((s * 20) % 1 < 0.5) ^ (h > 0.68)),
    "slash": lambda s, h, x: np.abs(s - 0.5 - 0.14 * (h - 0.5)) < 0.06,
    "disc": lambda s, h, x: (s - 0.46) ** 2 / 0.0036 + (h - 0.55) ** 2 / 0.1 < 1,
    "lettering": lambda s, h, x: (np.abs(h - 0.6) < 0.15) & (np.abs(s - 0.56) < 0.22) & ((s * 19 + h * 0.4) % 1 < 0.62),
    "nose": lambda s, h, x: s < 0.2 + 0.05 * h,
}
"""Where paint shows its second colour: f(share of the length, 0 sill to 1 belt, lateral metres)."""
HIDDEN_LIVERIES = ("waist stripe", "low half", "roof", "tail", "doors", "slash", "disc", "nose")
RIMS = ("five spokes", "many spokes", "disc", "holes")
HEADLIGHTS = ("block", "round", "slit", "corner")
TAIL_LIGHTS = ("block", "column", "bar", "round")
GRILLES = ("wide", "small", "split", "low")
EXTRAS = ("none", "rails", "roof box", "taxi sign", "spoiler", "beacons")
TINTS = (0.07, 0.18, 0.34)
"""Near-infrared reflectance of window glass: what looks equally dark need not be so there."""


@dataclass(frozen=True)
class Vehicle:
    """A vehicle. `traits` names what can be seen of it, for telling identities apart; the rest is how it is drawn."""

    traits: tuple[str, ...]
    body: str
    rim: str
    headlights: str
    tail_lights: str
    grille: str
    extra: str
    sticker: tuple[str, float, float] | None  # left, right or rear; s (or lateral, in metres); h
    dent: tuple[float, float] | None  # s, h
    exhaust: tuple[int, ...]  # sides
    engine: float  # how much warmer the bonnet gets when it runs
    finishes: dict[str, Finish]


def sample_vehicle(rng: np.random.Generator) -> Vehicle:
    """Draw one vehicle."""
    body = pick(rng, tuple(BODIES), (0.2, 0.16, 0.11, 0.16, 0.06, 0.09, 0.08, 0.05, 0.05, 0.04))
    paint, paint_traits = sample_finish(rng, 0.31, tuple(LIVERIES), 0.5, PAINTS, HIDDEN_LIVERIES)
    cargo, cargo_traits = sample_finish(rng, 0.30, tuple(LIVERIES), 0.3, ("white", "grey", "blue", "red", "beige"))
    rim, rim_colour = pick(rng, RIMS, (0.36, 0.26, 0.2, 0.18)), pick(rng, ("grey", "white", "black"), (0.6, 0.15, 0.25))
    headlights, tail_lights = pick(rng, HEADLIGHTS, (1, 1, 1, 1)), pick(rng, TAIL_LIGHTS, (1, 1, 1, 1))
    grille = pick(rng, GRILLES, (1, 1, 1, 1))
    extra = pick(rng, EXTRAS, (0.52, 0.16, 0.08, 0.08, 0.1, 0.06) if body != "lorry" else (0.7, 0, 0, 0, 0, 0.3))
    tint, engine = int(rng.integers(len(TINTS))), int(rng.integers(4))
    bumper = pick(rng, ("painted", "black"), (0.7, 0.3))
    plate = pick(rng, ("white", "blue", "yellow"), (0.4, 0.4, 0.2))
    colour = pick(rng, ("white", "yellow", "red", "blue", "black", "green"), (1, 1, 1, 1, 1, 1))
    sticker, sticker_trait = None, ""
    if rng.random() < 0.4:
        side = pick(rng, ("left", "right", "rear"), (0.35, 0.35, 0.3))
        sticker = (side, rng.uniform(0.3, 0.75) if side != "rear" else rng.uniform(-0.5, 0.5), rng.uniform(0.5, 0.85))
        sticker_trait = f"{side} {colour}"
    dent = (rng.uniform(0.3, 0.75), rng.uniform(0.3, 0.8)) if rng.random() < 0.2 else None
    exhaust = ((), (1,), (-1,), (1, -1))[int(rng.choice(4, p=(0.15, 0.3, 0.3, 0.25)))]

    trim = (0.09, 0.09, 0.10, float(rng.choice((0.12, 0.4))), 0.33, 0.0)
    finishes = {
        "paint": paint,
        "cargo": cargo,
        "bumper": paint if bumper == "painted" else uniform(trim),
        "glass": uniform((0.13, 0.16, 0.19, TINTS[tint], 0.10, 0.0)),
        "trim": uniform(trim),
        "seam": uniform((*(0.45 * np.array(paint.materials[0][:4])), paint.materials[0][TI], 0.0)),
        "dent": uniform((*(0.5 * np.array(paint.materials[0][:3]) + 0.06), 0.3, paint.materials[0][TI] + 0.05, 0.0)),
        "chrome": uniform((0.72, 0.73, 0.75, 0.7, 0.28, 0.0)),
        "grille": uniform((0.07, 0.07, 0.08, 0.1, 0.44, 0.0)),
        "tyre": uniform((0.07, 0.07, 0.07, 0.08, 0.50, 0.0)),
        "rim": uniform((*COLOURS[rim_colour], NI_LEVELS[int(rng.integers(4))], 0.44, 0.0)),
        "lamp": uniform((0.82, 0.84, 0.86, 0.75, 0.36, 0.0)),
        "tail light": uniform((0.62, 0.06, 0.06, 0.5, 0.33, 0.0)),
        "plate": uniform((*COLOURS[plate], 0.8, 0.30, 0.0)),
        "sticker": uniform((*COLOURS[colour], float(rng.choice((0.15, 0.85))), 0.24, 0.0)),
        "under": uniform((0.05, 0.05, 0.05, 0.06, 0.47, 0.0)),
        "exhaust": uniform((0.25, 0.25, 0.26, 0.25, 0.7, 0.0)),
        "extra": uniform((0.16, 0.16, 0.17, 0.3, 0.28, 0.0)),
        "sign": uniform((0.9, 0.75, 0.25, 0.75, 0.34, 0.7)),
    }
    traits = (
        body, *paint_traits, rim, rim_colour, headlights, tail_lights, grille, extra, f"tint {tint}",
        f"engine {engine}", bumper, plate, sticker_trait, "dent" if dent else "", f"exhaust {exhaust}",
        cargo_traits[0] if body == "lorry" else "",
    )  # fmt: skip
    return Vehicle(
        traits=traits,
        body=body,
        rim=rim,
        headlights=headlights,
        tail_lights=tail_lights,
        grille=grille,
        extra=extra,
        sticker=sticker,
        dent=dent,
        exhaust=exhaust,
        engine=(0.05, 0.19, 0.33, 0.47)[engine],
        finishes=finishes,
    )
