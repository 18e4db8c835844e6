"""Ways to spoil the folder of a small run, which holds tiny.yml, data/ and run/last.pth."""

import os
import pickle
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file as save_safetensors

from utils.modalities import MODALITIES

Spoil = Callable[[Path], object]
"""Changes the folder of a case."""

SET = "data/RGBNT201"
ONE = f"{SET}/train_171/NI/000001_cam1_1_00.jpg"
"""An image of training."""
ANY = f"{SET}/test/RGB/000500_cam1_1_00.jpg"
"""An image of the test, which every run reads."""


class Attack:
    """Unpickling it runs a program, which leaves a file."""

    def __init__(self, victim: Path) -> None:
        self.command = f"touch {victim}"

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


class WritingModule(torch.nn.Module):
    """As a TorchScript archive, its loading writes a file into the working directory."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(2))

    def forward(self, x):
        return x

    @torch.jit.export
    def __getstate__(self):
        return self.w, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        self.w = state[0]
        self.training = state[1]
        torch.save(state[0], "victim")


def each(*spoils: Spoil) -> Spoil:
    return lambda here: [spoil(here) for spoil in spoils]


def remove(*patterns: str) -> Spoil:
    """Removes files and folders."""

    def spoil(here: Path) -> None:
        for path in [path for pattern in patterns for path in sorted(here.glob(pattern))]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def empty(folder: str) -> Spoil:
    return each(remove(f"{folder}/*"), lambda here: (here / folder).mkdir(exist_ok=True))


def put(name: str, content: str | bytes) -> Spoil:
    """Writes a file in place of what was there; the old one may be a link to what others share."""

    def spoil(here: Path) -> None:
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def cut(name: str, share: float) -> Spoil:
    """Keeps the first part of a file."""
    return lambda here: put(name, (content := (here / name).read_bytes())[: int(len(content) * share)])(here)


def rename(pattern: str, new: Callable[[Path], str]) -> Spoil:
    return lambda here: [path.rename(path.with_name(new(path))) for path in sorted(here.glob(pattern))]


def png(width: int, height: int, rows: int | None = None) -> bytes:
    """A PNG of one colour, 20000 x 20000 pixels are 50 kB; or one that claims to have more rows than it has."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    packer = zlib.compressobj()
    rows = height if rows is None else rows
    pixels = b"".join(packer.compress(bytes(1 + width // 8)) for _ in range(rows)) + packer.flush()
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def picture(name: str, mode: str, colour: object = 0, **options: object) -> Spoil:
    """An image of another colour mode in place of the file of that stem."""

    def spoil(here: Path) -> None:
        for old in (here / name).parent.glob(f"{Path(name).stem}.*"):
            old.unlink()
        Image.new(mode, (32, 64), colour).save(here / name, **options)

    return spoil


def deep_grey(name: str) -> Spoil:
    """16 bits a pixel."""

    def spoil(here: Path) -> None:
        (here / name).with_suffix(".jpg").unlink()
        Image.fromarray(np.linspace(0, 65535, 64 * 32).reshape(64, 32).astype(np.uint16)).save(here / name)

    return spoil


def only_identities(keep: str) -> Spoil:
    """Leaves one image in training for each identity whose name matches, all others go."""

    def spoil(here: Path) -> None:
        kept = {path.name for path in (here / SET / "train_171" / "RGB").glob(keep)}
        for path in (here / SET / "train_171").glob("*/*"):
            if path.name not in kept:
                path.unlink()

    return spoil


def strips(here: Path, *names: str, size: tuple[int, int] = (768, 128)) -> None:
    """RGBNT100: a file a triple, `<split>/<name>`."""
    for name in names:
        path = here / "data/RGBNT100/rgbir" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (90, 120, 60)).save(path)


def rgbnt100(*more: str, query: tuple[str, ...] = ("0009_c0002_001.jpg",), size: tuple[int, int] = (768, 128)) -> Spoil:
    """A small RGBNT100 of four vehicles for training and one to find."""
    train = [f"bounding_box_train/{pid:04}_c000{camera}_001.jpg" for pid in range(1, 5) for camera in (1, 2)]
    rest = [*(f"query/{name}" for name in query), "bounding_box_test/0009_c0001_001.jpg"]
    return lambda here: strips(here, *train, *rest, *more, size=size)


def msvr310(here: Path) -> None:
    """A small MSVR310 without the thermal images of one vehicle."""
    for split, pid in (("bounding_box_train", 1), ("bounding_box_train", 2), ("query3", 3), ("bounding_box_test", 3)):
        for modality in ("vis", "ni", "th"):
            folder = here / "data/MSVR310" / split / f"{pid:04}" / modality
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 64)).save(folder / f"{pid:04}_s001_v1_001.jpg")
    shutil.rmtree(here / "data/MSVR310/bounding_box_train/0002/th")


def checkpoint(name: str, change: Callable[[dict], object] = lambda state: None, **options: object) -> Spoil:
    """The checkpoint of the small run, changed, under another name (or its own)."""

    def spoil(here: Path) -> None:
        state = torch.load(here / "run/last.pth", weights_only=True)
        changed = change(state)
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        state = changed if isinstance(changed, (dict, list)) else state
        save_safetensors(state, path) if path.suffix == ".safetensors" else torch.save(state, path, **options)

    return spoil


def attack(name: str, kind: str) -> Spoil:
    """A file that would run a program when it is unpickled without care, in one of the forms that torch reads."""

    def spoil(here: Path) -> None:
        state = {"model": {"w": torch.ones(2)}, "optimizer": {}, "epoch": 1, "x": Attack(here / "victim")}
        path = here / name
        if kind in ("zip", "zip, protocol 4"):
            torch.save(state, path, pickle_protocol=2 if kind == "zip" else 4)
        elif kind == "legacy":
            torch.save(state, path, _use_new_zipfile_serialization=False)
        else:
            path.write_bytes(pickle.dumps(state["x"], protocol=int(kind.split()[-1])))

    return spoil


def backbone(state: dict) -> dict:
    """The tensors of the backbone alone, as files of pretrained weights hold them."""
    kept = {n.removeprefix("backbone."): t for n, t in state["model"].items() if n.startswith("backbone.")}
    return {name: tensor.contiguous() for name, tensor in kept.items() if name != "cam_embed"}


def with_nan(state: dict, name: str) -> dict:
    """Spoils one number of a tensor."""
    state[name] = state[name].clone()
    state[name].view(-1)[0] = float("nan")
    return state


def attacking_program(name: str) -> Spoil:
    """A TorchScript archive whose loading writes a file."""

    def spoil(here: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch asks for another format
            torch.jit.save(torch.jit.script(WritingModule()), here / name)

    return spoil


def loop(here: Path) -> None:
    """Modalities' folders that are links to themselves."""
    for modality in MODALITIES:
        path = here / SET / "test" / modality
        shutil.rmtree(path)
        path.symlink_to(path)
