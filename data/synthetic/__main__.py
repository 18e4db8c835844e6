"""Writes sample data: multi-spectral pictures of people, drawn by the computer, in RGBNT201's layout."""

import argparse
import logging
import sys
from pathlib import Path

from data.synthetic import PRESETS, contact_sheet, generate
from data.synthetic.writer import DATASET
from utils.errors import UserError


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m data.synthetic", description=__doc__)
    parser.add_argument("--out", type=Path, help=f"folder that will hold {DATASET}/ (DATASETS.ROOT_DIR of a config)")
    parser.add_argument(
        "--preset", choices=PRESETS, default="mini", help="mini: two CPU cores; full: RGBNT201's own counts"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other people in other streets")
    parser.add_argument("--workers", type=int, help="processes that draw; one a core unless given")
    parser.add_argument("--masks", action="store_true", help="also write where the person is visible, to <split>/MASK")
    parser.add_argument("--overwrite", action="store_true", help="replace other sample data in the same place")
    parser.add_argument("--contact_sheet", type=Path, metavar="FILE", help="write a picture of some people to FILE")
    args = parser.parse_args()
    if args.out is None and args.contact_sheet is None:
        parser.error("nothing to do: give --out, --contact_sheet or both")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if args.out is not None:
            generate(args.out, args.preset, args.seed, args.workers, args.masks, args.overwrite)
        if args.contact_sheet is not None:
            contact_sheet(args.preset, args.seed).save(args.contact_sheet, quality=82)
    except UserError as error:
        logging.error("%s", error)
        sys.exit(2)


if __name__ == "__main__":
    main()
