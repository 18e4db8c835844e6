"""Augmentation in batches against one image at a time, and its draws against those of the CPU transforms."""

import numpy as np
import pytest
import torch
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import v2

from data import device_transforms
from data.device_kernel import prepare
from data.device_transforms import TAPE_STARTS, DeviceAugment, DeviceNormalize
from data.transforms import ERASED_AREA, TrainTransform, normalize, seeded
from utils.kernels import has_triton

H, W, PAD = 40, 20, 6
MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
FIELDS = ("flip", "top", "left", "erase_top", "erase_left", "erase_height", "erase_width", "start")


def augment(size=(H, W), seed=7, **changes):
    options = {"flip_prob": 0.5, "padding": PAD, "erase_prob": 0.5, "mean": MEAN, "std": STD}
    return DeviceAugment(TrainTransform(size=size, **(options | changes)), seed)


def drawn(transform, positions, epoch=1):
    """Field -> (B * M,) values."""
    return dict(zip(FIELDS, transform.draw(epoch, positions).flatten(1).numpy(), strict=True))


def one_image(image, tape, padding, flip, top, left, erase_top, erase_left, erase_height, erase_width, start):
    """What a batch must do to each of its images, by torchvision's functions and plain slices."""
    height, width = image.shape[-2:]
    image = v2.functional.horizontal_flip(image) if flip else image
    image = v2.functional.pad(image, [padding] * 4)
    image = normalize(v2.functional.crop(image, top, left, height, width), MEAN, STD)
    noise = tape[start : start + 3 * height * width].view(3, height, width)
    rows, columns = slice(erase_top, erase_top + erase_height), slice(erase_left, erase_left + erase_width)
    image[:, rows, columns] = noise[:, rows, columns]
    return image


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("padding", [0, PAD])
def test_a_batch_is_what_each_image_alone_would_be(padding, sync):
    transform = augment(padding=padding, sync=sync)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 50, 3, H, W), dtype=np.uint8))
    before = pixels.clone()
    table = transform.draw(3, range(10, 60))
    result = transform(pixels, table)
    assert result.shape == pixels.shape and result.dtype == torch.float32 and torch.equal(pixels, before)
    flipped, erased = table[0].float().mean(), (table[5] > 0).float().mean()
    assert 0.3 < flipped < 0.7 and 0.3 < erased < 0.7  # both cases are looked at
    for m in range(3):
        for i in range(50):
            expected = one_image(pixels[m, i], transform.tape, padding, *table[:, m, i].tolist())
            assert torch.equal(result[m, i], expected)


@pytest.mark.skipif(not has_triton(), reason="no Triton, or an old one: the kernels are not used")
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (1, 0, 2, 3, 4), (0, 1, 3, 4, 2)])
@pytest.mark.parametrize("size", [(H, W), (33, 32)])
def test_the_kernel_has_the_bits_of_torch_s_operations(size, order):
    """Under Triton's interpreter; also where a sample's modalities lie side by side, as they come from the cache, and
    where a pixel's channels do."""
    transform = augment(size)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 8, 3, *size), dtype=np.uint8))
    pixels = pixels.permute(order).contiguous().permute([order.index(i) for i in range(5)])
    table = transform.draw(3, range(8))
    assert table[0].any() and table[5].any() and not table[0].all()
    found = prepare(pixels, transform.normalize.levels(), table, transform.tape, PAD)
    assert found.is_contiguous() and torch.equal(found, transform.as_written(pixels.contiguous(), table))
    plain = prepare(pixels, transform.normalize.levels())
    assert plain.is_contiguous() and torch.equal(plain, transform.normalize.as_written(pixels))


def test_a_kernel_is_used_where_it_has_the_same_bits_and_the_log_says_where_not(monkeypatch, caplog):
    pixels = torch.randint(0, 256, (3, 2, 3, H, W), dtype=torch.uint8)
    monkeypatch.setattr(device_transforms, "can_launch", lambda device: True)
    expected, calls = DeviceNormalize(MEAN, STD).as_written(pixels), []
    for wrong in (0.0, 1e-6):

        def kernel(pixels, levels, wrong=wrong):
            calls.append(wrong)
            return expected.clone() + wrong

        monkeypatch.setattr(device_transforms, "prepare", kernel)
        normalize = DeviceNormalize(MEAN, STD)
        for _ in range(3):
            assert torch.equal(normalize(pixels), expected)
    assert calls == [0.0] * 4 + [1e-6]
    assert caplog.messages == ["batches are made more slowly: a pixel differs by inf"]


def test_normalisation_has_the_same_bits_as_on_the_host():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    assert torch.equal(DeviceNormalize(MEAN, STD)(pixels), (pixels.float() / 255 - mean) / std)
    assert torch.equal(normalize(pixels, MEAN, STD), (pixels.float() / 255 - mean) / std)


def test_draws_are_a_function_of_seed_epoch_and_position():
    whole = augment().draw(5, range(96))
    split = [augment().draw(5, range(first, first + 32)) for first in (0, 32, 64)]
    assert torch.equal(torch.cat(split, dim=2), whole)
    assert torch.equal(augment().draw(5, [70, 3, 3]), whole[:, :, [70, 3, 3]])
    assert torch.equal(augment().draw(5, range(1, 96, 2)), whole[:, :, 1::2])
    everything = augment().draw(5, range(3456))
    assert torch.equal(everything[:, :, :96], whole)
    for other in (augment().draw(6, range(96)), augment(seed=8).draw(5, range(96)), everything[:, :, 96:192]):
        assert (other[7] == whole[7]).float().mean() < 0.05  # places on the tape


def test_draws_leave_the_global_generators_alone():
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    augment().draw(1, range(8))
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]


def cpu_rectangles(size, count):
    """Top, left, height and width of what timm's RandomErasing erases, (n, 4), where it does."""
    erase = RandomErasing(0.5, *ERASED_AREA, mode="const", device="cpu")
    found = []
    with seeded(0):
        for _ in range(count):
            erased = erase(torch.ones(1, *size))[0] == 0
            if erased.any():
                y, x = erased.any(1).nonzero(), erased.any(0).nonzero()
                found.append((y.min(), x.min(), y.max() + 1 - y.min(), x.max() + 1 - x.min()))
    return np.array(found, dtype=float)


def kolmogorov(a, b):
    """Largest difference of two empirical distributions, in units in which 1.63 is passed once in a hundred times."""
    grid = np.concatenate([a, b])
    shares = [np.searchsorted(np.sort(values), grid, side="right") / len(values) for values in (a, b)]
    return np.abs(shares[0] - shares[1]).max() * np.sqrt(len(a) * len(b) / (len(a) + len(b)))


def chi_square(values, cells):
    """Against all of `cells` being equally likely, in standard deviations above its mean."""
    counts = np.bincount(values.astype(int), minlength=cells)
    assert len(counts) == cells
    expected = len(values) / cells
    return (((counts - expected) ** 2 / expected).sum() - (cells - 1)) / np.sqrt(2 * (cells - 1))


@pytest.mark.parametrize("size", [(H, W), (20, 60)])  # flat images: many rectangles do not fit at first
def test_distribution_of_the_cpu_transforms(size):
    values = drawn(augment(size=size), range(2000))
    count = len(values["flip"])
    assert abs(values["flip"].mean() - 0.5) < 3 * 0.5 / np.sqrt(count)
    for name in ("top", "left"):
        assert chi_square(values[name], 2 * PAD + 1) < 3
    assert values["start"].min() < 0.01 * TAPE_STARTS and 0.99 * TAPE_STARTS < values["start"].max() < TAPE_STARTS

    expected = cpu_rectangles(size, 4000)
    erased = values["erase_height"] > 0
    assert (erased == (values["erase_width"] > 0)).all()
    assert abs(erased.mean() - 0.5) < 3 * 0.5 / np.sqrt(count) and abs(len(expected) / 4000 - 0.5) < 0.025
    ours = np.stack([values[f"erase_{name}"][erased] for name in ("top", "left", "height", "width")], axis=1)
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= size).all()

    def properties(found):
        top, left, height, width = found.T
        area, aspect = height * width, height / width
        return {
            "top": top,
            "left": left,
            "height": height,
            "width": width,
            "area": area,
            "aspect": aspect,
            "place down": top / (size[0] - height),
            "place across": left / (size[1] - width),
        }

    theirs = properties(expected)
    distance = {name: kolmogorov(found, theirs[name]) for name, found in properties(ours).items()}
    assert max(distance.values()) < 1.63, distance

    # nothing hangs together: each pair of draws, and the draws of the modalities
    names = ("place down", "place across", "area")
    apart = [values[name][erased] for name in ("flip", "top", "left", "start")] + [properties(ours)[n] for n in names]
    correlation = np.corrcoef(apart) - np.eye(len(apart))
    assert np.abs(correlation).max() < 4 / np.sqrt(erased.sum()), correlation
    for name in FIELDS:
        correlation = np.corrcoef(values[name].reshape(3, -1)) - np.eye(3)
        assert np.abs(correlation).max() < 4 / np.sqrt(2000), name


@pytest.mark.parametrize("erase_prob, flip_prob", [(0.0, 1.0), (1.0, 0.0)])
def test_probabilities_of_zero_and_one(erase_prob, flip_prob):
    values = drawn(augment(erase_prob=erase_prob, flip_prob=flip_prob), range(300))
    assert (values["flip"] == flip_prob).all() and ((values["erase_height"] > 0) == erase_prob).all()


def test_modalities_are_drawn_apart_unless_synchronised():
    apart, together = (augment(sync=sync).draw(1, range(400)).numpy() for sync in (False, True))
    for field in range(3):
        assert (together[field] == together[field][0]).all()
        assert (apart[field][1] != apart[field][0]).mean() > 0.4
    for m in (1, 2):  # erasing is drawn for each modality either way
        assert (together[5][m] != together[5][0]).mean() > 0.4
        assert (together[7][m] != together[7][0]).all()


def test_noise_is_standard_normal_and_independent_within_an_image():
    transform = augment(size=(64, 32), erase_prob=1.0, padding=0)
    white = torch.full((3, 100, 3, 64, 32), 255, dtype=torch.uint8)
    table = transform.draw(1, range(100))
    table[3:5], table[5], table[6] = 0, 64, 32  # the whole image
    noise = transform(white, table).flatten(0, 1)  # (I, 3, H, W), 1.8 million values
    assert abs(noise.mean()) < 0.005 and abs(noise.std() - 1) < 0.005
    assert abs((noise**3).mean()) < 0.02 and abs((noise**4).mean() - 3) < 0.05
    neighbours = {
        "down": (noise[..., 1:, :] * noise[..., :-1, :]).mean(),
        "across": (noise[..., 1:] * noise[..., :-1]).mean(),
        "channels": (noise[:, 1:] * noise[:, :-1]).mean(),
    }
    assert all(abs(value) < 0.005 for value in neighbours.values()), neighbours
    assert all(len(image.unique()) > 0.999 * image.numel() for image in noise[:5])  # no value twice
    assert not torch.equal(augment(seed=8).tape[:100], transform.tape[:100])
