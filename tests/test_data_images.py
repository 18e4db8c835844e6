"""Decoding of every colour mode, and files that are no images."""

import numpy as np
import pytest
from PIL import Image

from data.datasets import STRIP_BOXES, ImageSource, Sample
from data.images import check_images, read_image, read_triple
from utils.errors import UserError


def triple(*paths):
    return Sample(1, 0, -1, tuple(ImageSource(str(path)) for path in paths))


def save(path, mode="RGB", size=(16, 32), colour=None):
    Image.new(mode, size, colour if colour is not None else 0).save(path)
    return path


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("RGB", (200, 100, 50), "bmp", (200, 100, 50)),
        ("L", 77, "png", (77, 77, 77)),
        ("1", 1, "png", (255, 255, 255)),
        ("RGBA", (200, 100, 50, 0), "png", (200, 100, 50)),
        ("LA", (77, 3), "png", (77, 77, 77)),
        ("CMYK", (255, 0, 255, 0), "jpg", (0, 255, 0)),
    ],
)
def test_colour_modes(tmp_path, mode, colour, suffix, expected):
    image = read_image(str(save(tmp_path / f"a.{suffix}", mode, colour=colour)))
    assert image.mode == "RGB" and image.size == (16, 32)
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 2


@pytest.mark.filterwarnings("error")
def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "a.png", transparency=b"\x00\x80")
    assert read_image(str(tmp_path / "a.png")).getpixel((0, 0)) == (10, 20, 30)


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    pixels = np.asarray(read_image(str(tmp_path / "a.png")))
    assert pixels[0, :, 0].tolist() == [0, 1, 128, 255]
    assert (pixels[..., 0] == pixels[..., 2]).all()


def test_strip_is_cut_in_three(tmp_path):
    strip = np.zeros((128, 768, 3), dtype=np.uint8)
    strip[:, 256:512] = 100
    strip[:, 512:] = 200
    Image.fromarray(strip).save(tmp_path / "strip.png")
    sample = Sample(1, 0, -1, tuple(ImageSource(str(tmp_path / "strip.png"), box) for box in STRIP_BOXES))
    images = read_triple(sample)
    assert [image.size for image in images] == [(256, 128)] * 3
    assert [np.unique(image).tolist() for image in images] == [[0], [100], [200]]


def test_strip_that_is_too_small(tmp_path):
    path = save(tmp_path / "strip.png", size=(767, 128))
    sample = Sample(1, 0, -1, tuple(ImageSource(str(path), box) for box in STRIP_BOXES))
    for use in (read_triple, lambda sample: check_images([sample])):
        with pytest.raises(UserError, match=r"strip\.png.*767x128"):
            use(sample)


def noisy_jpeg(path, **options):
    noise = np.random.default_rng(0).integers(0, 256, (64, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **options)
    return path


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.98])
@pytest.mark.parametrize("options", [{"suffix": "jpg"}, {"suffix": "jpg", "progressive": True}, {"suffix": "png"}])
def test_truncated_file_is_named(tmp_path, kept, options):
    options = dict(options)
    path = noisy_jpeg(tmp_path / f"broken.{options.pop('suffix')}", **options)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(UserError, match=r"broken\.\w+: cannot be decoded"):
        read_image(str(path))
    with pytest.raises(UserError, match=r"1 of 1 image files[^$]*broken"):
        check_images([triple(path, path, path)])


def test_check_lists_every_bad_file_once(tmp_path):
    good = noisy_jpeg(tmp_path / "good.jpg")
    text = tmp_path / "text.jpg"
    text.write_text("not an image")
    gone = tmp_path / "gone.jpg"
    with pytest.raises(UserError) as error:
        check_images([triple(good, text, gone), triple(good, good, text)], workers=2)
    message = str(error.value)
    assert "2 of 3 image files" in message
    assert message.count("text.jpg: cannot be decoded") == 1 and "gone.jpg: no such file" in message
    assert "good.jpg" not in message


def test_check_passes_good_files(tmp_path):
    check_images([triple(*[noisy_jpeg(tmp_path / f"{i}.jpg") for i in range(3)])], workers=2)
