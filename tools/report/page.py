"""The page: its parts in order, in one file."""

import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from configs import diff, get_cfg
from configs.validate import flatten
from tools.report.evaluation import Evaluation
from tools.report.html import Html, anchor, code, details, join, key, note, section, table, tag
from tools.report.results import cards, curves, missing_modalities, verdict
from tools.report.run import Run
from tools.report.samples import feature_map, patches, queries, rank_curves

STYLE = Path(__file__).with_name("style.css")
WHERE = ("OUTPUT_DIR", "TEST.WEIGHT")
"""Keys that say where a run lies, not what it is."""


def write_page(runs: Sequence[Run], evaluations: Sequence[Evaluation | None]) -> str:
    """The whole page about one run or two; `evaluations` stand beside their runs, None where there is none."""
    alone = evaluations[0] if len(runs) == 1 else None
    contents = {
        "Verdict": join([verdict(runs, evaluations), left_out(runs)]),
        "Missing modalities": missing_modalities(runs),
        "Curves": curves(runs),
        "Ranking and distances": rank_curves(runs, evaluations),
        "Queries": queries(alone) if alone else None,
        "Patches": patches(alone) if alone else None,
        "Map": feature_map(runs, evaluations),
        "Config": config(runs),
        "Made with": made_with(runs, evaluations),
    }
    sections = {title: section(title, content) for title, content in contents.items() if content}
    title = " and ".join(run.label for run in runs)
    body = tag(
        "body",
        tag("header", tag("h1", title), tag("p", _about(runs[0]), class_="soft"), cards(runs, evaluations)),
        tag("nav", *(tag("a", title, href=f"#{anchor(title)}") for title in sections), aria_label="contents"),
        tag("main", *sections.values()),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title}: report"),
        tag("style", Html(STYLE.read_text(encoding="utf-8"))),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _about(run: Run) -> str:
    """Data set, backbone and method in a line."""
    if run.cfg is None:
        return str(run.folder)
    m, size = run.cfg.MODEL, run.cfg.INPUT.SIZE_TEST
    parts = [run.cfg.DATASETS.NAMES, f"{m.TRANSFORMER_TYPE} at {size[0]} × {size[1]}"]
    parts += [f"SDTPS {m.SDTPS_SPARSE_RATIO:g} / {m.SDTPS_AGGR_RATIO:g}"] if m.USE_SDTPS else []
    parts += ["HDM and ATMoE"] if m.HDM and m.ATM else []
    return " · ".join([*parts, f"seed {run.cfg.SOLVER.SEED}"])


def left_out(runs: Sequence[Run]) -> Html | None:
    """What is not on the page, and why."""
    problems = [f"{run.label}: {text}" if len(runs) > 1 else text for run in runs for text in run.missing]
    if not problems:
        return None
    return tag("div", tag("h3", "Not on this page"), tag("ul", *(tag("li", p) for p in problems)), class_="missing")


def config(runs: Sequence[Run]) -> Html | None:
    """How the runs' configs differ from each other, from the defaults, and each in whole."""
    known = [(run.label, run.cfg) for run in runs if run.cfg is not None]
    if not known:
        return None
    parts: list[Html] = []
    if len(known) == 2:
        changes = [c for c in diff(known[0][1], known[1][1]) if c[0] not in WHERE]
        rows = [[key(name), code(_value(a)), code(_value(b))] for name, a, b in changes]
        parts.append(tag("h3", "Differences between the runs"))
        parts.append(table(["key", *(label for label, _ in known)], rows) if rows else note("None."))
    for label, cfg in known:
        changes = [c for c in diff(get_cfg(), cfg) if c[0] not in WHERE]
        rows = [
            [key(name), code(_value(new)), tag("td", code(_value(old)), class_="soft")] for name, old, new in changes
        ]
        of = f" of {label}" if len(known) > 1 else ""
        shown = table(["key", "here", "default"], rows) if rows else note("None.")
        whole = table(["key", "value"], [[key(name), code(_value(v))] for name, v in flatten(cfg).items()])
        title = f"Differences{of} from the defaults ({len(rows)})"
        parts += [details(title, shown)] if len(known) > 1 else [tag("h3", title), shown]
        parts.append(details(f"Every key{of}", whole))
    return join(parts)


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def made_with(runs: Sequence[Run], evaluations: Sequence[Evaluation | None]) -> Html:
    """Where and by which code the runs were trained, and this page made."""
    rows = []
    for run, evaluation in zip(runs, evaluations, strict=True):
        of = f"{run.label}: " if len(runs) > 1 else ""
        rows += [
            [f"{of}folder", code(run.folder)],
            [f"{of}trained on", run.device() or "the log does not say"],
            [f"{of}trained by commit", code(run.commit()) if run.commit() else "the run does not say"],
        ]
        if evaluation is not None:
            rows.append([f"{of}evaluated here", join([code(evaluation.checkpoint), f" on {evaluation.device}"])])
    rows += [
        ["this page", f"{time.strftime('%Y-%m-%d %H:%M')}, commit {_commit()}"],
        ["by", f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}"],
    ]
    return table(["", ""], rows, class_="facts")


def _commit() -> str:
    """Of the code that runs now."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
