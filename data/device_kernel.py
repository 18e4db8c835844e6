# mypy: disable-error-code="no-untyped-def"
"""From the pixels of a batch to network input as one Triton kernel, which reads and writes each value once.

`data.device_transforms` says the same by torch's operations, each of which moves the whole batch.
"""

import torch
from torch import Tensor

from utils.kernels import launch, tl, triton

ROWS = 8
"""Rows of an image's channel that a program takes."""


def prepare(
    pixels: Tensor, levels: Tensor, drawn: Tensor | None = None, tape: Tensor | None = None, padding: int = 0
) -> Tensor:
    """Augments where there are draws, and normalises.

    Args:
        pixels: (M, B, 3, H, W) uint8; copied, unless each image is contiguous, wherever the images lie.
        levels: (3, 256) float32, what becomes of a pixel's value in each channel.
        drawn, tape, padding: of `DeviceAugment`.

    Returns:
        (M, B, 3, H, W) float32, contiguous.
    """
    modalities, batch, _, height, width = pixels.shape
    pixels = pixels if pixels.stride()[2:] == (height * width, width, 1) else pixels.contiguous()
    out = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device)
    grid = (modalities * batch * 3 * triton.cdiv(height, ROWS),)
    sizes = {"H": height, "W": width, "COLUMNS": triton.next_power_of_2(width), "R": ROWS, "AUGMENT": drawn is not None}
    drawn = None if drawn is None else drawn.contiguous()
    places = (*pixels.stride()[:2], batch, padding, modalities * batch)
    launch(_prepare_kernel, grid, pixels, levels, drawn, tape, out, *places, **sizes)
    return out


if triton is not None:

    @triton.jit(do_not_specialize=["batch", "padding", "images"])
    def _prepare_kernel(
        pixels,
        levels,
        drawn,
        tape,
        out,
        of_modality,
        of_sample,
        batch,
        padding,
        images,
        H: tl.constexpr,
        W: tl.constexpr,
        COLUMNS: tl.constexpr,
        R: tl.constexpr,
        AUGMENT: tl.constexpr,
    ):
        """Some rows of one channel of one image a program."""
        parts: tl.constexpr = (H + R - 1) // R
        program = tl.program_id(0)
        image, c = (program // (3 * parts)).to(tl.int64), program // parts % 3
        y, x = ((program % parts) * R + tl.arange(0, R))[:, None], tl.arange(0, COLUMNS)[None, :]
        inside = (y < H) & (x < W)
        pixels += (image // batch) * of_modality + (image % batch) * of_sample + c * H * W
        from_y, from_x = y, x
        if AUGMENT:
            drawn += image
            from_y = y + tl.load(drawn + images) - padding
            from_x = x + tl.load(drawn + 2 * images) - padding
            from_x = tl.where(tl.load(drawn) != 0, W - 1 - from_x, from_x)
        there = inside & (from_y >= 0) & (from_y < H) & (from_x >= 0) & (from_x < W)
        value = tl.load(pixels + from_y * W + from_x, mask=there, other=0).to(tl.int32)  # black around the image
        result = tl.load(levels + c * 256 + value)
        at = (c * H + y) * W + x
        if AUGMENT:
            down, right = y - tl.load(drawn + 3 * images), x - tl.load(drawn + 4 * images)
            erased = (down >= 0) & (down < tl.load(drawn + 5 * images))
            erased = inside & erased & (right >= 0) & (right < tl.load(drawn + 6 * images))
            noise = tl.load(tape + tl.load(drawn + 7 * images) + at, mask=erased, other=0.0)
            result = tl.where(erased, noise, result)
        tl.store(out + image * 3 * H * W + at, result, mask=inside)
