"""Augmentation drawn often enough to see its distribution; normalisation by hand."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from data.transforms import EvalTransform, TrainTransform, seeded

H, W, PAD = 40, 20, 6
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
IDENTITY = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def train_transform(**changes):
    defaults = {"size": (H, W), "flip_prob": 0.0, "padding": 0, "erase_prob": 0.0, **HALF}
    return TrainTransform(**(defaults | changes))


def triple_of(image):
    return [Image.fromarray(image)] * 3


def ramp():
    """Pixel (y, x) holds (1 + y, 1 + x, 255): its place can be read from its colour, and 0 is padding."""
    y, x = np.mgrid[:H, :W]
    return np.stack([1 + y, 1 + x, np.full_like(x, 255)], axis=-1).astype(np.uint8)


def place(image):
    """Flip, and shift of the crop against the padded image, read from a transformed ramp (3, H, W) in 0..255."""
    y, x = H // 2, W // 2
    row, left, right = image[0, y, x] - 1, image[1, y, x], image[1, y, x + 1]
    flipped = bool(left > right)
    column = W - left if flipped else left - 1
    return flipped, int(row - y) + PAD, int(column - x) + PAD


def test_evaluation_by_hand():
    image = np.zeros((2, 3, 3), dtype=np.uint8)
    image[0, 0] = (255, 51, 102)
    transform = EvalTransform(size=(2, 3), mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    result = transform(triple_of(image))
    assert result.shape == (3, 3, 2, 3) and result.dtype == torch.float32
    torch.testing.assert_close(result[1, :, 0, 0], torch.tensor([1.0, -0.2, 0.2]))
    torch.testing.assert_close(result[2, :, 1, 2], torch.tensor([-1.0, -1.0, 0.0]))


@pytest.mark.parametrize(
    ("transform", "resample"),
    [
        (EvalTransform(size=(H, W), **IDENTITY), Image.Resampling.BILINEAR),
        (train_transform(**IDENTITY), Image.Resampling.BICUBIC),
    ],
)
def test_resize_takes_height_first_and_its_own_filter(transform, resample):
    noise = np.random.default_rng(0).integers(0, 256, (31, 47, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(noise).resize((W, H), resample))
    result = transform(triple_of(noise))[0].permute(1, 2, 0) * 255
    torch.testing.assert_close(result, torch.from_numpy(expected.astype(np.float32)))


def test_modalities_of_different_sizes_are_joined():
    images = [Image.new("RGB", size) for size in ((W, H), (50, 60), (W, H + 1))]
    assert train_transform()(images).shape == (3, 3, H, W)


def test_flip_and_crop_frequencies():
    transform = train_transform(flip_prob=0.3, padding=PAD, **IDENTITY)
    with seeded(0):
        places = [place(image * 255) for _ in range(400) for image in transform(triple_of(ramp()))]
    flips, rows, columns = zip(*places, strict=True)
    assert 0.26 < np.mean(flips) < 0.34  # 0.3, 3 standard deviations
    for shifts in (rows, columns):
        assert set(shifts) == set(range(2 * PAD + 1))
        assert np.bincount(shifts).min() > 55  # 92 expected


def test_padding_is_black():
    transform = train_transform(padding=PAD)
    with seeded(1):
        results = [transform(triple_of(ramp()))[0] for _ in range(20)]
    outside = [image[:, image[2] < 1] for image in results]
    assert max(pixels.numel() for pixels in outside) > 0
    assert all((pixels == -1).all() for pixels in outside)


def test_each_modality_draws_its_own_geometry_unless_synchronised():
    apart, together = (train_transform(flip_prob=0.5, padding=PAD, sync=sync, **IDENTITY) for sync in (False, True))
    with seeded(0):
        drawn_apart = [{place(image * 255) for image in apart(triple_of(ramp()))} for _ in range(50)]
        drawn_together = [{place(image * 255) for image in together(triple_of(ramp()))} for _ in range(50)]
    assert np.mean([len(places) for places in drawn_apart]) > 2.8
    assert {len(places) for places in drawn_together} == {1}
    assert len(set.union(*drawn_together)) > 30


@pytest.mark.parametrize("sync", [False, True])
def test_erasing_is_noise_in_a_rectangle_drawn_per_modality(sync):
    transform = train_transform(erase_prob=0.4, sync=sync)
    black = triple_of(np.zeros((H, W, 3), dtype=np.uint8))
    with seeded(0):
        erased = torch.cat([transform(black) for _ in range(200)]) != -1  # (600, 3, H, W)
    happened = erased.any(dim=1).flatten(1).any(dim=1)
    assert 0.34 < happened.float().mean() < 0.46  # 0.4, 3 standard deviations
    per_triple = happened.view(-1, 3).sum(dim=1)
    assert ((per_triple == 1) | (per_triple == 2)).any()
    areas = []
    for mask in erased[happened].any(dim=1):
        rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
        area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert mask.sum() == area  # one full rectangle
        areas.append(area.item() / (H * W))
    assert min(areas) > 0.01 and max(areas) < 0.36  # 0.02 to 1/3, up to the rounding of sides
    assert min(areas) < 0.06 and max(areas) > 0.28


def test_erased_pixels_are_standard_normal():
    transform = train_transform(erase_prob=1.0)
    black = triple_of(np.zeros((H, W, 3), dtype=np.uint8))
    with seeded(0):
        results = torch.cat([transform(black) for _ in range(100)])
    noise = results[results != -1]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_seeded_is_reproducible_and_leaves_no_trace():
    torch.manual_seed(3)
    random.seed(3)
    expected = torch.rand(2), random.random()
    torch.manual_seed(3)
    random.seed(3)
    inside = []
    for entropy in ((1, 2, 3), (1, 2, 3), (1, 2, 4)):
        with pytest.raises(KeyError), seeded(*entropy):
            inside.append((torch.rand(2).tolist(), random.random()))
            raise KeyError
    assert inside[0] == inside[1] != inside[2]
    assert torch.equal(torch.rand(2), expected[0]) and random.random() == expected[1]
