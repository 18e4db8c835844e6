"""What a three-sensor camera sees: layers of material are composed, lit and recorded as RGB, NI and TI images.

A surface is described by six numbers (the last axis of every layer): red, green, blue and near-infrared reflectance,
temperature (0 = coldest, 1 = hottest the thermal sensor shows), and how much visible light it emits at night. Nothing
here knows what is drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

OVERSAMPLING = 2
"""Things are drawn this many times larger, then averaged down."""
CHANNELS = 6
REFLECTANCE, NI, TI, GLOW = slice(0, 4), 3, 4, 5

Material = tuple[float, ...]
"""The six numbers of a surface that is the same everywhere."""


@dataclass(frozen=True)
class Layer:
    """Something drawn: `surface` (H, W, 6), multiplied by `alpha` (H, W), the share of each pixel that it covers."""

    surface: np.ndarray
    alpha: np.ndarray


@dataclass(frozen=True)
class Light:
    """The light of one track: exposure and colour of visible light, exposure of near-infrared, noise of the sensors."""

    name: str
    exposure: float
    colour: tuple[float, float, float]
    ni_exposure: float
    noise: float
    glow: float
    flare: float  # probability of lens flare in a frame
    contrast: float  # 0 = shadowless, 1 = hard light from the side
    spot: float  # 0 = even light, 1 = only what a lamp reaches


LIGHTS = {
    "day": Light("day", 1.05, (1.0, 1.0, 0.98), 0.95, 0.012, 0.0, 0.06, 0.9, 0.05),
    "dusk": Light("dusk", 0.66, (1.0, 0.88, 0.86), 0.85, 0.028, 0.5, 0.14, 0.45, 0.25),
    "night": Light("night", 0.46, (1.0, 0.88, 0.68), 1.0, 0.050, 0.9, 0.34, 0.35, 0.7),
}


@dataclass(frozen=True)
class Camera:
    """How a camera records and how it looks at the scene."""

    cast: tuple[float, float, float]
    ni_gain: float
    ti_gain: float
    ti_offset: float
    sharpness: float  # standard deviation of the lens blur, in pixels
    scale: float  # height of an average adult, as a share of the image height
    pitch: float  # how far it looks down, in radians
    lights: tuple[float, float, float]  # how often there is day, dusk and night

    @classmethod
    def sample(cls, rng: np.random.Generator, rank: int) -> Camera:
        """Camera number `rank`, counted from 0; day, dusk and night lead in turn."""
        lights = np.roll([0.52, 0.3, 0.18], rank)
        return cls(
            cast=tuple(rng.uniform(0.93, 1.07, 3)),
            ni_gain=rng.uniform(0.93, 1.07),
            ti_gain=rng.uniform(0.93, 1.05),
            ti_offset=rng.uniform(-0.03, 0.04),
            sharpness=rng.uniform(0.35, 0.75),
            scale=rng.uniform(0.89, 0.95),
            pitch=rng.uniform(0.05, 0.3),
            lights=tuple(lights),
        )


def smooth_noise(
    rng: np.random.Generator, height: int, width: int, cell_height: float, cell_width: float
) -> np.ndarray:
    """Smooth noise of about unit range [-1, 1] (H, W), one bump per cell of the given size in pixels."""
    rows, columns = max(2, round(height / cell_height)), max(2, round(width / cell_width))
    coarse = Image.fromarray(rng.uniform(-1, 1, (rows, columns)).astype(np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def shrink(array: np.ndarray, factor: int = OVERSAMPLING) -> np.ndarray:
    """Average `factor` x `factor` pixels into one: (H * f, W * f, ...) -> (H, W, ...)."""
    rows = sum(array[i::factor] for i in range(factor))
    return sum(rows[:, i::factor] for i in range(factor)) / factor**2


def layer_from_labels(
    labels: np.ndarray, materials: np.ndarray, shade: np.ndarray | None = None, warmth: np.ndarray | None = None
) -> Layer:
    """Look the materials up and average down.

    `labels` (H * f, W * f) holds 0 where nothing is and i + 1 for row i of `materials` (n, 6);
    `shade` multiplies the reflectances and `warmth` the temperature.
    """
    table = np.vstack([np.zeros((1, CHANNELS)), materials]).astype(np.float32)
    surface = table[labels]
    if shade is not None:
        surface[..., REFLECTANCE] *= shade[..., None]
    if warmth is not None:
        surface[..., TI] *= warmth
    return Layer(shrink(surface), shrink((labels > 0).astype(np.float32)))


def compose(surface: np.ndarray, layer: Layer) -> np.ndarray:
    """Put `layer` over `surface` (H, W, 6)."""
    return surface * (1 - layer.alpha[..., None]) + layer.surface


def cast_shadow(surface: np.ndarray, x: float, y: float, reach: float, strength: float) -> np.ndarray:
    """Darken the ground around (x, y): the soft shadow under something `reach` pixels wide. Heat has no shadow."""
    rows, columns = _grid(surface)
    depth = np.exp(-(((columns - x) / reach) ** 2) - ((rows - y) / (0.22 * reach)) ** 2).astype(np.float32)
    shaded = surface.copy()
    shaded[..., REFLECTANCE] *= 1 - strength * depth[..., None]
    return shaded


def add_halo(surface: np.ndarray, x: float, y: float, reach: float, strength: float) -> np.ndarray:
    """The glare of a lamp at (x, y): it glows in visible light and is bright in near-infrared."""
    rows, columns = _grid(surface)
    distance = np.hypot(columns - x, rows - y)
    glare = (np.exp(-distance / reach) + 0.8 * np.exp(-((distance / (0.45 * reach)) ** 2))).astype(np.float32)
    lit = surface.copy()
    lit[..., GLOW] += np.float32(1.3 * strength) * glare
    lit[..., NI] += np.float32(0.6 * strength) * glare
    return lit


def record(surface: np.ndarray, camera: Camera, light: Light, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One frame of `surface` (H, W, 6) on the three sensors: modality -> (H, W, 3) uint8."""
    blur = camera.sharpness + rng.exponential(0.3)
    motion = int(rng.choice([1, 1, 1, 2, 3, 5]))
    return {
        "RGB": _record_rgb(surface, camera, light, blur, motion, rng),
        "NI": _record_ni(surface, camera, light, blur, motion, rng),
        "TI": _record_ti(surface, camera, rng),
    }


def _record_rgb(
    surface: np.ndarray, camera: Camera, light: Light, blur: float, motion: int, rng: np.random.Generator
) -> np.ndarray:
    exposure = light.exposure * rng.lognormal(0, 0.12 + 0.16 * light.spot)
    colour = exposure * np.array(light.colour) * camera.cast * rng.normal(1, 0.03, 3)
    lamp = _lamp(rng, surface, light.spot)
    image = surface[..., :3] * (lamp[..., None] * colour.astype(np.float32))
    image += surface[..., GLOW, None] * np.float32(light.glow) * np.array([1.0, 0.86, 0.6], np.float32)
    if rng.random() < light.flare:
        image = _add_flare(image, rng)
    image = _blur(image, blur, motion)
    grain = rng.standard_normal(image.shape, np.float32) * np.float32(light.noise)
    return _to_bytes(image + grain * (0.6 + 0.8 * np.sqrt(image)))


def _record_ni(
    surface: np.ndarray, camera: Camera, light: Light, blur: float, motion: int, rng: np.random.Generator
) -> np.ndarray:
    gain = camera.ni_gain * light.ni_exposure * rng.lognormal(0, 0.1)
    image = surface[..., NI] * _lamp(rng, surface, 0.5 * light.spot) * np.float32(gain)
    image = _blur(image[..., None], blur + 0.1, motion)
    grain = rng.standard_normal(image.shape, np.float32) * np.float32(0.012 + 0.3 * light.noise)
    return np.repeat(_to_bytes(image + grain), 3, axis=2)


def _record_ti(surface: np.ndarray, camera: Camera, rng: np.random.Generator) -> np.ndarray:
    """Half the resolution, soft, with faint column noise and automatic gain."""
    height, width = surface.shape[:2]
    heat = surface[..., TI] * np.float32(camera.ti_gain * rng.normal(1, 0.05)) + np.float32(
        camera.ti_offset + rng.normal(0, 0.025)
    )
    picture = Image.fromarray(_to_bytes(heat)).resize((width // 2, height // 2), Image.Resampling.BOX)
    picture = picture.filter(ImageFilter.GaussianBlur(0.75)).resize((width, height), Image.Resampling.BICUBIC)
    columns = rng.standard_normal((1, width), np.float32) * np.float32(0.008)
    grain = rng.standard_normal((height, width), np.float32) * np.float32(0.014)
    return np.repeat(_to_bytes(np.asarray(picture, np.float32) / 255 + columns + grain)[..., None], 3, axis=2)


def _lamp(rng: np.random.Generator, surface: np.ndarray, spot: float) -> np.ndarray:
    """Relative brightness (H, W) of light that falls off around a random point; `spot` = 0 is even light."""
    height, width = surface.shape[:2]
    rows, columns = _grid(surface)
    y, x = rng.uniform(-0.1, 0.9) * height, rng.uniform(0.1, 0.9) * width
    reach = max(height, width)
    distance = ((rows - y) / reach) ** 2 + ((columns - x) / reach) ** 2
    return (1 - spot + spot * 1.35 * np.exp(-2.2 * distance)).astype(np.float32)


def _add_flare(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A light source in or beside the picture: halo, streaks, ghosts on the line through the centre, veiling haze."""
    height, width = image.shape[:2]
    rows, columns = _grid(image)
    x, y = rng.uniform(-10, width + 10), rng.uniform(-10, 0.75 * height)
    strength = rng.uniform(0.4, 1.3)
    dx, dy = columns - x, rows - y
    distance = np.hypot(dx, dy)
    glare = 1.2 * np.exp(-distance / rng.uniform(9, 26)) + 0.35 * np.exp(-distance / 75)
    for angle in rng.uniform(0, math.pi) + np.arange(3) * math.pi / 3:
        across = dx * math.sin(angle) - dy * math.cos(angle)
        glare = glare + 0.4 * np.exp(-np.abs(across) / 1.6 - distance / 60)
    for step in rng.uniform(0.5, 1.7, 3):
        ghost_x, ghost_y = x + step * (width / 2 - x) * 1.3, y + step * (height / 2 - y) * 1.3
        edge = np.hypot(columns - ghost_x, rows - ghost_y) - rng.uniform(5, 16)
        glare = glare + 0.12 / (1 + np.exp(np.clip(edge, -30, 30)))
    colour = np.array([1.0, rng.uniform(0.8, 1.0), rng.uniform(0.55, 1.0)], np.float32)
    haze = np.float32(0.15 * strength)
    return image * (1 - haze) + (haze + np.float32(strength) * glare.astype(np.float32))[..., None] * colour


def _blur(image: np.ndarray, deviation: float, motion: int) -> np.ndarray:
    """Lens blur, then `motion` pixels of horizontal motion blur; (H, W, 1 or 3) float in, the same out."""
    picture = Image.fromarray(_to_bytes(image).squeeze(2) if image.shape[2] == 1 else _to_bytes(image))
    blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(deviation)), np.float32).reshape(image.shape) / 255
    if motion == 1:
        return blurred
    padded = np.pad(blurred, ((0, 0), (motion // 2, motion), (0, 0)), mode="edge")
    return sum(padded[:, i : i + image.shape[1]] for i in range(motion)) / np.float32(motion)


def _grid(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (H, 1) and column numbers (1, W)."""
    rows, columns = np.ogrid[: image.shape[0], : image.shape[1]]
    return rows, columns


def _to_bytes(image: np.ndarray) -> np.ndarray:
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
