"""Draws the curves of one or more runs from their metrics.jsonl: loss, accuracy, mAP and Rank-1 by epoch.

python -m tools.plot_curves docs/curves.png runs/a runs/b --labels scratch finetuned
"""

import argparse
import logging
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from utils.cli import run
from utils.errors import UserError
from utils.logging import read_metrics, setup_logging

log = logging.getLogger("tools.plot_curves")

BRANCHES = {"ori": ":", "sdtps": "--", "moe": "-.", "both": "-"}
"""Branch -> line style."""


def read_run(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Name -> points (epoch, value), of the lines of kind "epoch" and "eval"; a later line replaces an earlier one.

    Raises:
        UserError: there is no metrics.jsonl, or it cannot be read.
    """
    curves: dict[str, dict[float, float]] = {}
    for line in read_metrics(folder / "metrics.jsonl"):
        if line["kind"] in ("epoch", "eval"):
            for name in line.keys() - {"kind", "step", "epoch"}:
                if line[name] is not None:
                    curves.setdefault(name, {})[line["epoch"]] = line[name]
    if not {"loss", "acc"} <= curves.keys():
        raise UserError(f"{folder}: no epoch of this run is finished, so there is no curve to draw.")
    return {name: sorted(points.items()) for name, points in curves.items()}


def plot(runs: dict[str, dict[str, list[tuple[float, float]]]], out: Path) -> None:
    """Three panels, a colour for each run; the third shows every branch in a line style of its own."""
    figure, (loss, acc, ranks) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for i, (label, curves) in enumerate(runs.items()):
        colour = f"C{i % 10}"
        loss.plot(*zip(*curves["loss"], strict=True), color=colour, label=label)
        acc.plot(*([x for x, _ in curves["acc"]], [100 * y for _, y in curves["acc"]]), color=colour, label=label)
        for branch, style in BRANCHES.items():
            if f"{branch}/mAP" in curves:
                ranks.plot(*zip(*curves[f"{branch}/mAP"], strict=True), style, color=colour)
    for axis, title in ((loss, "training loss"), (acc, "training accuracy, %"), (ranks, "mAP on unseen identities, %")):
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    loss.legend(frameon=False)
    shown = [b for b in BRANCHES if any(f"{b}/mAP" in curves for curves in runs.values())]
    ranks.legend([Line2D([], [], color="grey", linestyle=BRANCHES[b]) for b in shown], shown, frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    log.info("wrote %s", out)


def main(folders: list[Path], labels: list[str] | None, out: Path) -> None:
    names = [folder.name for folder in folders]
    labels = labels or (names if len(set(names)) == len(names) else [str(folder) for folder in folders])
    if len(labels) != len(folders):
        raise UserError(f"--labels gives {len(labels)} names for {len(folders)} runs.")
    plot({label: read_run(folder) for label, folder in zip(labels, folders, strict=True)}, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="picture to write, .png or .svg")
    parser.add_argument("runs", type=Path, nargs="+", help="folders that train_net.py wrote")
    parser.add_argument("--labels", nargs="+", help="names of the runs in the legend")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    setup_logging()
    sys.exit(run(lambda: main(args.runs, args.labels, args.out), args.debug))
