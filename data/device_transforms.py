"""Augmentation of whole batches where the network runs: what `transforms.py` does image by image on the host.

The random numbers are drawn on the host, a few per image; the pixels never leave the device.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.kernels import can_launch, proven
from utils.modalities import MODALITIES

from .device_kernel import prepare
from .transforms import ERASED_AREA, TrainTransform, normalize

ATTEMPTS = 10
"""Rectangles that are tried until one fits into the image."""
MAX_LOG_ASPECT = math.log(1 / 0.3)
UNIFORMS = 8 + 2 * ATTEMPTS
"""Numbers drawn for each image, used or not; Philox makes them four at a time, so that four must divide them."""
TAPE_STARTS = 2**22
"""Places of the noise tape at which an image may begin to read."""


class _OnDevice(nn.Module):
    """What a kernel does in the place of torch's operations, where it has shown once that it has their bits."""

    def __init__(self) -> None:
        super().__init__()
        self.by_kernel: dict[torch.device, bool] = {}

    def _fastest(self, kernel: Callable[[], Tensor], written: Callable[[], Tensor], device: torch.device) -> Tensor:
        """What both compute."""

        def differs() -> dict[str, tuple[float, float]]:
            return {"a pixel": (0.0 if torch.equal(kernel(), written()) else math.inf, 0.0)}

        if device not in self.by_kernel:
            self.by_kernel[device] = can_launch(device) and proven(differs, "batches are made more slowly")
        return (kernel if self.by_kernel[device] else written)()


class DeviceNormalize(_OnDevice):
    """`normalize` with its constants on the device: (M, B, 3, H, W) uint8 to float32, contiguous."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))
        self.register_buffer("values", torch.arange(256, dtype=torch.uint8).expand(3, 1, 256), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self._fastest(
            lambda: prepare(pixels, self.levels()), lambda: self.as_written(pixels.contiguous()), pixels.device
        )

    def as_written(self, pixels: Tensor) -> Tensor:
        """By torch's operations, (..., 3, H, W)."""
        return normalize(pixels, self.mean, self.std)

    def levels(self) -> Tensor:
        """(3, 256): what becomes of each value in each channel."""
        return self.as_written(self.values).squeeze(1)


class DeviceAugment(_OnDevice):
    """Random flip, zero padding and random crop, normalisation, random erasing: `TrainTransform`'s distribution.

    What happens to a triple is a pure function of the seed, the epoch and the triple's position in it, whatever the
    other triples of its batch. The noise of erased pixels is read from a tape of standard normal values that is made
    once from the seed: an image whose draw is s takes the 3·H·W values from place s on, pixel by pixel, of which only
    those inside its rectangle show. So the pixels of one image are independent; two images share values where their
    windows overlap, shifted against each other by the difference of their draws.

    Args:
        like: what to draw and how often.
        seed: of all draws and of the tape.
    """

    def __init__(self, like: TrainTransform, seed: int):
        super().__init__()
        self.like, self.seed = like, seed
        self.normalize = DeviceNormalize(like.mean, like.std)
        self.window = 3 * like.size[0] * like.size[1]
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed])))
        tape = rng.standard_normal(TAPE_STARTS + self.window - 1, dtype=np.float32)
        self.register_buffer("tape", torch.from_numpy(tape))

    def draw(self, epoch: int, positions: Sequence[int]) -> Tensor:
        """The augmentation of the triples at these positions of an epoch, on the host.

        Returns:
            (8, M, B) int64: whether to flip; top and left of the crop in the padded image; top, left, height and width
            of the erased rectangle in the crop, of height and width 0 where nothing is erased; place on the tape.
        """
        height, width = self.like.size
        u = _uniforms(self.seed, epoch, positions)  # (B, M, UNIFORMS)
        geometry = u[:, :1] if self.like.sync else u
        flip = geometry[..., 0] < self.like.flip_prob
        crop_top, crop_left = (np.floor(geometry[..., i] * (2 * self.like.padding + 1)) for i in (1, 2))

        smallest, largest = ERASED_AREA
        area = height * width * (smallest + (largest - smallest) * u[..., 8 : 8 + ATTEMPTS])
        aspect = np.exp(MAX_LOG_ASPECT * (2 * u[..., 8 + ATTEMPTS :] - 1))
        heights, widths = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (heights < height) & (widths < width)
        erased = (u[..., 3] < self.like.erase_prob) & fits.any(-1)
        first = fits.argmax(-1)[..., None]
        erase_height, erase_width = (np.take_along_axis(s, first, -1)[..., 0] * erased for s in (heights, widths))
        erase_top = np.floor(u[..., 4] * (height - erase_height + 1))
        erase_left = np.floor(u[..., 5] * (width - erase_width + 1))
        start = np.floor(u[..., 6] * TAPE_STARTS)

        fields = (flip, crop_top, crop_left, erase_top, erase_left, erase_height, erase_width, start)
        drawn = [np.broadcast_to(field, start.shape).T.astype(np.int64) for field in fields]
        return torch.from_numpy(np.stack(drawn))

    def forward(self, pixels: Tensor, drawn: Tensor) -> Tensor:
        """pixels (M, B, 3, H, W) uint8 and `draw`'s table, on the device -> float32 of the same shape, contiguous."""
        return self._fastest(
            lambda: prepare(pixels, self.normalize.levels(), drawn, self.tape, self.like.padding),
            lambda: self.as_written(pixels.contiguous(), drawn),
            pixels.device,
        )

    def as_written(self, pixels: Tensor, drawn: Tensor) -> Tensor:
        """`forward` by torch's operations."""
        flip, crop_top, crop_left, erase_top, erase_left, erase_height, erase_width, start = drawn.flatten(1)
        crops = flip_and_crop(pixels.flatten(0, 1), flip.bool(), crop_top, crop_left, self.like.padding)
        inside = rectangles(erase_top, erase_left, erase_height, erase_width, self.like.size)
        noise = self.tape.unfold(0, self.window, 1)[start].view(crops.shape)
        return torch.where(inside[:, None], noise, self.normalize.as_written(crops)).view(pixels.shape)


def flip_and_crop(images: Tensor, flip: Tensor, top: Tensor, left: Tensor, padding: int) -> Tensor:
    """Mirrors images (B, 3, H, W) where `flip` (B,) says so, adds a black border, cuts (H, W) at `top`, `left` (B,)."""
    height, width = images.shape[-2:]
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
    padded = F.pad(images, [padding] * 4)
    crops = padded.unfold(-2, height, 1).unfold(-2, width, 1)  # (B, 3, top, left, H, W), a view of every crop there is
    return crops[torch.arange(len(images), device=images.device), :, top, left]


def rectangles(top: Tensor, left: Tensor, height: Tensor, width: Tensor, size: tuple[int, int]) -> Tensor:
    """Which pixels of (H, W) lie inside each of B rectangles given by (B,) integers: (B, H, W) bool."""
    y, x = (torch.arange(length, device=top.device) for length in size)
    rows = (y >= top[:, None]) & (y < (top + height)[:, None])
    columns = (x >= left[:, None]) & (x < (left + width)[:, None])
    return rows[:, :, None] & columns[:, None]


def _uniforms(seed: int, epoch: int, positions: Sequence[int]) -> np.ndarray:
    """(B, M, UNIFORMS) in [0, 1), row by row from one counter-based stream an epoch, which can start at any row."""
    rows = np.asarray(positions)
    first, last = int(rows.min()), int(rows.max())
    stream = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    stream.advance(first * len(MODALITIES) * UNIFORMS // 4)  # counted in blocks of four
    return np.random.Generator(stream).random((last - first + 1, len(MODALITIES), UNIFORMS))[rows - first]
