"""Findings as CSV, JSON, Markdown and, for TensorBoard's HParams view, event files."""

import csv
import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from configs import diff
from configs.validate import flatten
from tools.ablate.pictures import draw
from tools.ablate.results import METRICS, WHEN, Findings, Result
from tools.ablate.statistics import Summary, summarise
from tools.ablate.study import NOT_COMPARED
from utils.files import save_text

log = logging.getLogger(__name__)

HPARAMS = "hparams"
TITLES = {
    "last": "The last epoch, fixed beforehand",
    "best": "The best epoch, chosen on the test images themselves: it flatters",
}


def write_report(findings: Findings, folder: Path) -> None:
    """Writes runs.csv, report.json, report.md, the pictures and the event files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_text(to_csv(findings), folder / "runs.csv")
    save_text(json.dumps(to_json(findings), indent=2) + "\n", folder / "report.json")
    pictures = draw(findings, folder)
    save_text(to_markdown(findings, [path.name for path in pictures]), folder / "report.md")
    write_hparams(findings, folder / HPARAMS)
    log.info("wrote %s; TensorBoard: tensorboard --logdir %s", folder / "report.md", folder / HPARAMS)


def to_csv(findings: Findings) -> str:
    """One line a run and branch."""
    rows = [row for result in findings.results for row in _rows(result)]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_json(findings: Findings) -> dict[str, Any]:
    """All figures, as plain values."""
    study = findings.study
    return {
        "study": {
            "config": study.config,
            "out": str(study.out),
            "base": study.base,
            "options": study.options,
            "variants": study.variants,
        },
        "notes": findings.notes,
        "runs": [row for result in findings.results for row in _rows(result)],
        "summary": findings.summaries(),
        "differences": findings.differences(),
        "provenance": {result.run.name: result.provenance for result in findings.results},
    }


def to_markdown(findings: Findings, pictures: list[str]) -> str:
    """The report that people read."""
    study, seeds = findings.study, sorted({result.run.seed for result in findings.results})
    parts = [
        f"# {study.out.name}",
        f"Base config `{study.config}`, options `{_told(study.options)}`, seeds {', '.join(map(str, seeds))}. "
        "mAP and Rank-1 in %: mean ± sample standard deviation [95 % interval of the mean, Student's t]. Differences "
        "are paired by seed, over the seeds that both sides have.",
        *[f"> **{note}**" for note in findings.notes],
    ]
    parts += [f"![{name}]({name})" for name in pictures]
    for when in WHEN:
        parts += [f"## {TITLES[when]}", _table_of_means(findings, when)]
        if findings.pairs:
            parts += ["### Differences", _table_of_differences(findings, when)]
    parts += [
        "An interval that leaves out zero is no proof where many variants are compared: of 20 without any effect, one "
        "does so by chance.",
        "## Cost",
        _table_of_costs(findings),
        "## Runs",
        _table([_shown(row) for result in findings.results for row in _rows(result)]),
        "## Variants",
        _table([{"variant": name, "options": f"`{_told(options)}`"} for name, options in study.variants.items()]),
        "## Made with",
        _made_with(findings),
    ]
    return "\n\n".join(parts) + "\n"


def write_hparams(findings: Findings, folder: Path) -> None:
    """One TensorBoard run for each run: the keys in which variants differ, the final figures, the curves."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import
    from torch.utils.tensorboard.summary import hparams

    shutil.rmtree(folder, ignore_errors=True)  # this function's own, of an earlier report
    configs = {result.run.variant: result.run.cfg for result in findings.results}
    first = next(iter(configs.values()))
    keys = {key for cfg in configs.values() for key, _, _ in diff(first, cfg)} - {*NOT_COMPARED, "SOLVER.SEED"}
    for result in findings.results:
        values = flatten(result.run.cfg)
        told: dict[str, Any] = {"variant": result.run.variant, "seed": result.run.seed}
        told |= {key: v if type(v := values[key]) in (int, float) else str(v) for key in sorted(keys)}
        figures = {
            f"{when}/{branch}/{metric}": result.metrics[when][branch][metric]
            for when in WHEN
            for branch in result.branches
            for metric in METRICS
        }
        figures |= {f"cost/{name}": value for name, value in result.cost.items() if value is not None}
        with SummaryWriter(folder / result.run.variant / f"seed_{result.run.seed}") as board:
            for event in hparams(told, figures):
                board.file_writer.add_summary(event)
            for name, value in figures.items():
                board.add_scalar(name, value)
            for name, points in result.curves.items():
                for epoch, value in points:
                    board.add_scalar(f"epoch/{name}", value, epoch)


def _rows(result: Result) -> list[dict[str, Any]]:
    """One dict a branch."""
    start = result.provenance["starts"][-1]
    rows = []
    for branch in result.branches:
        row: dict[str, Any] = {"variant": result.run.variant, "seed": result.run.seed, "branch": branch}
        for when in WHEN:
            row[f"{when}_epoch"] = result.metrics[when]["epoch"]
            row |= {f"{when}_{metric}": result.metrics[when][branch][metric] for metric in METRICS}
        row |= result.cost
        row |= {name: start[name] for name in ("commit", "dirty", "config", "torch", "device")}
        row |= {"data": start["data"]["digest"], "folder": str(result.run.folder)}
        rows.append(row)
    return rows


def _shown(row: dict[str, Any]) -> dict[str, str]:
    """A row of the table of runs: the figures, rounded."""
    shown = {name: str(row[name]) for name in ("variant", "seed", "branch")}
    for when in WHEN:
        shown[f"{when}: epoch"] = str(row[f"{when}_epoch"])
        shown |= {f"{when}: {metric}": f"{row[f'{when}_{metric}']:.2f}" for metric in METRICS}
    return shown


def _table_of_means(findings: Findings, when: str) -> str:
    rows = []
    for name in findings.variants():
        for branch in findings.of(name)[0].branches:
            row = {"variant": name, "branch": f"`{branch}`", "seeds": str(len(findings.of(name)))}
            for metric in METRICS:
                row[metric] = _mean(summarise(list(findings.values(name, branch, metric, when).values())))
            rows.append(row)
    return _table(rows)


def _table_of_differences(findings: Findings, when: str) -> str:
    rows = []
    for pair in findings.pairs:
        seeds, _ = findings.difference(pair, "mAP", when)
        row = {
            "variant": f"{pair.variant} `{pair.branch}`",
            "minus": f"{pair.reference} `{pair.reference_branch}`",
            "seeds": str(len(seeds)),
        }
        for metric in METRICS:
            _, summary = findings.difference(pair, metric, when)
            interval = summary.interval if summary else None
            clear = interval is not None and not interval[0] <= 0 <= interval[1]
            row[metric] = f"**{_mean(summary, '+')}**" if clear else _mean(summary, "+")
        rows.append(row)
    return _table(rows) + "\n\nBold: the interval leaves out zero."


def _table_of_costs(findings: Findings) -> str:
    rows, base = [], findings.study.base
    reference = findings.costs(base, "samples_per_second")
    for name in findings.variants():
        rates = findings.costs(name, "samples_per_second")
        seeds = sorted(rates.keys() & reference.keys())
        slower = summarise([100 * (reference[s] / rates[s] - 1) for s in seeds]) if seeds and name != base else None
        memory = findings.costs(name, "peak_memory_gib")
        rows.append(
            {
                "variant": name,
                "training, s": _mean_of(findings.costs(name, "train_seconds"), 1),
                "samples/s": _mean_of(rates, 1),
                f"time a sample against {base}, %": _mean(slower, "+"),
                "peak memory, GiB": f"{max(memory.values()):.2f}" if memory else "–",
            }
        )
    return _table(rows) + "\n\nTraining alone, without the evaluations between its epochs."


def _made_with(findings: Findings) -> str:
    starts = [start for result in findings.results for start in result.provenance["starts"]]
    lines = [
        *sorted({f"commit `{s['commit']}`{' with changes' if s['dirty'] else ''}" for s in starts}),
        *sorted(
            {f"data `{s['data']['digest']}`: {s['data']['files']} files, {s['data']['bytes']} bytes" for s in starts}
        ),
        *sorted({f"weights `{digest}`: {path}" for s in starts for path, digest in s["weights"].items()}),
        *sorted({f"torch {s['torch']}, {s['device'] or 'an unknown device'}" for s in starts}),
    ]
    return "\n".join(f"- {line}" for line in lines)


def _told(options: dict[str, Any]) -> str:
    return " ".join(f"{key} {value}" for key, value in options.items()) or "–"


def _mean(summary: Summary | None, sign: str = "") -> str:
    if summary is None:
        return "–"
    if summary.interval is None:
        return f"{summary.mean:{sign}.2f}"
    low, high = summary.interval
    return f"{summary.mean:{sign}.2f} ± {summary.std:.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def _mean_of(values: dict[int, float], digits: int) -> str:
    return f"{summarise(list(values.values())).mean:.{digits}f}" if values else "–"


def _table(rows: list[dict[str, str]]) -> str:
    header = list(rows[0])
    lines = [header, ["---"] * len(header), *[[row[name] for name in header] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
