"""Lists a data set of one modality, in the folders and file names of Market-1501, as a CSV for DATASETS.NAMES manifest.

FOLDER holds bounding_box_train, query and bounding_box_test with files such as 0002_c1s1_000451_03.jpg: identity,
camera from 1. Identity -1, which marks what shows nobody, is left out. DukeMTMC-reID and the like have the same form.
"""

import argparse
import logging
import re
import sys
from pathlib import Path

from data.datasets import IMAGE_SUFFIXES, JUNK_PID, NO_SCENE, ImageSource, Sample
from data.manifest import write_manifest
from utils.cli import run
from utils.errors import UserError
from utils.logging import setup_logging
from utils.modalities import MODALITIES

log = logging.getLogger("tools.make_manifest")

EXAMPLES = """examples:
  python -m tools.make_manifest datasets/Market-1501
  python train_net.py --config_file configs/RGBNT201/DeMo_SDTPS.yml DATASETS.NAMES manifest \\
      DATASETS.ROOT_DIR datasets/Market-1501 OUTPUT_DIR runs/market
  python -m tools.make_manifest datasets/SYSU-NI --modality NI --out lists/ni.csv
"""

FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
NAME = re.compile(r"(?P<pid>-?\d+)_c(?P<camera>\d+)")


def list_single(folder: Path, modality: str = "RGB") -> list[tuple[str, Sample]]:
    """(split, sample) of every image, sorted by name.

    Raises:
        UserError: a folder is missing or empty, or a file's name does not tell identity and camera.
    """
    rows = []
    for split, name in FOLDERS.items():
        files = sorted(p for p in (folder / name).glob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise UserError(f"{folder / name}: no image there; expected the folders {', '.join(FOLDERS.values())}.")
        for path in files:
            match = NAME.match(path.name)
            if match is None or int(match["camera"]) < 1:
                raise UserError(f"{path}: expected a name such as 0002_c1s1_000451_03.jpg, cameras counted from 1.")
            if int(match["pid"]) != JUNK_PID:
                images = tuple(ImageSource(str(path)) if m == modality else None for m in MODALITIES)
                rows.append((split, Sample(int(match["pid"]), int(match["camera"]) - 1, NO_SCENE, images)))
    return rows


def main(folder: Path, out: Path | None, modality: str) -> None:
    setup_logging()
    out = out or folder / "manifest.csv"
    rows = list_single(folder, modality)
    write_manifest(out, rows, root=folder)
    log.info("%s: %d rows; use it with DATASETS.NAMES manifest DATASETS.ROOT_DIR %s", out, len(rows), folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, help="the CSV to write; default FOLDER/manifest.csv")
    parser.add_argument("--modality", choices=MODALITIES, default="RGB", help="what the images are; default RGB")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    sys.exit(run(lambda: main(args.folder, args.out, args.modality), args.debug))
