"""RGBNT201, RGBNT100 and MSVR310 on disk: where each image lies, whom it shows, and by which camera.

A data set is a row of `LAYOUTS`: its folders, the pattern of its file names, and the function that finds the three
images of a triple in a folder. Everything is sorted by name, so the same files give the same lists on every machine.
"""

import logging
import os
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError
from utils.modalities import MODALITIES

from .faults import Faults

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
NO_SCENE = -1
JUNK_PID = -1
MAX_CAMERA = 999
"""More cameras than any data set has; a larger number is a misread name, and would be a row of the camera embedding."""
MAX_PID = 10**9
"""More identities than any data set has; a larger number is a misread name, and may not fit into 64 bits."""
STRIP_SIZE = (768, 128)
"""Width and height of RGBNT100's strips in pixels."""
STRIP_BOXES = tuple((left, 0, left + 256, 128) for left in (0, 256, 512))
"""Where RGB, NI and TI lie in such a strip: left, upper, right, lower."""


@dataclass(frozen=True)
class ImageSource:
    """One modality's image: a file, or a box (left, upper, right, lower in pixels) of it."""

    path: str
    box: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class Sample:
    """One triple: the identity as the file name gives it, the camera from 0, the scene, the images as in MODALITIES.

    None stands for an image that is missing; at least one is there.
    """

    pid: int
    camid: int
    sceneid: int
    images: tuple[ImageSource | None, ...]

    @property
    def path(self) -> str:
        """The RGB image's file, or that of the first modality there is."""
        return self.sources[0].path

    @property
    def sources(self) -> tuple[ImageSource, ...]:
        """The images that are there."""
        return tuple(image for image in self.images if image is not None)

    @property
    def present(self) -> tuple[bool, ...]:
        """Which modalities are there, in the order of MODALITIES."""
        return tuple(image is not None for image in self.images)


@dataclass(frozen=True)
class DatasetSplits:
    """The lists of a data set, and what is left out of a query's ranking: same identity and same `protocol`."""

    name: str
    train: list[Sample]
    query: list[Sample]
    gallery: list[Sample]
    protocol: str

    @property
    def identities(self) -> tuple[int, ...]:
        """Original identity of each training label: label 0 is the smallest."""
        return tuple(sorted({sample.pid for sample in self.train}))

    @property
    def num_cameras(self) -> int:
        """Largest camera of any split + 1, so that every camid indexes an embedding of this many rows.

        On the three published sets this is the number of training cameras. Without a training folder it counts the
        test cameras only and may be smaller than what a model was trained with.
        """
        return 1 + max(sample.camid for split in (self.train, self.query, self.gallery) for sample in split)


Triple = tuple[ImageSource, ...]


def find_by_modality(folder: Path, faults: Faults, names: Sequence[str] = MODALITIES) -> list[Triple]:
    """One folder a modality; the three images of a triple share their name (RGBNT201)."""
    modality_folders = [folder / name for name in names]
    files = [_list_images(path, faults) for path in modality_folders]
    if not all(files):  # a missing or empty folder: already told
        return []
    first, *partners = files
    for path, partner in zip(modality_folders[1:], partners, strict=True):
        for stem in sorted(first.keys() - partner.keys()):
            faults.add(
                f"no partner of the same name in {path}",
                f"Unpack the data set again, or remove these from {modality_folders[0]} too.",
                first[stem].name,
            )
        for stem in sorted(partner.keys() - first.keys()):
            faults.add(
                f"no partner of the same name in {modality_folders[0]}",
                f"Unpack the data set again, or remove these from {path} too.",
                partner[stem].name,
            )
    complete = [stem for stem in first if all(stem in partner for partner in partners)]
    return [tuple(ImageSource(str(listed[stem])) for listed in files) for stem in complete]


def find_by_identity(folder: Path, faults: Faults) -> list[Triple]:
    """A folder an identity, with the modalities' folders vis, ni and th inside (MSVR310)."""
    people = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not people:
        _add_empty(faults, folder)
    return [triple for person in people for triple in find_by_modality(person, faults, names=("vis", "ni", "th"))]


def find_strips(folder: Path, faults: Faults) -> list[Triple]:
    """One file a triple, the modalities side by side (RGBNT100)."""
    return [tuple(ImageSource(str(path), box) for box in STRIP_BOXES) for path in _list_images(folder, faults).values()]


@dataclass(frozen=True)
class Layout:
    """How a data set lies under DATASETS.ROOT_DIR.

    Args:
        home: its folder.
        train, query, gallery: the splits' folders inside `home`.
        find: lists the triples of such a folder.
        pattern: matched at the start of a file name; groups `pid`, `camera` and, with scenes, `scene`.
        example: a file name that matches.
        first_camera: the number of the first camera in file names.
        protocol: "camera" or "scene".
        published: identities, triples and cameras of train, query and gallery as published.
    """

    home: str
    train: str
    query: str
    gallery: str
    find: Callable[[Path, Faults], list[Triple]]
    pattern: re.Pattern
    example: str
    first_camera: int
    protocol: str
    published: tuple[tuple[int, int, int], ...]


LAYOUTS = {
    "RGBNT201": Layout(
        home="RGBNT201",
        train="train_171",
        query="test",
        gallery="test",
        find=find_by_modality,
        pattern=re.compile(r"(?P<pid>\d{6})_cam(?P<camera>\d+)"),
        example="000030_cam1_1_12.jpg",
        first_camera=1,
        protocol="camera",
        published=((171, 3951, 4), (30, 836, 2), (30, 836, 2)),
    ),
    "RGBNT100": Layout(
        home="RGBNT100/rgbir",
        train="bounding_box_train",
        query="query",
        gallery="bounding_box_test",
        find=find_strips,
        pattern=re.compile(r"(?P<pid>-?\d+)_c(?P<camera>\d+)"),
        example="0502_c0001_000.jpg",
        first_camera=1,
        protocol="camera",
        published=((50, 8675, 8), (50, 1715, 8), (50, 8575, 8)),
    ),
    "MSVR310": Layout(
        home="MSVR310",
        train="bounding_box_train",
        query="query3",
        gallery="bounding_box_test",
        find=find_by_identity,
        pattern=re.compile(r"(?P<pid>\d{4})_s(?P<scene>\d{3})_v(?P<camera>\d)"),
        example="0038_s014_v7_003.jpg",
        first_camera=0,
        protocol="scene",
        published=((155, 1032, 8), (52, 591, 8), (155, 1055, 8)),
    ),
}


def load_dataset(name: str, root_dir: str | Path, train: bool = True, home: Path | None = None) -> DatasetSplits:
    """Lists the triples of a data set.

    Args:
        name: a key of `LAYOUTS`.
        root_dir: the folder that holds the data set's own folder.
        train: False makes the training folder optional: `splits.train` is empty when it is not there.
        home: the data set's own folder, where it has another name than the layout's.

    Raises:
        UserError: the data set is not there, or what is wrong with its files, all faults in one message.
    """
    if name not in LAYOUTS:
        raise UserError(f"DATASETS.NAMES: unknown data set {name!r}; known are {', '.join(LAYOUTS)}, manifest.")
    layout = LAYOUTS[name]
    root = Path(root_dir).expanduser()
    home = home or root / layout.home
    if not os.path.isdir(home):  # also for a name that no file can have
        raise UserError(_not_found(name, layout, root))

    faults = Faults()
    folders = [layout.train, layout.query, layout.gallery]
    if not train and not (home / layout.train).is_dir():
        folders.remove(layout.train)
    try:
        samples = {folder: _read_split(layout, home / folder, faults) for folder in dict.fromkeys(folders)}
    except PermissionError as error:
        raise UserError(f"{error.filename}: may not be read: {error}. Check the rights of the folder.") from error
    findable = {sample.pid for sample in samples[layout.gallery]}
    for sample in samples[layout.query]:
        if findable and sample.pid not in findable:
            faults.add(
                f"queries whose identity the gallery {layout.gallery} lacks",
                "No answer to them can be right: unpack the data set again, or move these away.",
                sample.path,
            )
    faults.raise_if_any(f"{name} in {home} cannot be used as it is:")

    splits = DatasetSplits(
        name,
        train=samples.get(layout.train, []),
        query=samples[layout.query],
        gallery=samples[layout.gallery],
        protocol=layout.protocol,
    )
    if train and len(splits.identities) < 2:
        raise UserError(f"{home / layout.train} shows one identity only; training needs at least two.")
    _log_counts(splits, layout)
    return splits


def _read_split(layout: Layout, folder: Path, faults: Faults) -> list[Sample]:
    if not folder.is_dir():
        _add_missing(faults, folder)
        return []
    samples = []
    for images in layout.find(folder, faults):
        path = Path(images[0].path)
        match = layout.pattern.match(path.name)
        if match is None or int(match["camera"]) < layout.first_camera:
            faults.add(
                "file names that do not parse",
                f"Expected names like {layout.example}, cameras counted from {layout.first_camera}; "
                "rename the files or move them away.",
                path,
            )
        elif int(match["camera"]) > MAX_CAMERA:
            faults.add(f"cameras above {MAX_CAMERA}", "Number the cameras from the lowest on.", path)
        elif abs(int(match["pid"])) > MAX_PID:
            faults.add(f"identities above {MAX_PID}", "Number the identities from the lowest on.", path)
        elif int(match["pid"]) != JUNK_PID:
            camid = int(match["camera"]) - layout.first_camera
            sceneid = int(match.groupdict().get("scene", NO_SCENE))
            samples.append(Sample(int(match["pid"]), camid, sceneid, images))
    if not samples:
        faults.add("no usable image", f"Expected names like {layout.example}.", folder)
    return samples


def _list_images(folder: Path, faults: Faults) -> dict[str, Path]:
    """Name without suffix -> image file, sorted by name; hidden files and other files are passed over."""
    if not folder.is_dir():
        _add_missing(faults, folder)
        return {}
    files = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        if path.stem in files:
            faults.add("files that share a name up to the suffix", "Keep one of them.", path)
        files[path.stem] = path
    if not files:
        _add_empty(faults, folder)
    return files


def _add_missing(faults: Faults, folder: Path) -> None:
    faults.add("folders that are missing", "Unpack the data set again, keeping its folder names.", folder)


def _add_empty(faults: Faults, folder: Path) -> None:
    faults.add(f"folders without an image ({', '.join(IMAGE_SUFFIXES)})", "Unpack the data set again.", folder)


def _not_found(name: str, layout: Layout, root: Path) -> str:
    download = "https://github.com/924973292/TOP-ReID#datasets"
    sample = f"python -m data.synthetic --out {shlex.quote(str(root))}"
    if name != "RGBNT201":
        sample += f" --dataset {name}"
    return "\n".join(
        [
            f"{name} was not found: there is no folder {root / layout.home}.",
            f"  Download {name} (its authors' links: {download}) and unpack it to {root / layout.home},",
            f"  or set DATASETS.ROOT_DIR, {str(root)!r} now, to the folder that holds {Path(layout.home).parts[0]},",
            f"  or write sample data in its layout: {sample} --preset mini (or --preset full, as many as published)",
        ]
    )


def _log_counts(splits: DatasetSplits, layout: Layout) -> None:
    for title, samples, published in zip(
        ("train", "query", "gallery"), (splits.train, splits.query, splits.gallery), layout.published, strict=True
    ):
        counts = count(samples)
        note = "" if counts == published else " (the published set: {} identities, {} triples, {} cameras)"
        logger.info(
            "%s %s: %d identities, %d triples, %d cameras%s", splits.name, title, *counts, note.format(*published)
        )


def count(samples: Iterable[Sample]) -> tuple[int, int, int]:
    """Identities, triples and cameras in a list."""
    samples = list(samples)
    return len({sample.pid for sample in samples}), len(samples), len({sample.camid for sample in samples})
