"""Trains the variants of a config by several seeds each, and tells their effects from noise.

python -m tools.ablate configs/studies/sample_tiny.yml
python -m tools.ablate configs/studies/sdtps.yml --gpus 0,1 --jobs 4
python -m tools.ablate configs/studies/sdtps.yml --report
python -m tools.ablate --config_file configs/sample/DeMo_SDTPS.yml --out runs/studies/beta --seeds 1 2 3 \\
    --variant beta_25 --variant beta_40 MODEL.SDTPS_BETA 0.4

The same command goes on where it was stopped. docs/ablation.md tells what a study file holds.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tools.ablate.results import collect
from tools.ablate.runner import prepare, run_study
from tools.ablate.study import Study, make_study, pairs_of, read_study, with_options
from utils.cli import run
from utils.errors import UserError
from utils.logging import setup_logging

log = logging.getLogger("tools.ablate")


def parse_args(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.ablate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, nargs="?", help="study file, see configs/studies/")
    parser.add_argument("--seeds", type=int, nargs="+", help="in place of the study's")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", default=[], help="run these variants alone")
    parser.add_argument("--jobs", type=int, help="runs at a time, over all GPUs; one a GPU unless given")
    parser.add_argument("--gpus", type=lambda text: text.split(","), default=[], metavar="0,1", help="GPUs to use")
    parser.add_argument("--report", action="store_true", help="run nothing: report what is finished")
    parser.add_argument("--allow-mixed", action="store_true", help="take results of different code or data together")
    parser.add_argument(
        "--options", nargs="+", metavar="KEY VALUE", default=[], help="shared options, beside the file's"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    group = parser.add_argument_group("a study without a file")
    group.add_argument("--config_file", metavar="FILE", help="base config")
    group.add_argument("--out", type=Path, help="the study's folder; with a file: in place of the file's")
    group.add_argument("--base", metavar="VARIANT", help="what variants are compared with; the first unless given")
    group.add_argument(
        "--variant", action="append", nargs="+", metavar=("NAME", "KEY VALUE"), default=[], help="a variant; repeat it"
    )
    args = parser.parse_args(words)
    if args.jobs is not None and args.jobs < 1:
        parser.error("--jobs: give 1 or more")
    return args


def study_of(args: argparse.Namespace) -> Study:
    """The study that the command line names.

    Raises:
        UserError: it names none, or one that cannot be run.
    """
    if args.study is None:
        fields = {
            "config": args.config_file,
            "out": str(args.out) if args.out else None,
            "variants": {name: pairs_of(words) for name, *words in args.variant},
            "seeds": args.seeds,
            "base": args.base,
        }
        if len(fields["variants"]) < len(args.variant):
            raise UserError("--variant: a name is given twice.")
        study = make_study({name: value for name, value in fields.items() if value})
    elif args.variant or args.config_file or args.base:
        raise UserError("Give a study file, or --config_file, --out, --seeds and --variant; not both.")
    else:
        study = read_study(args.study)
    study = replace(study, out=args.out or study.out, seeds=tuple(args.seeds or study.seeds))
    return with_options(study, args.options)


def main(args: argparse.Namespace) -> None:
    """Runs what is not finished, then reports; a failed run makes it end with an error, after the report."""
    from tools.ablate.report import write_report  # matplotlib is slow to import

    setup_logging()
    study = study_of(args)
    failures: dict[str, str] = {}
    if not args.report:
        runs = study.runs(only=args.only)
        prepare(study)
        jobs = args.jobs or max(1, len(args.gpus))
        failures = run_study(study, runs, jobs=jobs, gpus=args.gpus, allow_mixed=args.allow_mixed)
    try:
        write_report(collect(study, args.allow_mixed), study.out / "report")
    except UserError as error:
        if not failures:
            raise
        log.error("no report: %s", error)
    if failures:
        told = "\n".join(f"{name}: {problem}" for name, problem in failures.items())
        raise UserError(f"{len(failures)} runs failed; the same command tries them again.\n{told}")


if __name__ == "__main__":
    args = parse_args()
    sys.exit(run(lambda: main(args), args.debug))
