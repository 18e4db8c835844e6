"""Drawing solid things: a view, and a depth-buffered canvas for round tubes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from data.synthetic.imaging import OVERSAMPLING

Paint = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(azimuth, along) -> labels, all of shape (pixels,)."""
FacePaint = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(lateral, up, front) -> labels, all of shape (pixels,)."""


@dataclass(frozen=True)
class View:
    """Where a figure stands and how it is seen: `scale` is the unit of its coordinates, in pixels."""

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

    def __init__(self, view: View, light_side: float, height: int, width: int) -> None:
        size = (height * OVERSAMPLING, width * OVERSAMPLING)
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

    def face(self, corners: np.ndarray, paint: FacePaint) -> None:
        """Draw a flat polygon with `corners` (n, 3) in body coordinates, clockwise for those who can see it."""
        x, y, near = self.view.project(corners.T)
        if (x[1:] - x[0]) @ np.diff(y) - (y[1:] - y[0]) @ np.diff(x) < 1:  # twice the area
            return
        left, right = max(0, int(x.min())), min(self.labels.shape[1], int(x.max()) + 2)
        top, bottom = max(0, int(y.min())), min(self.labels.shape[0], int(y.max()) + 2)
        if left >= right or top >= bottom:
            return
        stencil = Image.new("1", (right - left, bottom - top))
        ImageDraw.Draw(stencil).polygon(list(zip(x - left, y - top, strict=True)), fill=1)
        # a flat face: everything on it is a linear function of the place on the screen
        linear, *_ = np.linalg.lstsq(np.column_stack([x, y, np.ones(len(x))]), np.column_stack([near, corners]))

        window = (slice(top, bottom), slice(left, right))
        rows, columns = np.nonzero(np.asarray(stencil))
        nearness = (columns + left) * linear[0, 0] + (rows + top) * linear[1, 0] + linear[2, 0]
        visible = nearness > self.near[window][rows, columns]
        rows, columns, nearness = rows[visible], columns[visible], nearness[visible]
        lateral, up, front = ((columns + left) * a + (rows + top) * b + c for a, b, c in linear[:, 1:].T)
        across, down = -linear[:2, 0]  # the normal is (across, down, 1)
        light = (0.6 * self.light_side * across - 0.75 * down + 0.45) / math.hypot(across, down, 1)
        self.labels[window][rows, columns] = paint(lateral, up, front)
        self.shade[window][rows, columns] = 0.52 + 0.52 * max(0.0, light)
        self.near[window][rows, columns] = nearness
