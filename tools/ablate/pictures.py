"""Pictures of a study: curves with bands, a dot for every seed, paired differences."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from tools.ablate.results import BRANCHES, Findings, Result
from tools.ablate.statistics import Summary, paired_differences, summarise

BASE_COLOUR, COLOUR, SEED_COLOUR = "0.45", "C0", "C1"
COLUMNS = 5


def draw(findings: Findings, folder: Path) -> list[Path]:
    """Writes the pictures; returns their paths."""
    paths = [folder / "dots.png"]
    _draw_dots(findings, paths[0])
    if findings.pairs:
        paths.append(folder / "differences.png")
        _draw_differences(findings, paths[-1])
    for name, title in (("mAP", "mAP on unseen identities, %"), ("loss", "training loss")):
        paths.append(folder / f"curves_{name}.png")
        _draw_curves(findings, name, title, paths[-1])
    return paths


def band(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, Summary]]:
    """Epoch -> what the curves say there, at the epochs that all of them have."""
    points = [dict(curve) for curve in curves]
    shared = sorted(set.intersection(*(set(curve) for curve in points)))
    return [(epoch, summarise([curve[epoch] for curve in points])) for epoch in shared]


def _draw_dots(findings: Findings, path: Path) -> None:
    """A panel for each branch, a line for each variant: every seed, the mean, its interval; dashed: the base."""
    names, base = findings.variants(), findings.study.base
    whole = findings.of(base)[0].whole if base in names else ""
    shown = [b for b in BRANCHES if any(b in findings.of(name)[0].branches for name in names)]
    figure, axes = plt.subplots(
        1, len(shown), figsize=(1.8 + 3 * len(shown), _height(len(names))), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, branch in zip(axes[0], shown, strict=True):
        for y, name in enumerate(names):
            if branch in findings.of(name)[0].branches:
                _draw_line(axis, y, list(findings.values(name, branch, "mAP").values()))
        if base in names:
            level = summarise(list(findings.values(base, whole, "mAP").values())).mean
            axis.axvline(level, color=BASE_COLOUR, linewidth=0.8, linestyle="--")
        _finish(axis, f"{branch}: mAP of the last epoch, %", names)
    _save(figure, path)


def _draw_differences(findings: Findings, path: Path) -> None:
    """A line for each pair of a variant as a whole, and of a branch that the study asks for by name: every seed's
    difference, the mean, its interval, and where zero is."""
    named = {ours for ours, _ in findings.study.compare}
    pairs = [
        p for p in findings.pairs if p.branch == findings.of(p.variant)[0].whole or f"{p.variant}/{p.branch}" in named
    ]
    figure, axis = plt.subplots(figsize=(8.5, _height(len(pairs))), layout="constrained")
    for y, pair in enumerate(pairs):
        ours = findings.values(pair.variant, pair.branch, "mAP")
        theirs = findings.values(pair.reference, pair.reference_branch, "mAP")
        if differences := list(paired_differences(ours, theirs).values()):
            _draw_line(axis, y, differences)
    axis.axvline(0, color="black", linewidth=0.8)
    labels = [f"{p.variant} {p.branch}  −  {p.reference} {p.reference_branch}" for p in pairs]
    _finish(axis, "difference in mAP of the last epoch, paired by seed", labels)
    _save(figure, path)


def _draw_curves(findings: Findings, name: str, title: str, path: Path) -> None:
    """A panel for each variant, the base in grey behind it: thick the mean over the seeds, thin each of them."""
    base = findings.study.base
    names = [n for n in findings.variants() if n != base] or [base]
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    width, height = (5.5, 3.8) if columns == 1 else (3.4, 2.7)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for number, (axis, variant) in enumerate(zip(axes.flat, names, strict=False)):
        axis.tick_params(labelbottom=number + columns >= len(names))
        for shown, colour in ((base, BASE_COLOUR), (variant, COLOUR)):
            results = findings.of(shown)
            if not results or (shown == base and variant == base and colour == BASE_COLOUR):
                continue
            curves = [_curve(result, name) for result in results]
            for curve in curves:
                axis.plot(*zip(*curve, strict=True), color=colour, linewidth=0.6, alpha=0.5)
            points = band(curves)
            epochs = [epoch for epoch, _ in points]
            of = f" {results[0].whole}" if name == "mAP" else ""
            axis.plot(epochs, [s.mean for _, s in points], color=colour, label=f"{shown}{of}")
            bounds = [s.interval for _, s in points if s.interval]
            if bounds:
                axis.fill_between(epochs, *zip(*bounds, strict=True), color=colour, alpha=0.2, linewidth=0)
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    drawn = [y for n in findings.variants() for result in findings.of(n) for _, y in _curve(result, name)]
    margin = 0.05 * (max(drawn) - min(drawn)) or 1.0
    axes[0, 0].set_ylim(min(drawn) - margin, max(drawn) + margin)  # the interval of two seeds may be huge
    figure.suptitle(f"{title}, by epoch; band: 95 % interval of the mean", fontsize=9)
    _save(figure, path)


def _curve(result: Result, name: str) -> list[tuple[float, float]]:
    return result.curves[f"{result.whole}/mAP" if name == "mAP" else name]


def _draw_line(axis: Axes, y: float, values: list[float]) -> None:
    summary = summarise(values)
    if summary.interval:
        axis.plot(summary.interval, [y, y], color=COLOUR, linewidth=2, solid_capstyle="butt")
    axis.plot(values, [y] * len(values), "o", color=SEED_COLOUR, markersize=4, alpha=0.7)
    axis.plot(summary.mean, y, "|", color=COLOUR, markersize=14, markeredgewidth=2.5)


def _finish(axis: Axes, title: str, labels: list[str]) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _height(lines: int) -> float:
    return 1.2 + 0.3 * lines


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
