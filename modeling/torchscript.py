"""The tensors of a TorchScript archive, such as OpenAI's CLIP files, read without running the program in it.

`torch.jit.load` runs what the archive's classes define for their own loading, and such a program may write files. Here
the classes are plain holders of what was stored, and nothing else that the pickle names is called.
"""

import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError

STORAGES = {
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
}


def is_torchscript(path: str | Path) -> bool:
    """Whether a file is an archive with a program."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # damaged in any way; whoever reads it then tells how
        return False


def read_torchscript(path: str | Path) -> dict[str, Tensor]:
    """Parameters and buffers by their dotted names, on the CPU.

    Raises:
        UserError: the archive is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("/data.pkl")
            with archive.open(f"{root}/data.pkl") as file:
                module = _Reader(file, archive, root).load()
        return dict(_tensors(module))
    except Exception as error:  # whatever half an archive makes zipfile and pickle raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: damaged TorchScript archive ({reason}). Fetch or copy the file again.") from error


class _Holder:
    """Stands for any class or function that the pickle names: keeps the state that it is given, and does nothing."""

    def __init__(self, *args: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    def __init__(self, file: Any, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file)
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        return STORAGES.get(name, _Holder) if module == "torch" else _Holder

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, size = pid
        content = bytearray(self.archive.read(f"{self.root}/data/{key}"))
        return torch.frombuffer(content, dtype=dtype, count=size) if size else torch.empty(0, dtype=dtype)

    @staticmethod
    def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
        return storage.as_strided(size, stride, offset)


def _tensors(part: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(part, Tensor):
        yield prefix, part
    elif isinstance(part, _Holder) and isinstance(part.state, dict):
        for name, value in part.state.items():
            yield from _tensors(value, f"{prefix}.{name}" if prefix else str(name))
