"""Writes one HTML page about a run, or about two side by side: verdict, curves, rankings, patches, map, config.

python -m tools.report runs/sample/DeMo_SDTPS
python -m tools.report runs/sample/DeMo_SDTPS runs/sample/baseline --out comparison.html
python -m tools.report runs/RGBNT201/DeMo_SDTPS --options DATASETS.ROOT_DIR /data MODEL.DEVICE cpu

The page needs no other file and no network. It tells what the logs give and, where the checkpoint and the test images
are at hand, what the checkpoint does with them; what is missing is said on the page.
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tools.report.evaluation import Evaluation, evaluate_run
from tools.report.page import write_page
from tools.report.run import Run, read_run
from utils.cli import run
from utils.errors import UserError
from utils.files import save_text
from utils.logging import setup_logging

log = logging.getLogger("tools.report")


def parse_args(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="OUTPUT_DIR of a run; two are compared")
    parser.add_argument("--out", type=Path, metavar="FILE", help="page to write; RUN_DIR/report.html unless given")
    parser.add_argument("--weight", type=Path, metavar="FILE", help="checkpoint in place of the run's best")
    parser.add_argument("--logs-only", action="store_true", help="do not evaluate the checkpoint")
    parser.add_argument(
        "--options", nargs="+", metavar="KEY VALUE", default=[], help="over the run's config.yml, here alone"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(words)
    if len(args.runs) > 2:
        parser.error(f"{len(args.runs)} runs: give one, or two to compare")
    if args.weight and len(args.runs) == 2:
        parser.error("--weight: for a report about one run")
    return args


def main(args: argparse.Namespace) -> None:
    setup_logging()
    start = time.perf_counter()
    runs = [read_run(folder, label, args.options) for folder, label in zip(args.runs, _labels(args.runs), strict=True)]
    evaluations = [None if args.logs_only else _try_to_evaluate(of_run, args.weight) for of_run in runs]
    name = "report.html" if len(runs) == 1 else f"report_with_{args.runs[1].resolve().name}.html"
    out = args.out or args.runs[0] / name
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out.parent}: cannot be made: {error}. Name another file with --out.") from error
    save_text(write_page(runs, evaluations), out)
    for of_run in runs:
        for problem in of_run.missing:
            log.warning("left out: %s", problem)
    log.info("wrote %s: %.1f MB in %.0f s", out, out.stat().st_size / 1e6, time.perf_counter() - start)


def _labels(folders: Sequence[Path]) -> list[str]:
    """Short names where they differ, else the whole paths."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _try_to_evaluate(run: Run, weight: Path | None) -> Evaluation | None:
    """The evaluation, or None, with the reason in `run.missing`."""
    what = "Rankings, patches, distances and map"
    checkpoint = weight or run.checkpoint()
    if run.cfg is None:
        run.missing.append(f"{what}: without its config, the model cannot be built.")
    elif checkpoint is None:
        run.missing.append(f"{what}: {run.folder} holds no checkpoint. Name one with --weight.")
    else:
        try:
            return evaluate_run(run.cfg, checkpoint)
        except UserError as error:
            run.missing.append(f"{what}: {error}")
    return None


if __name__ == "__main__":
    args = parse_args()
    sys.exit(run(lambda: main(args), args.debug))
