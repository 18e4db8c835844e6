"""From the decoded images of a triple to network input: (M, 3, H, W) float32, one slice a modality."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import v2
from yacs.config import CfgNode

ERASED_AREA = (0.02, 1 / 3)
"""Smallest and largest share of the image that random erasing covers."""


class TrainTransform:
    """Resize, random flip, zero padding and random crop, normalisation, random erasing (Zhong et al., 2020).

    The padding is black: it comes before the normalisation. The erased rectangle covers 2 % to a third of the image
    and is filled with normal noise. Every modality gets its own draws; with `sync` flip and crop are drawn once for
    all, so that the modalities stay aligned pixel by pixel. Draws come from torch's and Python's global generators.

    Args:
        size: height and width of the result in pixels.
        mean, std: of the three channels, for values in [0, 1].
        flip_prob, erase_prob: probability of a flip and of erasing, in [0, 1].
        padding: pixels on every side before the crop.
        sync: draw flip and crop once for all modalities.
    """

    resample = Image.Resampling.BICUBIC

    def __init__(
        self,
        *,
        size: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        flip_prob: float,
        padding: int,
        erase_prob: float,
        sync: bool = False,
    ):
        self.size = (size[0], size[1])
        self.mean, self.std = mean, std
        self.flip_prob, self.padding, self.erase_prob = flip_prob, padding, erase_prob
        self.sync = sync
        self.geometry = v2.Compose([v2.RandomHorizontalFlip(flip_prob), v2.RandomCrop(self.size, padding=padding)])
        self.erase = RandomErasing(erase_prob, *ERASED_AREA, mode="pixel", device="cpu")

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = to_pixels(images, self.size, self.resample)
        pixels = self.geometry(pixels) if self.sync else torch.stack([self.geometry(image) for image in pixels])
        return self.erase(normalize(pixels, self.mean, self.std))


class EvalTransform:
    """Resize and normalisation, for `size`, `mean` and `std` as in `TrainTransform`."""

    resample = Image.Resampling.BILINEAR

    def __init__(self, *, size: Sequence[int], mean: Sequence[float], std: Sequence[float]):
        self.size = (size[0], size[1])
        self.mean, self.std = mean, std

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        return normalize(to_pixels(images, self.size, self.resample), self.mean, self.std)


def make_transforms(cfg: CfgNode) -> tuple[TrainTransform, EvalTransform]:
    """The transforms that INPUT describes."""
    inputs = cfg.INPUT
    colours = {"mean": inputs.PIXEL_MEAN, "std": inputs.PIXEL_STD}
    train = TrainTransform(
        size=inputs.SIZE_TRAIN,
        flip_prob=inputs.PROB,
        padding=inputs.PADDING,
        erase_prob=inputs.RE_PROB,
        sync=inputs.SYNC_AUG,
        **colours,
    )
    return train, EvalTransform(size=inputs.SIZE_TEST, **colours)


def to_pixels(images: Sequence[Image.Image], size: tuple[int, int], resample: Image.Resampling) -> Tensor:
    """Resizes RGB images to (height, width) where they have another size: (M, 3, H, W) uint8."""
    wanted = size[1], size[0]
    resized = [image if image.size == wanted else image.resize(wanted, resample) for image in images]
    return torch.stack([v2.functional.pil_to_tensor(image) for image in resized])


def normalize(pixels: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """(pixels / 255 - mean) / std, channel by channel, for (..., 3, H, W) uint8: float32 of the same shape.

    The same bits on every device: CUDA would multiply by the inverse of a Python number, but divides by a tensor.
    """
    mean, std = (torch.as_tensor(v, dtype=torch.float32, device=pixels.device).view(3, 1, 1) for v in (mean, std))
    largest = torch.full((), 255.0, device=pixels.device)
    return pixels.float().div_(largest).sub_(mean).div_(std)


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Inside, torch's CPU generator and Python's `random` start from these numbers; after, they are as before."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
    python_state, torch_state = random.getstate(), torch.default_generator.get_state()
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        torch.default_generator.set_state(torch_state)
