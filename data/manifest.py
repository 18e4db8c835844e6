"""Your own data set, listed in a CSV: one row a sample, one column a modality, empty where an image is missing.

    split,pid,camid,sceneid,RGB,NI,TI
    train,7,0,,rgb/7_a.jpg,ni/7_a.jpg,ti/7_a.jpg
    query,12,1,,rgb/12_b.jpg,,ti/12_b.jpg

The split is train, query, gallery, or test for both query and gallery. Identities and cameras are whole numbers from 0.
Where query and gallery name a scene, a query's ranking leaves out its own scene, else its own camera.
"""

import csv
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from utils.errors import UserError
from utils.modalities import MODALITIES

from .datasets import MAX_CAMERA, NO_SCENE, DatasetSplits, ImageSource, Sample, count
from .faults import Faults

logger = logging.getLogger(__name__)

COLUMNS = ("split", "pid", "camid", "sceneid", *MODALITIES)
SPLITS = {"train": ("train",), "query": ("query",), "gallery": ("gallery",), "test": ("query", "gallery")}
"""What a row's split is called -> the lists that it goes into."""


def load_manifest(path: Path, root: Path, train: bool = True) -> DatasetSplits:
    """Reads the CSV.

    Args:
        path: of the CSV.
        root: folder in which images are sought that do not lie relative to the CSV's own folder.
        train: False leaves the training rows out; they need not be there.

    Raises:
        UserError: the file cannot be read, or all of its faults with their lines, in one message.
    """
    faults = Faults()
    lists: dict[str, list[Sample]] = {"train": [], "query": [], "gallery": []}
    first: dict[tuple[str, Sample], int] = {}
    named: set[str] = set()
    for line, cells in _rows(path, faults):
        sample = _sample(cells, line, (path.parent, root), faults)
        places = SPLITS.get(cells["split"].strip().lower(), ())
        if not places:
            faults.add(
                f"no such split, expected {', '.join(SPLITS)}", "Correct the column split.", _at(line, cells["split"])
            )
        named.update(places)
        if sample is None:
            continue
        for place in places:
            before = first.setdefault((place, sample), line)
            if before != line:
                faults.add("rows that come twice", "Keep one of them.", f"line {line} as line {before}")
            lists[place].append(sample)
    needed = [name for name in lists if train or name != "train"]
    for name in needed:
        if name not in named:
            faults.add("splits without a row", "Query and gallery are needed, to train also train.", name)
    scenes = {sample.sceneid == NO_SCENE for name in ("query", "gallery") for sample in lists[name]}
    if len(scenes) > 1:
        faults.add(
            "query and gallery rows of which some name a scene and some do not",
            "Fill the column sceneid in all of them, or in none.",
            "sceneid",
        )
    faults.raise_if_any(f"{path} cannot be used as it is:")

    if not train:
        lists["train"] = []
    splits = DatasetSplits(path.stem, **lists, protocol="camera" if scenes == {True} else "scene")
    if train and len(splits.identities) < 2:
        raise UserError(f"{path}: the training rows show one identity only; training needs at least two.")
    for name in needed:
        lacking = sum(not all(sample.present) for sample in lists[name])
        note = f", {lacking} of them lack a modality" if lacking else ""
        logger.info("%s %s: %d identities, %d samples, %d cameras%s", path.name, name, *count(lists[name]), note)
    return splits


def write_manifest(path: Path, rows: Sequence[tuple[str, Sample]], root: Path) -> None:
    """Writes (split, sample) as a CSV whose paths are relative to `root`.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for split, sample in rows:
                images = ["" if i is None else Path(os.path.relpath(i.path, root)).as_posix() for i in sample.images]
                scene = "" if sample.sceneid == NO_SCENE else sample.sceneid
                writer.writerow([split, sample.pid, sample.camid, scene, *images])
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}.") from error


def _rows(path: Path, faults: Faults) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells of every row, empty lines passed over."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # with the mark that spreadsheets put first
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            if sorted(header) != sorted(COLUMNS):
                raise UserError(
                    f"{path}: the first line is {','.join(header)!r}; expected the columns {','.join(COLUMNS)}, in any "
                    "order, separated by commas."
                )
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) == len(COLUMNS):
                    yield reader.line_num, dict(zip(header, cells, strict=True))
                else:
                    faults.add(
                        f"rows that have not {len(COLUMNS)} cells",
                        "Quote cells that contain a comma; leave missing ones empty, with their commas.",
                        f"line {reader.line_num}: {len(cells)}",
                    )
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file. DATASETS.MANIFEST names the CSV of DATASETS.NAMES manifest; its first line is "
            f"{','.join(COLUMNS)}."
        ) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a CSV in UTF-8: {error}") from error


def _sample(cells: dict[str, str], line: int, folders: Sequence[Path], faults: Faults) -> Sample | None:
    """The row as a sample, None where it cannot be read; what is wrong goes into `faults`."""
    pid = _number(cells, "pid", line, faults)
    camid = _number(cells, "camid", line, faults, largest=MAX_CAMERA)
    sceneid = _number(cells, "sceneid", line, faults) if cells["sceneid"].strip() else NO_SCENE
    images = [_image(cells[name].strip(), line, folders, faults) for name in MODALITIES]
    if not any(cells[name].strip() for name in MODALITIES):
        faults.add("rows without an image", "Name at least one, or remove the row.", f"line {line}")
        return None
    whole = all(image is not None for name, image in zip(MODALITIES, images, strict=True) if cells[name].strip())
    if pid is None or camid is None or sceneid is None or not whole:
        return None
    return Sample(pid, camid, sceneid, tuple(images))


def _number(cells: dict[str, str], column: str, line: int, faults: Faults, largest: int | None = None) -> int | None:
    text = cells[column].strip()
    if text.isdecimal() and (largest is None or int(text) <= largest):
        return int(text)
    expected = f"whole numbers from 0{'' if largest is None else f' to {largest}'}"
    faults.add(f"{column}: not {expected}", f"Number them, {expected}.", _at(line, text))
    return None


def _image(text: str, line: int, folders: Sequence[Path], faults: Faults) -> ImageSource | None:
    if not text:
        return None
    inner = os.path.normpath(text)
    if os.path.isabs(text) or inner.split(os.sep)[0] == os.pardir:
        faults.add(
            "paths that lead out of the data set's folder",
            f"Write them relative to {folders[0]} or DATASETS.ROOT_DIR, without going up.",
            _at(line, text),
        )
        return None
    for folder in folders:
        if (folder / inner).is_file():
            return ImageSource(str(folder / inner))
    faults.add(
        "images that are not there",
        f"They are sought in {' and '.join(dict.fromkeys(map(str, folders)))}.",
        _at(line, text),
    )
    return None


def _at(line: int, text: str) -> str:
    return f"line {line} {text!r}"
