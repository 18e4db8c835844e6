"""Features of images with what is known of each, as one .safetensors or .npz file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.errors import UserError

SUFFIXES = (".safetensors", ".npz")
ARRAYS = ("features", "pids", "camids", "sceneids")


@dataclass
class FeatureFile:
    """N samples.

    Attributes:
        features: (N, D) float32 or float16; of a .safetensors file a view of the file, read where it is used.
        pids, camids, sceneids: (N,) int64, -1 where not known.
        paths: N lists of one path a modality in the order of MODALITIES, "" where there is none; relative to `root`.
            The same path in all of them is a strip that holds the three side by side.
        info: `root`, `run`, `branch`, `normalised` ("True", "False") and the like, as texts.
    """

    features: Tensor
    pids: Tensor
    camids: Tensor
    sceneids: Tensor
    paths: list[list[str]]
    info: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes the file.

        Raises:
            UserError: the suffix is none of `SUFFIXES`, or the file cannot be written.
        """
        ids = {name: getattr(self, name).clone() for name in ARRAYS[1:]}  # the format refuses tensors that share memory
        arrays = {"features": self.features.contiguous().cpu(), **ids}
        check_suffix(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".npz":
                info, paths = np.array(json.dumps(self.info)), np.array(self.paths, dtype=np.str_)
                np.savez(path, info=info, paths=paths, **{name: array.numpy() for name, array in arrays.items()})
            else:
                save_file(arrays, path, metadata={**self.info, "paths": json.dumps(self.paths)})
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be written: {error}.") from error

    @classmethod
    def load(cls, path: Path) -> "FeatureFile":
        """Reads the file; the features of a .safetensors stay on the disk until they are used.

        Raises:
            UserError: it is missing, damaged, or no such file.
        """
        check_suffix(path)
        try:
            if path.suffix == ".npz":
                with np.load(path) as file:
                    arrays = {name: torch.from_numpy(file[name]) for name in ARRAYS}
                    return cls(paths=file["paths"].tolist(), info=json.loads(str(file["info"])), **arrays)
            with safe_open(path, framework="pt") as file:
                info = file.metadata() or {}
                paths = json.loads(info.pop("paths"))
                return cls(paths=paths, info=info, **{name: file.get_tensor(name) for name in ARRAYS})
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; python -m tools.extract writes one.") from None
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{path}: no file that tools.extract wrote, or damaged: {error}") from error

    def files(self, index: int) -> Sequence[Path | None]:
        """Where the images of one sample lie."""
        root = Path(self.info.get("root", "."))
        return [root / path if path else None for path in self.paths[index]]


def check_suffix(path: Path) -> None:
    """Raises a UserError unless the name ends in one of `SUFFIXES`."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: the name must end in {' or '.join(SUFFIXES)}.")
