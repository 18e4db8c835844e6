"""Finishes: what cloth and paint look like to each modality, one independent of the other.

Dyes that look black are bright or dark in near-infrared; a second colour, a stripe or a lining may show in one modality
only. So two things can be alike in one modality and different in another.
"""

from __future__ import annotations

from dataclasses import dataclass

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
"""What most people wear: most finishes are one of these, so that colours alone name few people."""
NI_LEVELS = (0.13, 0.36, 0.60, 0.84)
SPECTRA = (("RGB", "NI"), ("RGB", "NI", "TI"), ("RGB",), ("NI",), ("TI",), ("RGB", "TI"))
_SPECTRA_ODDS = (0.40, 0.14, 0.19, 0.15, 0.06, 0.06)


@dataclass(frozen=True)
class Finish:
    """Four materials (base, accent, hidden, both) and where the second and third show."""

    materials: tuple[Material, ...]
    pattern: str = "plain"
    hidden: str = "plain"


def pick(rng: np.random.Generator, names: tuple[str, ...], odds: tuple[float, ...]) -> str:
    """One of `names`; `odds` need not add up to 1."""
    return names[int(rng.choice(len(names), p=np.array(odds) / sum(odds)))]


def uniform(material: Material) -> Finish:
    """The same material everywhere."""
    return Finish((tuple(map(float, material)),) * 4)


def sample_finish(
    rng: np.random.Generator,
    heat: float,
    patterns: tuple[str, ...],
    plain: float,
    colours: tuple[str, ...] = (),
    hidden: tuple[str, ...] = (),
) -> tuple[Finish, tuple[str, ...]]:
    """A finish of about the given temperature.

    Args:
        patterns: where a second colour may show; the first means nowhere and has the probability `plain`.
        colours: names to choose from; empty = any, most of them of the `STREET`.
        hidden: where something may show in near-infrared or thermal alone; empty = nowhere.

    Returns:
        The finish and its visible traits, its colour first.
    """
    if not colours:
        colours = STREET if rng.random() < 0.5 else tuple(COLOURS)
    colour = colours[int(rng.integers(len(colours)))]
    rgb = np.clip(np.array(COLOURS[colour]) + rng.normal(0, 0.02, 3), 0.03, 0.95)
    level = int(rng.integers(4))
    warmth = float(np.clip(heat + rng.normal(0, 0.05), 0.2, 0.82))
    base = (*rgb, NI_LEVELS[level] + rng.uniform(-0.04, 0.04), warmth, 0.0)

    pattern = "plain"
    spectrum: tuple[str, ...] = ()
    accent = base
    if rng.random() >= plain:
        pattern = patterns[int(rng.integers(1, len(patterns)))]
        spectrum = SPECTRA[int(rng.choice(len(SPECTRA), p=_SPECTRA_ODDS))]
        accent = _change(rng, base, spectrum, level)
    secret, where, secret_in = base, "plain", ""
    if hidden and rng.random() < 0.35:
        secret_in = "NI" if rng.random() < 0.6 else "TI"
        where = hidden[int(rng.integers(len(hidden)))]
        secret = _change(rng, base, (secret_in,), level)
    channel = {"NI": 3, "TI": 4}.get(secret_in)
    both = tuple(secret[i] if i == channel else accent[i] for i in range(6))
    materials = tuple(tuple(map(float, material)) for material in (base, accent, secret, both))
    traits = (colour, f"NI {level}", pattern, "+".join(spectrum), f"{secret_in} {where}")
    return Finish(materials, pattern, where), traits


def _change(rng: np.random.Generator, base: Material, spectrum: tuple[str, ...], level: int) -> Material:
    """The same finish with another look in the given modalities."""
    rgb, ni, heat = np.array(base[:3]), base[3], base[4]
    if "RGB" in spectrum:
        far = [colour for colour in COLOURS.values() if np.abs(np.array(colour) - rgb).sum() > 0.7]
        rgb = np.array(far[int(rng.integers(len(far)))])
    if "NI" in spectrum:
        ni = NI_LEVELS[(level + 2) % 4]
    if "TI" in spectrum:
        heat = heat - 0.2 if heat > 0.5 else heat + 0.2
    return (*rgb, ni, heat, 0.0)
