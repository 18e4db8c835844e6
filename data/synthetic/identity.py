"""Who walks past: people who differ in body and clothes.

A piece of clothing reflects visible and near-infrared light and lets body heat through independently: dyes that look
black are bright or dark in near-infrared, a lined jacket is cold where a shirt glows. So two people can be alike in one
modality and different in another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from data.synthetic.finish import COLOURS, Finish, pick, sample_finish, uniform

SKINS = ((0.88, 0.69, 0.57), (0.76, 0.56, 0.43), (0.57, 0.39, 0.28), (0.36, 0.24, 0.18))
HAIR_COLOURS = ((0.07, 0.06, 0.06), (0.24, 0.15, 0.09), (0.62, 0.47, 0.26), (0.42, 0.19, 0.09), (0.62, 0.61, 0.60))
HAIR_STYLES = ("short", "cropped", "bob", "long", "ponytail", "bun")
HATS = ("none", "cap", "beanie", "hood")
TOPS = ("tee", "vest", "shirt", "sweater", "jacket", "open jacket", "puffer", "coat")
BOTTOMS = ("trousers", "jeans", "wide trousers", "shorts", "skirt", "long skirt")
BAGS = ("none", "backpack", "shoulder bag", "tote", "crossbody")
HEAT = {
    "tee": 0.70,
    "vest": 0.62,
    "shirt": 0.64,
    "sweater": 0.57,
    "jacket": 0.47,
    "open jacket": 0.47,
    "puffer": 0.35,
    "coat": 0.42,
}

_FACING = math.pi / 2


def _cells(azimuth: np.ndarray, along: np.ndarray, around: int, down: int) -> tuple[np.ndarray, np.ndarray]:
    """Position inside the cell of a grid of `around` x `down` cells over the whole surface, each in [0, 1)."""
    return (azimuth / (2 * math.pi) * around) % 1, (along * down) % 1


TORSO_PATTERNS = {
    "plain": lambda a, s: np.zeros(a.shape, bool),
    "hoops": lambda a, s: (s * 5 + 0.2) % 1 < 0.45,
    "fine hoops": lambda a, s: (s * 11) % 1 < 0.42,
    "stripes": lambda a, s: (a / (2 * math.pi) * 14 + 0.25) % 1 < 0.4,
    "checks": lambda a, s: (_cells(a, s, 10, 7)[0] < 0.5) ^ (_cells(a, s, 10, 7)[1] < 0.5),
    "yoke": lambda a, s: s < 0.32,
    "band": lambda a, s: (s > 0.34) & (s < 0.54),
    "lower": lambda a, s: s > 0.58,
    "sash": lambda a, s: np.abs(s - 0.42 - 0.42 * np.sin(a)) < 0.085,
    "halves": lambda a, s: a > 0,
    "sides": lambda a, s: np.abs(np.abs(a) - _FACING) < 0.5,
    "logo": lambda a, s: (np.abs(s - 0.34) < 0.1) & (np.minimum(np.abs(a), math.pi - np.abs(a)) < 0.55),
    "badge": lambda a, s: (s - 0.3) ** 2 / 0.012 + (np.cos(a) - 0.85) ** 2 / 0.09 + (a < 0) < 1,
    "dots": lambda a, s: (_cells(a, s, 12, 9)[0] - 0.5) ** 2 + (_cells(a, s, 12, 9)[1] - 0.5) ** 2 < 0.1,
    "raglan": lambda a, s: s < 0.1,
    "sleeve band": lambda a, s: np.zeros(a.shape, bool),
}
"""Where a top shows its second cloth: f(azimuth, share of the way from neck to hem)."""
SLEEVE_PATTERNS = {
    "hoops": lambda a, t: (t * 2.4) % 1 < 0.45,
    "fine hoops": lambda a, t: (t * 5) % 1 < 0.42,
    "stripes": lambda a, t: (a / (2 * math.pi) * 6) % 1 < 0.4,
    "checks": lambda a, t: (_cells(a, t / 2, 4, 7)[0] < 0.5) ^ (_cells(a, t / 2, 4, 7)[1] < 0.5),
    "yoke": lambda a, t: t < 0.5,
    "lower": lambda a, t: t > 1.0,
    "band": lambda a, t: (t > 0.55) & (t < 0.95),
    "dots": lambda a, t: (_cells(a, t / 2, 5, 9)[0] - 0.5) ** 2 + (_cells(a, t / 2, 5, 9)[1] - 0.5) ** 2 < 0.1,
    "raglan": lambda a, t: np.ones(a.shape, bool),
    "sleeve band": lambda a, t: (t > 0.3) & (t < 0.62),
}
"""The same on a sleeve: f(azimuth, 0 shoulder to 2 wrist); patterns that are not here leave sleeves plain."""
LEG_PATTERNS = {
    "plain": lambda a, t: np.zeros(a.shape, bool),
    "side stripe": lambda a, t: np.abs(np.abs(a) - _FACING) < 0.42,
    "cuffs": lambda a, t: t > 1.62,
    "knees": lambda a, t: np.abs(t - 0.95) < 0.17,
    "below knee": lambda a, t: t > 1.02,
    "checks": lambda a, t: (_cells(a, t, 5, 5)[0] < 0.5) ^ (_cells(a, t, 5, 5)[1] < 0.5),
    "thigh band": lambda a, t: np.abs(t - 0.45) < 0.12,
}
"""The same on a leg: f(azimuth, 0 hip to 2 ankle)."""
HIDDEN_PATTERNS = ("yoke", "band", "lower", "halves", "sides", "hoops")
"""Where a lining or a dye shows that the eye does not see."""


@dataclass(frozen=True)
class Identity:
    """A person. `traits` names what can be seen of it, for telling identities apart; the rest is how it is drawn."""

    traits: tuple[str, ...]
    height: float
    build: float
    hair: str
    hat: str
    features: tuple[bool, bool]  # glasses, beard
    top: str
    bottom: str
    bag: str
    bag_side: int
    boots: bool
    stride: float
    garments: dict[str, Finish]


def sample_identity(rng: np.random.Generator) -> Identity:
    """Draw one person."""
    skin, hair_colour = int(rng.integers(4)), int(rng.choice(5, p=(0.36, 0.3, 0.14, 0.08, 0.12)))
    hair = pick(rng, HAIR_STYLES, (0.34, 0.12, 0.14, 0.18, 0.14, 0.08))
    hat = pick(rng, HATS, (0.72, 0.11, 0.1, 0.07))
    top = pick(rng, TOPS, (0.2, 0.06, 0.12, 0.16, 0.14, 0.14, 0.1, 0.08))
    bottom = pick(rng, BOTTOMS, (0.3, 0.24, 0.12, 0.14, 0.12, 0.08))
    bag = pick(rng, BAGS, (0.42, 0.2, 0.14, 0.12, 0.12))
    build, height = rng.choice((0.9, 1.0, 1.13)) * rng.uniform(0.98, 1.02), rng.uniform(0.94, 1.06)

    skin_cloth = (*SKINS[skin], 0.58 - 0.04 * skin, 0.86, 0.0)
    hair_cloth = (*HAIR_COLOURS[hair_colour], float(rng.uniform(0.2, 0.5)), 0.60, 0.0)
    top_garment, top_traits = sample_finish(rng, HEAT[top], tuple(TORSO_PATTERNS), 0.34, hidden=HIDDEN_PATTERNS)
    leg_heat = {"shorts": 0.62, "skirt": 0.52, "long skirt": 0.46}.get(bottom, 0.6) + rng.choice((-0.1, 0.0, 0.07))
    bottom_garment, bottom_traits = sample_finish(
        rng,
        leg_heat,
        tuple(LEG_PATTERNS),
        0.6,
        ("denim", "blue") if bottom == "jeans" else (),
        hidden=tuple(LEG_PATTERNS)[1:],
    )
    inner, inner_traits = sample_finish(rng, 0.70, ("plain",), 1.0, ("white", "grey", "red", "blue", "yellow", "black"))
    bag_garment, bag_traits = sample_finish(rng, 0.36, ("plain", "yoke", "lower", "band"), 0.5)
    shoes, shoe_traits = sample_finish(rng, 0.45, ("plain",), 1.0, ("black", "white", "brown", "grey", "red"))
    sole = pick(rng, ("white", "black"), (0.5, 0.5))
    hood = replace(top_garment, pattern="plain", hidden="plain")
    hat_garment = hood if hat == "hood" else sample_finish(rng, 0.48, ("plain",), 1.0)[0]

    garments = {
        "skin": uniform(skin_cloth),
        "hands": uniform((*skin_cloth[:4], 0.78, 0.0)),
        "hair": uniform(hair_cloth),
        "features": uniform((*(0.3 * np.array(SKINS[skin])), 0.25, 0.82, 0.0)),
        "top": top_garment,
        "inner": inner,
        "bottom": bottom_garment,
        "shoes": shoes,
        "soles": uniform((*COLOURS[sole], 0.5, 0.38, 0.0)),
        "bag": bag_garment,
        "hat": hat_garment,
        "socks": uniform((*COLOURS[pick(rng, ("white", "black"), (0.5, 0.5))], 0.6, 0.66, 0.0)),
    }
    traits = (
        top, *top_traits, bottom, *bottom_traits, bag, bag_traits[0] if bag != "none" else "",
        hair if hat == "none" else hat, f"skin {skin // 2}", f"hair {hair_colour}", shoe_traits[0],
        inner_traits[0] if top == "open jacket" else "",
    )  # fmt: skip
    return Identity(
        traits=traits,
        height=height,
        build=float(build),
        hair=hair,
        hat=hat,
        features=(rng.random() < 0.2, rng.random() < 0.2),
        top=top,
        bottom=bottom,
        bag=bag,
        bag_side=int(rng.choice((-1, 1))),
        boots=bool(rng.random() < 0.3),
        stride=rng.uniform(0.85, 1.15),
        garments=garments,
    )
