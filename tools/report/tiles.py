"""Samples as small pictures inside the page: the three modalities, what SDTPS kept of them, and its scores.

Shape letters: M modalities, N patches, H W pixels.
"""

import base64
import io
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from utils.modalities import MODALITIES
from utils.pictures import GAP, draw_selection

LONG_SIDE = 192  # pixels of one modality's picture
QUALITY = 76
GREY = 128  # between modalities, in the light and in the dark page

VIEWS = ("images", "kept", "scores")


@dataclass(frozen=True)
class Look:
    """One sample: its pixels (M, 3, H, W) uint8 and, with SDTPS, which patches it kept (M, N) and their scores."""

    pixels: Tensor
    mask: Tensor | None = None
    scores: Tensor | None = None


def views(look: Look, grid: tuple[int, int]) -> dict[str, list[Tensor]]:
    """View -> one picture (3, H, W) uint8 a modality; "images" alone without SDTPS."""
    if look.mask is None or look.scores is None:
        return {"images": list(look.pixels)}
    height, width = look.pixels.shape[-2:]
    drawn = draw_selection(look.pixels / 255, look.mask, look.scores, grid, mean=[0.0] * 3, std=[1.0] * 3)
    rows = [drawn[:, i * (height + GAP) :][:, :height] for i in range(len(MODALITIES))]
    return {name: [row[:, :, i * (width + GAP) :][:, :, :width] for row in rows] for i, name in enumerate(VIEWS)}


def tile(pictures: list[Tensor]) -> Image.Image:
    """Joins the modalities' pictures (3, H, W): tall ones side by side, wide ones below each other."""
    height, width = pictures[0].shape[-2:]
    scale = min(1.0, LONG_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    shrunk = [Image.fromarray(p.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.LANCZOS) for p in pictures]
    step = (size[0] + GAP, 0) if height > width else (0, size[1] + GAP)
    whole = [side + (len(shrunk) - 1) * across for side, across in zip(size, step, strict=True)]
    joined = Image.new("RGB", (whole[0], whole[1]), (GREY,) * 3)
    for i, picture in enumerate(shrunk):
        joined.paste(picture, (i * step[0], i * step[1]))
    return joined


def data_uri(image: Image.Image, quality: int = QUALITY) -> str:
    """The picture itself as an address."""
    content = io.BytesIO()
    image.save(content, "WEBP", quality=quality, method=4)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def to_pixels(images: dict[str, Tensor], i: int, mean: list[float], std: list[float]) -> Tensor:
    """Sample i of normalised images (B, 3, H, W) as (M, 3, H, W) uint8 on the CPU."""
    stacked = torch.stack([images[m][i] for m in MODALITIES]).float().cpu()
    pixels = stacked * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
