"""Who walks past: people who differ in body and clothes.

A piece of clothing reflects visible and near-infrared light and lets body heat through independently: dyes that look
black are bright or dark in near-infrared, a lined jacket is cold where a shirt glows. So two people can be alike in one
modality and different in another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from data.synthetic.imaging import Material

COLOURS = {
    "black": (0.09, 0.09, 0.10),
    "charcoal": (0.22, 0.22, 0.24),
    "grey": (0.47, 0.48, 0.50),
    "white": (0.85, 0.85, 0.82),
    "navy": (0.11, 0.14, 0.29),
    "blue": (0.18, 0.34, 0.66),
    "denim": (0.29, 0.39, 0.53),
    "teal": (0.12, 0.44, 0.46),
    "beige": (0.71, 0.62, 0.47),
    "brown": (0.35, 0.24, 0.16),
    "olive": (0.33, 0.35, 0.20),
    "green": (0.15, 0.42, 0.25),
    "red": (0.67, 0.13, 0.13),
    "burgundy": (0.38, 0.10, 0.17),
    "orange": (0.84, 0.43, 0.13),
    "yellow": (0.85, 0.71, 0.22),
    "pink": (0.82, 0.52, 0.58),
    "purple": (0.39, 0.24, 0.50),
}
STREET = ("black", "charcoal", "grey", "navy", "denim", "beige", "white", "olive")
"""What most people wear: most clothes are one of these, so that colours alone name few people."""
SKINS = ((0.88, 0.69, 0.57), (0.76, 0.56, 0.43), (0.57, 0.39, 0.28), (0.36, 0.24, 0.18))
HAIR_COLOURS = ((0.07, 0.06, 0.06), (0.24, 0.15, 0.09), (0.62, 0.47, 0.26), (0.42, 0.19, 0.09), (0.62, 0.61, 0.60))
HAIR_STYLES = ("short", "cropped", "bob", "long", "ponytail", "bun")
HATS = ("none", "cap", "beanie", "hood")
TOPS = ("tee", "vest", "shirt", "sweater", "jacket", "open jacket", "puffer", "coat")
BOTTOMS = ("trousers", "jeans", "wide trousers", "shorts", "skirt", "long skirt")
BAGS = ("none", "backpack", "shoulder bag", "tote", "crossbody")
NI_LEVELS = (0.13, 0.36, 0.60, 0.84)
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
SPECTRA = (("RGB", "NI"), ("RGB", "NI", "TI"), ("RGB",), ("NI",), ("TI",), ("RGB", "TI"))
_SPECTRA_ODDS = (0.40, 0.14, 0.19, 0.15, 0.06, 0.06)


@dataclass(frozen=True)
class Garment:
    """Four materials (base, accent, hidden, both) and where the second and third show."""

    materials: tuple[Material, Material, Material, Material]
    pattern: str = "plain"
    hidden: str = "plain"


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
    garments: dict[str, Garment]

    def differences(self, other: Identity) -> int:
        """In how many visible traits two identities differ."""
        return sum(a != b for a, b in zip(self.traits, other.traits, strict=True))


def sample_identities(rng: np.random.Generator, count: int, least_differences: int = 4) -> list[Identity]:
    """`count` people of whom every two differ in at least `least_differences` traits.

    A longer list starts with the shorter one.
    """
    people: list[Identity] = []
    while len(people) < count:
        person = sample_identity(rng)
        if all(person.differences(other) >= least_differences for other in people):
            people.append(person)
    return people


def sample_identity(rng: np.random.Generator) -> Identity:
    """Draw one person."""
    skin, hair_colour = int(rng.integers(4)), int(rng.choice(5, p=(0.36, 0.3, 0.14, 0.08, 0.12)))
    hair = _pick(rng, HAIR_STYLES, (0.34, 0.12, 0.14, 0.18, 0.14, 0.08))
    hat = _pick(rng, HATS, (0.72, 0.11, 0.1, 0.07))
    top = _pick(rng, TOPS, (0.2, 0.06, 0.12, 0.16, 0.14, 0.14, 0.1, 0.08))
    bottom = _pick(rng, BOTTOMS, (0.3, 0.24, 0.12, 0.14, 0.12, 0.08))
    bag = _pick(rng, BAGS, (0.42, 0.2, 0.14, 0.12, 0.12))
    build, height = rng.choice((0.9, 1.0, 1.13)) * rng.uniform(0.98, 1.02), rng.uniform(0.94, 1.06)

    skin_cloth = (*SKINS[skin], 0.58 - 0.04 * skin, 0.86, 0.0)
    hair_cloth = (*HAIR_COLOURS[hair_colour], float(rng.uniform(0.2, 0.5)), 0.60, 0.0)
    top_garment, top_traits = _sample_garment(rng, HEAT[top], tuple(TORSO_PATTERNS), 0.34)
    leg_heat = {"shorts": 0.62, "skirt": 0.52, "long skirt": 0.46}.get(bottom, 0.6) + rng.choice((-0.1, 0.0, 0.07))
    bottom_garment, bottom_traits = _sample_garment(
        rng, leg_heat, tuple(LEG_PATTERNS), 0.6, ("denim", "blue") if bottom == "jeans" else ()
    )
    inner, inner_traits = _sample_garment(
        rng, 0.70, ("plain",), 1.0, ("white", "grey", "red", "blue", "yellow", "black")
    )
    bag_garment, bag_traits = _sample_garment(rng, 0.36, ("plain", "yoke", "lower", "band"), 0.5)
    shoes, shoe_traits = _sample_garment(rng, 0.45, ("plain",), 1.0, ("black", "white", "brown", "grey", "red"))
    sole = _pick(rng, ("white", "black"), (0.5, 0.5))
    hood = replace(top_garment, pattern="plain", hidden="plain")
    hat_garment = hood if hat == "hood" else _sample_garment(rng, 0.48, ("plain",), 1.0)[0]

    garments = {
        "skin": _uniform(skin_cloth),
        "hands": _uniform((*skin_cloth[:4], 0.78, 0.0)),
        "hair": _uniform(hair_cloth),
        "features": _uniform((*(0.3 * np.array(SKINS[skin])), 0.25, 0.82, 0.0)),
        "top": top_garment,
        "inner": inner,
        "bottom": bottom_garment,
        "shoes": shoes,
        "soles": _uniform((*COLOURS[sole], 0.5, 0.38, 0.0)),
        "bag": bag_garment,
        "hat": hat_garment,
        "socks": _uniform((*COLOURS[_pick(rng, ("white", "black"), (0.5, 0.5))], 0.6, 0.66, 0.0)),
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


def _pick(rng: np.random.Generator, names: tuple[str, ...], odds: tuple[float, ...]) -> str:
    return names[int(rng.choice(len(names), p=np.array(odds) / sum(odds)))]


def _uniform(material: Material) -> Garment:
    return Garment((tuple(map(float, material)),) * 4)


def _sample_garment(
    rng: np.random.Generator, heat: float, patterns: tuple[str, ...], plain: float, colours: tuple[str, ...] = ()
) -> tuple[Garment, tuple[str, ...]]:
    """A garment of about the given temperature: (the garment, its visible traits, its colour first)."""
    if not colours:
        colours = STREET if rng.random() < 0.5 else tuple(COLOURS)
    colour = colours[int(rng.integers(len(colours)))]
    rgb = np.clip(np.array(COLOURS[colour]) + rng.normal(0, 0.02, 3), 0.03, 0.95)
    level = int(rng.integers(4))
    warmth = float(np.clip(heat + rng.normal(0, 0.05), 0.2, 0.82))
    base = (*rgb, NI_LEVELS[level] + rng.uniform(-0.04, 0.04), warmth, 0.0)

    pattern, spectrum = "plain", ()
    accent = base
    if rng.random() >= plain:
        pattern = patterns[int(rng.integers(1, len(patterns)))]
        spectrum = SPECTRA[int(rng.choice(len(SPECTRA), p=_SPECTRA_ODDS))]
        accent = _change(rng, base, spectrum, level)
    hidden, where, hidden_in = base, "plain", ""
    if len(patterns) > 4 and rng.random() < 0.35:
        hidden_in = "NI" if rng.random() < 0.6 else "TI"
        places = HIDDEN_PATTERNS if "yoke" in patterns else patterns[1:]
        where = places[int(rng.integers(len(places)))]
        hidden = _change(rng, base, (hidden_in,), level)
    channel = {"NI": 3, "TI": 4}.get(hidden_in)
    both = tuple(hidden[i] if i == channel else accent[i] for i in range(6))
    materials = tuple(tuple(map(float, material)) for material in (base, accent, hidden, both))
    traits = (colour, f"NI {level}", pattern, "+".join(spectrum), f"{hidden_in} {where}")
    return Garment(materials, pattern, where), traits


def _change(rng: np.random.Generator, base: Material, spectrum: tuple[str, ...], level: int) -> Material:
    """The same cloth with another look in the given modalities."""
    rgb, ni, heat = np.array(base[:3]), base[3], base[4]
    if "RGB" in spectrum:
        far = [colour for colour in COLOURS.values() if np.abs(np.array(colour) - rgb).sum() > 0.7]
        rgb = np.array(far[int(rng.integers(len(far)))])
    if "NI" in spectrum:
        ni = NI_LEVELS[(level + 2) % 4]
    if "TI" in spectrum:
        heat = heat - 0.2 if heat > 0.5 else heat + 0.2
    return (*rgb, ni, heat, 0.0)
