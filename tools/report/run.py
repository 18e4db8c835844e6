"""What the folder of a run tells without its data: config, metrics, log."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from yacs.config import CfgNode

from configs import load_cfg
from engine.output import CONFIG_FILE, LAST, METRICS_FILE, METRICS_LOG
from utils.errors import UserError
from utils.files import read_json
from utils.logging import read_metrics

LOG_FILE = "train.log"
PROVENANCE = "provenance.json"
TIME = r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ engine\.processor "

Metrics = dict[str, dict[str, float]]
"""Branch -> mAP, R1, R5, R10 in percent."""


@dataclass
class Warned:
    """A rule of the diagnosis that fired: in which epochs, and what it said last, where the log still has it."""

    rule: str
    value: float | None
    epochs: list[int]
    message: str = ""
    on_purpose: bool = False


@dataclass
class Run:
    """One run's folder, read.

    Attributes:
        folder: where it lies; `label` names it on the page.
        cfg: its resolved config; None where there is none that can be read.
        lines: of metrics.jsonl.
        results: metrics.json.
        log: train.log.
        missing: what is not there, and why, in sentences.
    """

    folder: Path
    label: str
    cfg: CfgNode | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    log: str = ""
    missing: list[str] = field(default_factory=list)

    def evaluations(self) -> dict[str, tuple[int, Metrics]]:
        """ "before", "last", "best" -> epoch and metrics, as far as the run came."""
        found = {}
        for when in ("before", "last", "best"):
            if section := self.results.get(when):
                metrics = {branch: row for branch, row in section.items() if isinstance(row, dict)}
                if metrics:
                    found[when] = (section.get("epoch", 0), metrics)
        return found

    def missing_modalities(self) -> dict[str, Metrics]:
        """Pattern of modalities that were taken away -> metrics, where test_net.py tested any."""
        results = self.results.get("test", {}).get("results", {})
        return results if results.keys() - {"nothing"} else {}

    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """Name -> points (epoch, value), of whole epochs and evaluations; a later line replaces an earlier one."""
        curves: dict[str, dict[float, float]] = {}
        for line in self.lines:
            if line.get("kind") in ("epoch", "eval"):
                for name in line.keys() - {"kind", "step", "epoch"}:
                    if line[name] is not None:
                        curves.setdefault(name, {})[line["epoch"]] = line[name]
        return {name: sorted(points.items()) for name, points in curves.items()}

    def warnings(self) -> list[Warned]:
        """What the diagnosis found, each rule once."""
        lines = re.findall(r" (\w+): diagnosis (\w+): (.+)", self.log)
        told = {rule: (level, message) for level, rule, message in lines}  # the last of each
        found: dict[str, Warned] = {}
        for line in self.lines:
            if line.get("kind") == "diagnosis":
                for rule in line.keys() - {"kind", "step", "epoch"}:
                    warned = found.setdefault(rule, Warned(rule, None, []))
                    warned.value = line[rule]
                    warned.epochs.append(int(line["epoch"]))
        for rule, warned in found.items():
            level, warned.message = told.get(rule, ("", ""))
            warned.on_purpose = level == "INFO"
        return sorted(found.values(), key=lambda warned: (warned.on_purpose, warned.epochs[0]))

    def train_values(self, name: str) -> list[float]:
        """The values of a name in the windows of training steps."""
        return [line[name] for line in self.lines if line.get("kind") == "train" and line.get(name) is not None]

    def samples_per_second(self) -> float | None:
        """Median over the windows."""
        values = self.train_values("samples_per_second")
        return median(values) if values else None

    def peak_memory(self) -> float | None:
        """GiB on the GPU; None on others, where it is not measured."""
        return max(self.train_values("peak_memory_gib"), default=None)

    def seconds(self) -> float | None:
        """Wall time of training with its evaluations, over all the times that the run was begun."""
        total, first, last = 0.0, None, None
        for match in re.finditer(TIME + r"\w+: (training on)?", self.log, re.MULTILINE):
            now = datetime.fromisoformat(match[1])
            if match[2]:
                total, first = total + _between(first, last), now
            last = now
        return (total + _between(first, last)) or None

    def uninformed_loss(self) -> float | None:
        """The loss of a network that knows nothing, as the log tells it."""
        told = re.findall(r"a network that knows nothing has a loss of ([\d.]+)", self.log)
        return float(told[-1]) if told else None

    def device(self) -> str | None:
        """Device, precision and version of torch, as the log tells them."""
        told = re.findall(r"training on (.+)", self.log)
        return told[-1] if told else None

    def commit(self) -> str | None:
        """Of the code that trained it, where the run says it."""
        starts = read_json(self.folder / PROVENANCE).get("starts", [])
        if starts:
            return starts[-1].get("commit")
        log = self.folder / "train.log"
        told = re.findall(r"; commit (\S+)", log.read_text(errors="replace")) if log.is_file() else []
        return told[-1] if told else None

    def checkpoint(self) -> Path | None:
        """The best one, else the last."""
        found = [*self.folder.glob(f"{self.cfg.MODEL.NAME if self.cfg else '*'}best.pth"), self.folder / LAST]
        return next((path for path in found if path.is_file()), None)


def _between(first: datetime | None, last: datetime | None) -> float:
    return (last - first).total_seconds() if first and last else 0.0


def read_run(folder: Path, label: str = "", options: Sequence[str] = ()) -> Run:
    """Reads a run's folder; what is not in it is said in `missing`.

    Args:
        options: KEY, VALUE, … over its config, such as DATASETS.ROOT_DIR.

    Raises:
        UserError: no file of a run is there.
    """
    files = (CONFIG_FILE, METRICS_LOG, METRICS_FILE)
    if not any((folder / name).is_file() for name in files):
        raise UserError(f"{folder}: none of {', '.join(files)} is there. Give the OUTPUT_DIR of a run.")
    run = Run(folder, label or str(folder), results=read_json(folder / METRICS_FILE))
    try:
        run.cfg = load_cfg(folder / CONFIG_FILE, options)
    except UserError as error:
        run.missing.append(f"Config: {error}")
    try:
        run.lines = read_metrics(folder / METRICS_LOG)
    except UserError as error:
        run.missing.append(f"Curves: {error}")
    try:
        run.log = (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        run.missing.append(f"Times and messages of the diagnosis: {folder / LOG_FILE} cannot be read ({error}).")
    if not run.results:
        run.missing.append(f"Verdict: there is no {METRICS_FILE} in the folder, since no evaluation is finished.")
    return run
