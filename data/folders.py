"""Data as a path on the command line: which layout a folder has, and its samples."""

from pathlib import Path

from utils.errors import UserError
from utils.modalities import MODALITIES

from .datasets import IMAGE_SUFFIXES, LAYOUTS, NO_SCENE, DatasetSplits, ImageSource, Sample, load_dataset
from .manifest import load_manifest

UNKNOWN = -1
"""Identity and camera of images of which nothing is known."""


def recognise(folder: Path) -> tuple[str, Path] | None:
    """The name and the own folder of the published layout that a folder has, or holds as its first; None for neither.

    RGBNT201 is told by `test/RGB`, MSVR310 by `query3`, RGBNT100 by `query` and `bounding_box_test`.
    """
    for name, layout in LAYOUTS.items():
        for home in (folder / layout.home, folder.joinpath(*Path(layout.home).parts[1:]), folder):
            inside = (layout.query, layout.gallery) if name != "RGBNT201" else (f"{layout.query}/{MODALITIES[0]}",)
            if all((home / part).is_dir() for part in inside):
                return name, home
    return None


def load_folder(path: Path, train: bool = False) -> DatasetSplits:
    """Samples of a folder in a published layout (or the folder above it), of a manifest (.csv), or of loose images.

    Loose images lie in folders RGB, NI and TI, or in some of these; files of the same name make a sample. They are
    query and gallery at once, of identity and camera -1.

    Args:
        train: False leaves the training samples out.

    Raises:
        UserError: there is nothing of the kind, or what `load_dataset` and `load_manifest` raise.
    """
    if path.suffix.lower() == ".csv":
        return load_manifest(path, path.parent, train)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder.")
    if (path / "manifest.csv").is_file():
        return load_manifest(path / "manifest.csv", path, train)
    if found := recognise(path):
        name, home = found
        return load_dataset(name, path, train, home)
    if loose := find_loose(path):
        return DatasetSplits(path.name, train=[], query=loose, gallery=loose, protocol="camera")
    raise UserError(
        f"{path}: no layout that is known; expected that of {', '.join(LAYOUTS)}, a manifest.csv, or images in the "
        f"folders {', '.join(MODALITIES)}. python -m tools.check_data lists the layouts."
    )


def find_loose(folder: Path) -> list[Sample]:
    """The images in a folder's RGB, NI and TI, one sample a name, sorted."""
    listed = [
        {p.stem: p for p in sorted((folder / m).glob("*")) if p.suffix.lower() in IMAGE_SUFFIXES} for m in MODALITIES
    ]
    samples = []
    for stem in sorted(set().union(*listed)):
        images = tuple(ImageSource(str(files[stem])) if stem in files else None for files in listed)
        samples.append(Sample(UNKNOWN, UNKNOWN, NO_SCENE, images))
    return samples
