"""Decoding image files, and the check that every file of a data set can be decoded."""

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.errors import UserError

from .datasets import STRIP_SIZE, ImageSource, Sample
from .faults import listing

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_PIXELS = 2**26
"""Of one image: a file of some kB may hold thousands of times more, and would take the memory of the machine."""
DEEP_GREY_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def read_image(path: str) -> Image.Image:
    """Decodes a file to 8-bit RGB, whatever its colour mode; 16-bit grey maps 0..65535 to 0..255.

    Raises:
        UserError: the file is missing, truncated, gigantic or no image; the message names it.
    """
    return _decode(path, _to_rgb)


def read_triple(sample: Sample) -> list[Image.Image]:
    """The sample's images in the order of MODALITIES; a file that holds several is decoded once.

    A black image of the first one's size stands for one that is missing.

    Raises:
        UserError: a file cannot be decoded or is smaller than its boxes; the message names it.
    """
    decoded = {path: read_image(path) for path in dict.fromkeys(source.path for source in sample.sources)}
    cropped = {source: _crop(decoded[source.path], source) for source in sample.sources}
    black = Image.new("RGB", cropped[sample.sources[0]].size)
    return [black if source is None else cropped[source] for source in sample.images]


def check_images(samples: Iterable[Sample], workers: int = 1) -> None:
    """Decodes every file once, JPEGs at an eighth of their size: all of the data is read, few pixels are made.

    Raises:
        UserError: lists the files that cannot be decoded and why.
    """
    start = time.perf_counter()
    sources: dict[str, list[ImageSource]] = {}
    for source in dict.fromkeys(source for sample in samples for source in sample.sources):
        sources.setdefault(source.path, []).append(source)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        found = pool.map(_find_fault, sources.values())
        bar = tqdm(found, desc="checking images", total=len(sources), delay=2, leave=False, disable=None)
        faults = [fault for fault in bar if fault]
    if faults:
        raise UserError(
            f"{len(faults)} of {len(sources)} image files cannot be used:\n  "
            + listing(faults, limit=10, separator="\n  ")
            + "\nCopy them again, or remove the triples they belong to from every modality."
        )
    logger.info("%d image files decode without fault (%.1f s)", len(sources), time.perf_counter() - start)


def _find_fault(sources: list[ImageSource]) -> str | None:
    try:
        _decode(sources[0].path, partial(_probe, sources=sources))
    except UserError as error:
        return str(error)
    return None


def _decode(path: str, use: Callable[[Image.Image], Result]) -> Result:
    """`use(image)` on an opened file; whatever Pillow says against the file becomes a UserError that names it."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _gigantic(path)
            return use(image)
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise _gigantic(path) from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except Exception as error:  # broken files raise OSError, SyntaxError, ValueError, struct.error, ... in Pillow
        raise UserError(f"{path}: cannot be decoded as an image: {error}") from error


def _gigantic(path: str) -> UserError:
    return UserError(f"{path}: refused, it has more than {MAX_PIXELS >> 20} megapixels. Scale it down.")


def _probe(image: Image.Image, sources: list[ImageSource]) -> None:
    for source in sources:
        _check_box(image, source)
    image.draft("L", (1, 1))
    image.load()


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode == "RGB":
        return image
    if image.mode in DEEP_GREY_MODES:
        grey = np.asarray(image).clip(0, 65535).astype(np.float32) / 257
        image = Image.fromarray(grey.round().astype(np.uint8))
    image.info.pop("transparency", None)  # the alpha channel plays no part
    return image.convert("RGB")


def _crop(image: Image.Image, source: ImageSource) -> Image.Image:
    _check_box(image, source)
    return image.crop(source.box) if source.box else image


def _check_box(image: Image.Image, source: ImageSource) -> None:
    if source.box and image.size != STRIP_SIZE:
        raise UserError(
            f"{source.path}: {image.width}x{image.height} pixels; expected a strip of {STRIP_SIZE[0]}x{STRIP_SIZE[1]}, "
            "the three modalities side by side."
        )
