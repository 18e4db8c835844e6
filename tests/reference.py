"""How the reference numbers in tests/data/reference were made: weights from their names, images from a seed.

The numbers are what the published DeMo code (AAAI 2025) and the SDTPS module of its fork compute on them.
"""

import functools
import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.modalities import MODALITIES

REFERENCE = Path(__file__).parent / "data" / "reference"


@functools.cache
def reference_weight(key: str, shape: tuple[int, ...]) -> Tensor:
    """The value of the parameter or buffer that the published checkpoint names `key`."""
    if key.endswith("num_batches_tracked"):
        return torch.ones(shape, dtype=torch.long)
    x = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
    if key.endswith("running_var"):
        x = 0.5 + np.abs(x)
    elif len(shape) == 1 and key.endswith("weight"):
        x = 1 + 0.1 * x
    elif len(shape) <= 1 or key.endswith(("bias", "running_mean")):
        x = 0.1 * x
    else:
        x = x / math.sqrt(shape[-1])
    return torch.as_tensor(x, dtype=torch.float32)


def reference_state(name: str) -> dict[str, Tensor]:
    """A whole checkpoint in the published names, from `<name>.keys.json`."""
    shapes = json.loads((REFERENCE / f"{name}.keys.json").read_text())
    return {key: reference_weight(key, tuple(shape)) for key, shape in shapes.items()}


def reference_images(seed: int, size: tuple[int, int]) -> dict[str, Tensor]:
    """Three triples of normalised images (3, 3, H, W) per modality."""
    rng = np.random.default_rng(seed)
    return {m: torch.as_tensor(rng.standard_normal((3, 3, *size)), dtype=torch.float32) for m in MODALITIES}


def relative_error(ours: Tensor, reference: np.ndarray) -> float:
    """Norm of the difference over the norm of the reference."""
    expected = torch.as_tensor(reference)
    return float((ours - expected).norm() / expected.norm())
