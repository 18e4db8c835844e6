"""Writes sample data: multi-spectral pictures of people or vehicles, drawn by the computer, in a data set's layout."""

import argparse
import logging
import sys
from pathlib import Path

from data.synthetic import SETS, contact_sheet, generate
from utils.cli import run

EXAMPLES = """examples:
  python -m data.synthetic --out datasets/sample
  python -m data.synthetic --out datasets/sample --dataset MSVR310 --masks
  python -m data.synthetic --out datasets/sample_pretrain --preset full --seed 1
"""


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data.synthetic",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, help="folder that will hold the data set's own (DATASETS.ROOT_DIR of a config)"
    )
    parser.add_argument(
        "--dataset", choices=SETS, default="RGBNT201", help="people (RGBNT201) or vehicles, and whose layout"
    )
    parser.add_argument(
        "--preset", choices=("mini", "full"), default="mini", help="mini: two CPU cores; full: the published counts"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other subjects in other places")
    parser.add_argument("--workers", type=int, help="processes that draw; one a core unless given")
    parser.add_argument("--masks", action="store_true", help="also write where the subject is visible, to MASK folders")
    parser.add_argument("--overwrite", action="store_true", help="replace other sample data in the same place")
    parser.add_argument("--contact_sheet", type=Path, metavar="FILE", help="write a picture of some of them to FILE")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if args.out is None and args.contact_sheet is None:
        parser.error("nothing to do: give --out, --contact_sheet or both")
    return args


def main(args: argparse.Namespace) -> None:
    """Writes what the command line asks for."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.out is not None:
        generate(args.out, args.preset, args.seed, args.workers, args.masks, args.overwrite, args.dataset)
    if args.contact_sheet is not None:
        contact_sheet(args.preset, args.seed, dataset=args.dataset).save(args.contact_sheet, quality=82)


if __name__ == "__main__":
    arguments = parse_args()
    sys.exit(run(lambda: main(arguments), arguments.debug))
