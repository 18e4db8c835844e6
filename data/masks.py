"""Where the subject is: masks that may lie beside the images of a data set, as patches.

A mask is a PNG of the images' name in a folder MASK beside them, or beside the folder of the RGB images: what is not
black is the person (or vehicle). `python -m data.synthetic --masks` writes them; the published data sets have none.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from utils.errors import UserError

from .images import read_image

logger = logging.getLogger(__name__)

FOLDER = "MASK"
PERSON_SHARE = 0.5
"""A patch counts as person where this share of its pixels does, or more."""


def mask_path(image: str | Path) -> Path | None:
    """The mask of an RGB image or a strip, None if there is none."""
    image = Path(image)
    places = (folder / FOLDER / f"{image.stem}.png" for folder in (image.parent, image.parent.parent))
    return next((place for place in places if place.is_file()), None)


def person_patches(
    paths: Sequence[str], size: tuple[int, int], patch: tuple[int, int], stride: tuple[int, int]
) -> Tensor | None:
    """Which patches of each image show the person; read once for the same arguments.

    Args:
        paths: of the RGB images.
        size: (height, width) to which images are resized, in pixels.
        patch, stride: (vertical, horizontal) size of a patch and step between patches, in pixels of that size.

    Returns:
        (len(paths), N) bool, patches row by row; None unless every image has a mask that can be read.
    """
    return _person_patches(tuple(paths), tuple(size), tuple(patch), tuple(stride))


@lru_cache(maxsize=2)
def _person_patches(
    paths: tuple[str, ...], size: tuple[int, int], patch: tuple[int, int], stride: tuple[int, int]
) -> Tensor | None:
    files: list[Path] = []
    for path in paths:
        file = mask_path(path)
        if file is None:
            if files:
                logger.warning("%s has no mask, %d images before it do: masks are not used", path, len(files))
            return None
        files.append(file)

    def patches(file: Path) -> Tensor:
        mask = read_image(str(file)).convert("L").resize((size[1], size[0]), Image.Resampling.NEAREST)
        person = (v2.functional.pil_to_tensor(mask) > 0).float()
        return F.avg_pool2d(person, patch, stride).flatten() >= PERSON_SHARE

    try:
        with ThreadPoolExecutor() as pool:
            return torch.stack(list(pool.map(patches, files)))
    except UserError as error:
        logger.warning("masks are not used: %s", error)
        return None
