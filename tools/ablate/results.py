"""What the runs of a study gave, read from their folders, and what it says about the variants."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from engine.output import METRICS_FILE, METRICS_LOG
from tools.ablate.provenance import conflicts, read_provenance
from tools.ablate.runner import HOW_TO_MIX, MIXED, is_finished
from tools.ablate.statistics import Summary, paired_differences, summarise
from tools.ablate.study import Run, Study
from tools.plot_curves import read_run
from utils.errors import UserError
from utils.files import read_json
from utils.logging import read_metrics

METRICS = ("mAP", "R1")
WHEN = ("last", "best")
BRANCHES = ("ori", "moe", "sdtps", "both")
"""In the order of the tables; others follow."""


@dataclass(frozen=True)
class Result:
    """A finished run."""

    run: Run
    metrics: dict[str, dict]
    """"last" and "best": branch -> mAP, R1, R5, R10 in percent, and "epoch"."""
    curves: dict[str, list[tuple[float, float]]]
    """Name -> points (epoch, value), such as "loss" and "both/mAP"."""
    cost: dict[str, float | None]
    """train_seconds (without evaluation), samples_per_second, peak_memory_gib (None on a CPU)."""
    provenance: dict[str, Any]

    @property
    def branches(self) -> list[str]:
        found = [branch for branch in self.metrics["last"] if branch != "epoch"]
        return [b for b in BRANCHES if b in found] + [b for b in found if b not in BRANCHES]

    @property
    def whole(self) -> str:
        """The branch that stands for the run: `both`, or the only one."""
        return "both" if "both" in self.branches else self.branches[0]


@dataclass(frozen=True)
class Pair:
    """A comparison: a variant's branch minus a reference's."""

    variant: str
    branch: str
    reference: str
    reference_branch: str


@dataclass(frozen=True)
class Findings:
    """All that a report tells."""

    study: Study
    results: list[Result]
    notes: list[str]
    """What a reader must know before the figures."""
    pairs: list[Pair]

    def variants(self) -> list[str]:
        return [name for name in self.study.variants if any(r.run.variant == name for r in self.results)]

    def of(self, variant: str) -> list[Result]:
        return [result for result in self.results if result.run.variant == variant]

    def values(self, variant: str, branch: str, metric: str, when: str = "last") -> dict[int, float]:
        """Seed -> the metric in percent."""
        return {r.run.seed: r.metrics[when][branch][metric] for r in self.of(variant)}

    def costs(self, variant: str, name: str) -> dict[int, float]:
        """Seed -> a cost, where it is known."""
        return {r.run.seed: value for r in self.of(variant) if (value := r.cost[name]) is not None}

    def summaries(self) -> list[dict[str, Any]]:
        """Mean, spread and interval of each variant, branch and metric; one dict each."""
        return [
            {"variant": name, "branch": branch, "when": when, "metric": metric}
            | asdict(summarise(list(self.values(name, branch, metric, when).values())))
            for name in self.variants()
            for branch in self.of(name)[0].branches
            for when in WHEN
            for metric in METRICS
        ]

    def difference(self, pair: Pair, metric: str, when: str) -> tuple[list[int], Summary | None]:
        """Seeds that both sides have, and what their differences say; None where there are no such seeds."""
        ours = self.values(pair.variant, pair.branch, metric, when)
        theirs = self.values(pair.reference, pair.reference_branch, metric, when)
        differences = paired_differences(ours, theirs)
        return list(differences), summarise(list(differences.values())) if differences else None

    def differences(self) -> list[dict[str, Any]]:
        """Paired differences, one dict for each pair, metric and moment."""
        rows = []
        for pair in self.pairs:
            for when in WHEN:
                for metric in METRICS:
                    seeds, summary = self.difference(pair, metric, when)
                    if summary is not None:
                        rows.append({**asdict(pair), "when": when, "metric": metric, "seeds": seeds, **asdict(summary)})
        return rows


def collect(study: Study, allow_mixed: bool = False) -> Findings:
    """Reads the finished runs of a study.

    Raises:
        UserError: there are none; a folder's results are not its variant's; or code or data differ between them.
    """
    runs = study.stored_runs()
    results = [read_result(run) for run in runs if is_finished(run)]
    if not results:
        raise UserError(f"{study.out}: no run of this study is finished yet, so there is nothing to report.")
    notes = []
    stamps = [(result.run.name, start) for result in results for start in result.provenance["starts"]]
    if found := conflicts(stamps):
        if not allow_mixed:
            raise UserError("\n  ".join([MIXED, *found]) + f"\n{HOW_TO_MIX}")
        notes.append("MIXED RESULTS, THE DIFFERENCES BELOW MAY COME FROM THIS: " + "; ".join(found))
    notes += _notes(study, results, stamps)
    return Findings(study, results, notes, _pairs(study, results))


def read_result(run: Run) -> Result:
    """Reads a finished run; `is_finished` has checked that the folder is the run's."""
    lines = [line for line in read_metrics(run.folder / METRICS_LOG) if line["kind"] == "train"]
    metrics = read_json(run.folder / METRICS_FILE)
    return Result(
        run,
        {when: metrics[when] for when in WHEN},
        read_run(run.folder),
        costs({line["step"]: line for line in lines}, run.cfg.SOLVER.IMS_PER_BATCH),
        read_provenance(run.folder),
    )


def costs(lines: dict[int, dict[str, Any]], batch: int) -> dict[str, float | None]:
    """Time, rate and memory from the train lines of metrics.jsonl.

    Args:
        lines: global step -> the line written after it; its rate is that of the steps since the line before.
        batch: samples a step.
    """
    steps = sorted(step for step, line in lines.items() if line.get("samples_per_second"))
    samples = [batch * (step - before) for before, step in zip([0, *steps], steps, strict=False)]
    seconds = sum(n / lines[step]["samples_per_second"] for n, step in zip(samples, steps, strict=True))
    memory = [line["peak_memory_gib"] for line in lines.values() if line.get("peak_memory_gib") is not None]
    return {
        "train_seconds": seconds if steps else None,
        "samples_per_second": sum(samples) / seconds if steps else None,
        "peak_memory_gib": max(memory, default=None),
    }


def _pairs(study: Study, results: Sequence[Result]) -> list[Pair]:
    """Every branch of every variant against the base, then the pairs of the study's `compare`."""
    of = {result.run.variant: result for result in results}
    sides = [(name, study.base) for name in of if name != study.base] + list(study.compare)
    pairs = []
    for ours, theirs in sides:
        variant, _, branch = ours.partition("/")
        reference, _, reference_branch = theirs.partition("/")
        if variant not in of or reference not in of:
            continue
        for name, result in ((branch, of[variant]), (reference_branch, of[reference])):
            if name and name not in result.branches:
                raise UserError(
                    f"compare [{ours}, {theirs}]: {result.run.variant} has no branch {name!r}, only "
                    f"{', '.join(result.branches)}"
                )
        for b in [branch] if branch else of[variant].branches:
            same = b if b in of[reference].branches else of[reference].whole
            pairs.append(Pair(variant, b, reference, reference_branch or same))
    return list(dict.fromkeys(pairs))


def _notes(study: Study, results: Sequence[Result], stamps: Sequence[tuple[str, dict]]) -> list[str]:
    notes = []
    done = {(result.run.variant, result.run.seed) for result in results}
    if missing := [f"{v}/seed_{s}" for s in study.seeds for v in study.variants if (v, s) not in done]:
        notes.append(f"{len(missing)} runs are not finished: {', '.join(missing)}.")
    if dirty := sorted({name for name, start in stamps if start["dirty"]}):
        notes.append(f"Not of a clean commit: the working tree had changes in {len(dirty)} runs.")
    if unknown := sorted({name for name, start in stamps if start["commit"] == "unknown"}):
        notes.append(f"The commit of {len(unknown)} runs is not known: they were made outside of a git clone.")
    for what in ("torch", "device"):
        if len(found := sorted({str(start[what]) for _, start in stamps})) > 1:
            notes.append(
                f"Runs differ in {what}: {', '.join(found)}. Their times do not compare, figures may round apart."
            )
    if any(start.get("jobs", 1) > 1 for _, start in stamps):
        notes.append("Some runs were made several at a time: their times are not those of a run alone.")
    for a, b in combinations(results, 2):
        if a.run.seed == b.run.seed and a.metrics == b.metrics and a.curves == b.curves:
            notes.append(
                f"{a.run.name} and {b.run.name} gave the very same figures from different configs: what differs "
                "between them had no effect at all."
            )
    return notes
