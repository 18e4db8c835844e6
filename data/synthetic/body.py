"""Drawing solid things from tubes: a depth-buffered canvas, and the walking skeleton of a person.

A tube is a straight axis with an elliptical cross-section that changes along it. Every pixel on it knows where on the
surface it lies: `azimuth` around the axis (radians, 0 = front, pi/2 = the wearer's left) and `along` the axis (0 to 1).
Painting is a function of the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data.synthetic.imaging import HEIGHT, OVERSAMPLING, WIDTH

Paint = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(azimuth, along) -> labels, all of shape (pixels,)."""


@dataclass(frozen=True)
class View:
    """Where a figure stands and how it is seen: `scale` is its height in pixels, the unit of its coordinates."""

    yaw: float  # 0 = faces the camera, pi = walks away
    pitch: float
    scale: float
    x: float
    ground: float

    def project(self, point: np.ndarray) -> np.ndarray:
        """Body coordinates (lateral, up, front) -> screen (x, y, nearness), in pixels."""
        lateral, up, front = point
        x = lateral * math.cos(self.yaw) + front * math.sin(self.yaw)
        near = front * math.cos(self.yaw) - lateral * math.sin(self.yaw)
        y = self.ground - self.scale * (up * math.cos(self.pitch) - near * math.sin(self.pitch))
        return np.array([self.x + self.scale * x, y, self.scale * near])


class Canvas:
    """Labels (0 = nothing), shade and nearness of what is drawn, at the oversampled size."""

    def __init__(self, view: View, light_side: float) -> None:
        size = (HEIGHT * OVERSAMPLING, WIDTH * OVERSAMPLING)
        self.view, self.light_side = view, light_side
        self.labels = np.zeros(size, np.uint8)
        self.shade = np.ones(size, np.float32)
        self.near = np.full(size, -np.inf, np.float32)

    def tube(
        self,
        start: np.ndarray,
        end: np.ndarray,
        widths: list[float],
        depths: list[float] | None,
        paint: Paint,
        at: list[float] | None = None,
        round_ends: bool = True,
    ) -> None:
        """Draw a tube from `start` to `end` (body coordinates).

        `widths` and `depths` are the lateral and frontal half axes at the positions `at` along the axis (evenly spaced
        unless given; `depths` None = round). `round_ends` closes the tube with half balls, else it is cut straight.
        """
        view = self.view
        a = np.array(widths) * view.scale
        b = a if depths is None else np.array(depths) * view.scale
        cos, sin = math.cos(view.yaw), math.sin(view.yaw)
        half = np.hypot(a * cos, b * sin)
        turn = math.atan2(b.mean() * sin, a.mean() * cos)
        positions = np.linspace(0, 1, len(a)) if at is None else np.array(at)

        (x0, y0, z0), (x1, y1, z1) = view.project(np.asarray(start)), view.project(np.asarray(end))
        dx, dy = x1 - x0, y1 - y0
        length = max(math.hypot(dx, dy), 1e-3)
        reach = half.max() + 1
        left, right = max(0, int(min(x0, x1) - reach)), min(self.labels.shape[1], int(max(x0, x1) + reach) + 1)
        top, bottom = max(0, int(min(y0, y1) - reach)), min(self.labels.shape[0], int(max(y0, y1) + reach) + 1)
        if left >= right or top >= bottom:
            return
        rows, columns = np.ogrid[top:bottom, left:right]
        rows, columns = (rows - y0).astype(np.float32), (columns - x0).astype(np.float32)
        raw = (columns * dx + rows * dy) / length**2
        along = np.clip(raw, 0, 1)
        width = np.interp(along, positions, half).astype(np.float32)
        across = (columns * dy - rows * dx) / (length * width)
        overhang = (raw - along) * length / width
        radius = across**2 + overhang**2
        inside = radius < 1 if round_ends else (radius < 1) & (overhang == 0)

        window = (slice(top, bottom), slice(left, right))
        bulge = np.sqrt(np.maximum(1 - radius, 0))
        near = z0 + along * (z1 - z0) + bulge * np.interp(along, positions, a * b / half)
        visible = inside & (near > self.near[window])
        across, along, bulge = across[visible], along[visible], bulge[visible]
        azimuth = np.arcsin(np.clip(across, -1, 1)) - turn
        azimuth = (azimuth + math.pi) % (2 * math.pi) - math.pi
        self.labels[window][visible] = paint(azimuth, along)
        self.shade[window][visible] = 0.62 + 0.38 * bulge + 0.22 * self.light_side * across
        self.near[window][visible] = near[visible]


@dataclass(frozen=True)
class Limb:
    """Three joints of an arm or a leg in body coordinates; `side` is +1 for the wearer's left, -1 for the right."""

    side: int
    root: np.ndarray
    middle: np.ndarray
    tip: np.ndarray


@dataclass(frozen=True)
class Pose:
    """A moment of walking: two legs, two arms, and the height of the hips above their place in a straight stand."""

    legs: tuple[Limb, Limb]
    arms: tuple[Limb, Limb]
    sink: float


def walk(phase: float, stride: float, build: float, arm_swing: float, elbow: float) -> Pose:
    """The pose at `phase` (radians) of a step cycle; `stride` is the largest angle of the thigh, in radians."""
    legs, arms, lowest = [], [], 1.0
    for side in (1, -1):
        swing = math.sin(phase + (0 if side == 1 else math.pi))
        lift = max(0.0, math.cos(phase + (0 if side == 1 else math.pi)))
        thigh = stride * swing
        shin = thigh - (0.1 + 1.5 * stride * lift + 0.25 * stride * max(0.0, -swing))
        hip = np.array([side * 0.046 * build, 0.51, 0.0])
        knee = hip + 0.235 * np.array([0.03 * side, -math.cos(thigh), math.sin(thigh)])
        ankle = knee + 0.225 * np.array([0.0, -math.cos(shin), math.sin(shin)])
        legs.append(Limb(side, hip, knee, ankle))
        lowest = min(lowest, ankle[1])

        upper = -arm_swing * swing
        lower = upper + elbow
        shoulder = np.array([side * 0.098 * build, 0.795, 0.0])
        joint = shoulder + 0.165 * np.array([0.16 * side, -math.cos(upper), math.sin(upper)])
        wrist = joint + 0.145 * np.array([0.02 * side, -math.cos(lower), math.sin(lower)])
        arms.append(Limb(side, shoulder, joint, wrist))
    drop = np.array([0.0, lowest - 0.04, 0.0])
    moved = [Limb(limb.side, limb.root - drop, limb.middle - drop, limb.tip - drop) for limb in (*legs, *arms)]
    return Pose(legs=tuple(moved[:2]), arms=tuple(moved[2:]), sink=float(drop[1]))
