"""The parts of the page that the run's own logs give: verdict, warnings, missing modalities, curves."""

from collections.abc import Sequence

from engine.output import CONFIG_FILE
from tools.report.charts import Series, line_chart
from tools.report.evaluation import Evaluation
from tools.report.html import Html, code, details, join, note, table, tag
from tools.report.run import Metrics, Run
from utils.modalities import MODALITIES

COLUMNS = ("mAP", "R1", "R5", "R10")
WHEN = {"before": "before training", "last": "last epoch", "best": "best epoch"}
KNOWN_BRANCHES = ("ori", "moe", "sdtps", "both")
PATTERNS = ("nothing", "r", "n", "t", "rn", "rt", "nt")
NOTICEABLE = 1.0
"""Points of mAP under which a difference is called none: a seed changes as much."""


def main_branch(metrics: Metrics) -> str:
    return "both" if "both" in metrics else next(iter(metrics))


def colour(branch: str) -> str:
    """Class of the style sheet."""
    return f"c-{branch}" if branch in KNOWN_BRANCHES else "c-other"


def cards(runs: Sequence[Run], evaluations: Sequence[Evaluation | None]) -> Html:
    """The few figures that one looks for first."""
    shown = []
    for run, evaluation in zip(runs, evaluations, strict=True):
        facts: list[tuple[str, str]] = []
        if found := run.evaluations().get("last"):
            epoch, metrics = found
            branch = main_branch(metrics)
            facts += [(f"mAP of {branch}", f"{metrics[branch]['mAP']:.1f}"), ("Rank-1", f"{metrics[branch]['R1']:.1f}")]
            facts.append(("epochs", str(epoch)))
        if seconds := run.seconds():
            facts.append(("training", duration(seconds)))
        if speed := run.samples_per_second():
            facts.append(("samples/s", f"{speed:.0f}"))
        if memory := run.peak_memory():
            facts.append(("GPU memory", f"{memory:.1f} GiB"))
        if evaluation is not None:
            facts.append(("test images", f"{len(evaluation.names):,}"))
        items = [tag("div", tag("dt", name), tag("dd", value)) for name, value in facts]
        title = [tag("h2", run.label, class_="card-title")] if len(runs) > 1 else []
        shown.append(join([*title, tag("dl", *items, class_="cards")]))
    return join(shown)


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def verdict(runs: Sequence[Run], evaluations: Sequence[Evaluation | None]) -> Html:
    """A sentence of what the figures show, and the figures."""
    if len(runs) == 1:
        lead, figures = _sentences(runs[0]), _table_of_one(runs[0], evaluations[0])
    else:
        lead, figures = _comparison(runs), _table_of_two(runs)
    caution = [
        "mAP and Rank-k in %. The best epoch is chosen on the test images themselves, which flatters it; the last is "
        "fixed beforehand. One run does not tell what another seed would have given."
    ]
    return join([note(*lead, kind="lead"), warnings(runs), figures, note(*caution, *_how_to_test_missing(runs))])


def _sentences(run: Run) -> list[str | Html]:
    found = run.evaluations()
    if "last" not in found:
        return ["No evaluation of this run is finished, so there is no verdict yet."]
    epoch, last = found["last"]
    branch = main_branch(last)
    of = last[branch]
    parts: list[str | Html] = [
        f"After {epoch} epochs, ",
        tag("strong", code(branch), f" ranks the test images with mAP {of['mAP']:.1f} and Rank-1 {of['R1']:.1f} %"),
    ]
    if "before" in found and branch in found["before"][1]:
        parts.append(_change(of["mAP"] - found["before"][1][branch]["mAP"]))
    parts.append(". ")
    best_epoch, best = found.get("best", (epoch, last))
    if (ahead := best[branch]["mAP"] - of["mAP"]) >= 0.1:
        parts.append(f"Epoch {best_epoch} was the best, {ahead:.1f} points above the last. ")
    if alone := {name: row["mAP"] for name, row in last.items() if name != branch}:
        top = max(alone, key=lambda name: alone[name])
        gap = of["mAP"] - alone[top]
        if abs(gap) < NOTICEABLE:
            parts += [
                "Joining the branches makes no noticeable difference: ",
                code(top),
                f" has {alone[top]:.1f} alone.",
            ]
        else:
            side = "above" if gap > 0 else "below"
            parts += [f"That is {abs(gap):.1f} points {side} the best single branch, ", code(top), "."]
    return parts


def _change(points: float) -> str:
    if abs(points) < NOTICEABLE:
        return ", about what it was before training"
    return f", {abs(points):.1f} points of mAP {'above' if points > 0 else 'below'} where it started"


def _table_of_one(run: Run, evaluation: Evaluation | None) -> Html | None:
    sections: list[tuple[str, Metrics]] = [
        (f"{WHEN[when]} ({epoch})" if when != "before" else WHEN[when], metrics)
        for when, (epoch, metrics) in run.evaluations().items()
    ]
    if evaluation is not None:
        epoch = f" (epoch {evaluation.epoch})" if evaluation.epoch is not None else ""
        sections.append((f"{evaluation.checkpoint.name}{epoch}, evaluated for this page", evaluation.metrics))
    if not sections:
        return None
    rows = []
    for title, metrics in sections:
        rows.append(_group(title, 1 + len(COLUMNS)))
        for branch, row in metrics.items():
            rows.append(tag("tr", _branch(branch), *(_figure(row[c], bar=c == "mAP") for c in COLUMNS)))
    return _verdict_table(COLUMNS, rows)


def _verdict_table(columns: Sequence[str], rows: Sequence[Html]) -> Html:
    head = tag("thead", tag("tr", tag("th", "branch"), *(tag("th", c, class_="n") for c in columns)))
    return tag("div", tag("table", head, tag("tbody", *rows), class_="verdict"), class_="scroll")


def _group(title: str, columns: int) -> Html:
    """A row that tells which evaluation the next rows are of."""
    return tag("tr", tag("th", title, colspan=columns, scope="rowgroup"), class_="group")


def _branch(branch: str) -> Html:
    return tag("td", tag("span", branch, class_=f"key {colour(branch)}"))


def _figure(value: float, more: str = "", bar: bool = False) -> Html:
    style = f"--share:{min(max(value, 0), 100):.1f}%" if bar else None
    return tag("td", f"{value:.1f}{more}", class_="n bar" if bar else "n", style=style)


def _comparison(runs: Sequence[Run]) -> list[str | Html]:
    found = [run.evaluations().get("last") for run in runs]
    if found[0] is None or found[1] is None:
        without = " and ".join(run.label for run, f in zip(runs, found, strict=True) if f is None)
        return [f"No evaluation of {without} is finished, so there is nothing to compare yet."]
    (_, a), (_, b) = found[0], found[1]
    if others := _other_data(runs):
        return [tag("strong", "These runs were tested on other data"), f" ({others}): their figures do not compare."]
    ends = [(run.label, main_branch(metrics)) for run, metrics in zip(runs, (a, b), strict=True)]
    values = [metrics[branch]["mAP"] for metrics, (_, branch) in zip((a, b), ends, strict=True)]
    told = " and ".join(f"{v:.1f} in {label} ({branch})" for v, (label, branch) in zip(values, ends, strict=True))
    parts: list[str | Html] = [tag("strong", _judged(runs, values[1] - values[0])), f": mAP is {told}. "]
    if ends[0][1] != ends[1][1] and (shared := [name for name in a if name in b]):
        gap = b[shared[0]]["mAP"] - a[shared[0]]["mAP"]
        parts.append(f"In {shared[0]}, which both have, it differs by {_signed(gap)}. ")
    parts.append("One run of each cannot tell an effect from chance; several seeds of both can (")
    return [*parts, code("python -m tools.ablate"), ")."]


def _other_data(runs: Sequence[Run]) -> str:
    """Where two runs do not share their data set, in words."""
    one, two = (None if run.cfg is None else run.cfg.DATASETS for run in runs)
    if one is None or two is None:
        return ""
    keys = [key for key in ("NAMES", "ROOT_DIR", "MANIFEST") if one[key] != two[key]]
    return ", ".join(f"DATASETS.{key} {one[key]!r} and {two[key]!r}" for key in keys)


def _judged(runs: Sequence[Run], gap: float) -> str:
    if abs(gap) < NOTICEABLE:
        return "The two runs end alike"
    return f"{runs[1].label} ends {abs(gap):.1f} points {'above' if gap > 0 else 'below'} {runs[0].label}"


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def _table_of_two(runs: Sequence[Run]) -> Html | None:
    found = [run.evaluations() for run in runs]
    rows = []
    for when, title in WHEN.items():
        sides = [f[when] for f in found if when in f]
        if len(sides) < 2:
            continue
        (epoch_a, a), (epoch_b, b) = sides
        told = title if when == "before" else f"{title} ({epoch_a}; {epoch_b})"
        branches = [name for name in KNOWN_BRANCHES if name in a or name in b]
        rows.append(_group(told, 7))
        for branch in branches:
            values = [[side.get(branch, {}).get(column) for side in (a, b)] for column in ("mAP", "R1")]
            rows.append(tag("tr", _branch(branch), *_pair(*values[0]), *_pair(*values[1])))
    if not rows:
        return None
    legend = note("A is ", code(runs[0].label), ", B is ", code(runs[1].label), ".")
    return join([legend, _verdict_table(("mAP A", "B", "B − A", "R1 A", "B", "B − A"), rows)])


def _pair(a: float | None, b: float | None) -> list[Html]:
    gap = None if a is None or b is None else b - a
    kind = "" if gap is None or abs(gap) < NOTICEABLE else " up" if gap > 0 else " down"
    shown = ["–" if value is None else f"{value:.1f}" for value in (a, b)]
    told = "–" if gap is None else _signed(gap)
    return [tag("td", shown[0], class_="n"), tag("td", shown[1], class_="n"), tag("td", told, class_=f"n{kind}")]


def warnings(runs: Sequence[Run]) -> Html | None:
    """What the diagnosis found while the run trained."""
    blocks = []
    for run in runs:
        for warned in run.warnings():
            epochs = f"epoch {warned.epochs[0]}"
            if len(warned.epochs) > 1:
                epochs = f"{len(warned.epochs)} times, epochs {warned.epochs[0]} to {warned.epochs[-1]}"
            told = warned.message or f"value {warned.value}"
            of = f"{run.label}: " if len(runs) > 1 else ""
            title = tag("strong", f"{of}{warned.rule.replace('_', ' ')}")
            kind = "info" if warned.on_purpose else "warning"
            blocks.append(tag("div", title, f" ({epochs}). ", told, class_=kind))
    return join(blocks) if blocks else None


def missing_modalities(runs: Sequence[Run]) -> Html | None:
    """mAP and Rank-1 of every branch without some of the modalities, where that was tested."""
    parts: list[Html] = []
    for run in runs:
        if not (found := run.missing_modalities()):
            continue
        patterns = [p for p in PATTERNS if p in found]
        branches = list(found[patterns[0]])
        rows = [[_lacks(p), *(_two(found[p][b]) for b in branches)] for p in patterns]
        absent = [p for p in patterns if p != "nothing"]
        if len(absent) > 1:
            means = {b: {c: sum(found[p][b][c] for p in absent) / len(absent) for c in ("mAP", "R1")} for b in branches}
            rows.append([f"mean of {len(absent)}", *(_two(means[b]) for b in branches)])
        parts += [tag("h3", run.label)] if len(runs) > 1 else []
        head = [tag("th", tag("span", b, class_=f"key {colour(b)}"), class_="n") for b in branches]
        parts.append(table(["left out", *head], rows, class_="verdict"))
    if parts:
        parts.append(note("mAP / Rank-1 in %."))
    return join(parts) if parts else None


def _how_to_test_missing(runs: Sequence[Run]) -> list[str | Html]:
    """The command that a single run lacks for the table of missing modalities."""
    run = runs[0]
    if len(runs) > 1 or run.missing_modalities() or (weight := run.checkpoint()) is None:
        return []
    command = f"python test_net.py --config_file {run.folder / CONFIG_FILE} TEST.WEIGHT {weight} TEST.MISS all"
    return [" Missing modalities were not tested: ", code(command), " adds their table."]


def _lacks(pattern: str) -> str:
    return "none" if pattern == "nothing" else " and ".join(m for m in MODALITIES if m[0].lower() in pattern)


def _two(row: dict[str, float]) -> Html:
    return _figure(row["mAP"], f" / {row['R1']:.1f}", bar=True)


def curves(runs: Sequence[Run]) -> Html | None:
    """Loss, accuracy, mAP and Rank-1 by epoch; those of a second run are dashed."""
    found = [run.curves() for run in runs]
    if not any(found):
        return None
    branches = [b for b in KNOWN_BRANCHES if any(f"{b}/mAP" in curves for curves in found)]

    def lines(names: dict[str, tuple[str, str]], factor: float = 1.0) -> list[Series]:
        """Series of names -> (label, colour) in all runs."""
        return [
            Series(
                label if len(runs) == 1 else f"{run.label} {label}",
                [(x, factor * y) for x, y in curves[name]],
                shade,
                dashed=i > 0,
            )
            for i, (run, curves) in enumerate(zip(runs, found, strict=True))
            for name, (label, shade) in names.items()
            if name in curves
        ]

    uninformed = {run.uninformed_loss() for run in runs}
    level = uninformed.pop() if len(uninformed) == 1 else None
    reference = ("knows nothing", level) if level else None
    charts = [
        line_chart("Training loss", lines({"loss": ("loss", "c-train")}), reference=reference),
        line_chart("Training accuracy", lines({"acc": ("accuracy", "c-train")}, 100), unit=" %", top=100),
        line_chart("mAP", lines({f"{b}/mAP": (b, colour(b)) for b in branches}), unit=" %", top=100),
        line_chart("Rank-1", lines({f"{b}/R1": (b, colour(b)) for b in branches}), unit=" %", top=100),
    ]
    terms = sorted({name for curve in found for name in curve if name.startswith(("id/", "triplet/"))})
    shades = ("c-ori", "c-moe", "c-sdtps", "c-both", "c-other", "c-train")
    parts = [legend(branches, runs), tag("div", *charts, class_="grid")]
    if terms:
        of_terms = [line_chart(name, lines({name: (name, shades[i % len(shades)])})) for i, name in enumerate(terms)]
        parts.append(details("Every loss term", tag("div", *of_terms, class_="grid")))
    return join(parts)


def legend(branches: Sequence[str], runs: Sequence[Run]) -> Html:
    items = [tag("span", b, class_=f"key {colour(b)}") for b in branches]
    if len(runs) == 2:
        items += [tag("span", f"— {runs[0].label}"), tag("span", f"‑ ‑ {runs[1].label}")]
    return tag("p", *items, class_="legend")
