"""How vehicles are built: the measures of body types, and the outline that follows from them.

Coordinates are metres: lateral (the driver's left is positive), up from the ground, front from the middle. `s` is a
share of the length, 0 at the front bumper and 1 at the rear one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Body:
    """Measures of a body type, in metres unless said otherwise."""

    length: float
    width: float
    height: float
    sill: float  # height of the lower edge
    nose: float  # height of the bonnet's front edge
    belt: float  # height of the windows' lower edge
    boot: float  # height of the tail
    cabin: tuple[float, float, float, float]  # s of windscreen foot, roof front, roof rear, rear window foot
    axles: tuple[float, float]  # s
    wheel: float  # radius
    roof: float  # width of the roof, as a share of the body's
    windows: float = 1.0  # s where side windows end
    doors: tuple[float, ...] = (0.32, 0.52, 0.70)  # s of the seams
    cargo: tuple[float, float] | None = None  # s where a box begins, and the height of its floor
    bed: bool = False  # open behind the cabin

    @property
    def tail(self) -> float:
        """Where the painted lower body ends, as s: at the rear bumper, or behind the cab of a lorry."""
        return 1.0 if self.cargo is None else self.cargo[0] - 0.02

    @property
    def roof_height(self) -> float:
        """Height of the cabin's roof; a lorry's box is higher."""
        return self.height if self.cargo is None else 0.78 * self.height

    def front(self, s: float) -> float:
        """Frontal coordinate of `s`."""
        return (0.5 - s) * self.length

    def half_width(self, s: float) -> float:
        """Of the lower body at `s`: it narrows towards both ends."""
        return self.width / 2 * float(np.interp(s, (0, 0.03, 0.12, 0.88, 0.97, 1), (0.80, 0.92, 1, 1, 0.95, 0.88)))

    def top(self, s: float) -> float:
        """Height of the lower body at `s`: bonnet, belt, boot."""
        at = (0, 0.025, self.cabin[0], self.cabin[3], 0.985, 1.0)
        heights = (self.nose - 0.1, self.nose, self.belt, self.belt, self.boot, self.boot - 0.06)
        return float(np.interp(s, at, heights)) if self.cargo is None or s < self.cabin[3] else self.belt


BODIES = {
    "saloon": Body(4.65, 1.82, 1.45, 0.24, 0.70, 0.92, 0.97, (0.27, 0.41, 0.68, 0.85), (0.19, 0.80), 0.32, 0.74),
    "hatchback": Body(
        3.95, 1.75, 1.50, 0.24, 0.72, 0.95, 0.92, (0.24, 0.40, 0.84, 0.97), (0.18, 0.82), 0.31, 0.76, doors=(0.33, 0.64)
    ),
    "estate": Body(4.70, 1.83, 1.48, 0.24, 0.72, 0.93, 0.93, (0.26, 0.40, 0.89, 0.98), (0.19, 0.79), 0.32, 0.76),
    "suv": Body(4.55, 1.90, 1.74, 0.36, 0.92, 1.10, 1.08, (0.24, 0.36, 0.88, 0.98), (0.18, 0.81), 0.38, 0.80),
    "coupe": Body(
        4.35, 1.85, 1.28, 0.20, 0.64, 0.84, 0.90, (0.31, 0.47, 0.64, 0.92), (0.19, 0.80), 0.33, 0.70, doors=(0.37, 0.66)
    ),
    "mpv": Body(4.60, 1.85, 1.72, 0.26, 0.86, 1.02, 1.00, (0.15, 0.33, 0.90, 0.98), (0.18, 0.81), 0.33, 0.82),
    "van": Body(
        5.10, 1.98, 2.15, 0.30, 1.02, 1.22, 1.20, (0.13, 0.25, 0.985, 0.998), (0.17, 0.79), 0.34, 0.90, 0.36,
        doors=(0.19, 0.36, 0.60),
    ),
    "minibus": Body(
        5.00, 1.95, 2.02, 0.30, 1.00, 1.18, 1.18, (0.10, 0.22, 0.975, 0.995), (0.17, 0.78), 0.34, 0.88,
        doors=(0.17, 0.36, 0.56),
    ),
    "pickup": Body(
        5.25, 1.90, 1.78, 0.40, 1.00, 1.14, 1.12, (0.26, 0.36, 0.54, 0.585), (0.17, 0.77), 0.39, 0.80,
        doors=(0.30, 0.45, 0.59), bed=True,
    ),
    "lorry": Body(
        5.90, 2.10, 2.90, 0.42, 1.05, 1.30, 1.30, (0.015, 0.08, 0.26, 0.275), (0.13, 0.76), 0.40, 0.90,
        doors=(0.06, 0.23), cargo=(0.30, 0.85),
    ),
}  # fmt: skip
"""By name."""
