"""Runs a study: one process a run, several at a time, each in its own folder; goes on where it was stopped."""

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml
from tqdm import tqdm

from engine.interrupt import StopRequest
from engine.output import CONFIG_FILE, LAST, METRICS_FILE, METRICS_LOG
from tools.ablate.provenance import (
    FILE,
    config_digest,
    conflicts,
    device_of,
    read_provenance,
    results_digest,
    stamp,
    write_provenance,
)
from tools.ablate.study import Run, Step, Study, compared, resolve
from utils.errors import Interrupted, UserError
from utils.files import read_json

log = logging.getLogger(__name__)

PROCESS_LOG = "process.log"
LOCK = ".lock"
POLL = 0.2
"""Seconds between two looks at the processes."""
TAIL = 12
"""Lines of a failed run's log that are told."""
STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)
"""Exit codes of a run that was asked to stop: it saved, or had not begun."""
MIXED = "The study would mix results of different code or data:"
HOW_TO_MIX = (
    "Results of different code or data say nothing about the variants. Bring back what they were made with, or move "
    "the study's folder away and run all of it again; --allow-mixed takes them together, and the report says so."
)


@dataclass
class Job:
    """A process at work on a run."""

    run: Run
    process: subprocess.Popen
    provenance: dict[str, Any]
    began: float = field(default_factory=time.monotonic)


def is_finished(run: Run) -> bool:
    """Whether the run's folder holds all its results, made by exactly its config.

    Raises:
        UserError: the folder holds something else: results of another config, or none that this study made.
    """
    folder, provenance = run.folder, read_provenance(run.folder)
    move = f"Move {folder} away, or give the study another 'out'."
    if "results" not in provenance and not any(folder.glob("*.pth")):
        return False  # not begun, or failed before there was anything to go on from
    if not provenance:
        raise UserError(f"{folder}: holds a run that this study did not start ({FILE} is missing). {move}")
    if not (folder / CONFIG_FILE).exists():
        raise UserError(f"{folder}: {CONFIG_FILE} is missing, so nothing says what made its results. {move}")
    stored = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if config_digest(stored) != provenance["starts"][-1]["config"]:
        raise UserError(f"{folder}: {CONFIG_FILE} is not the config that {FILE} tells of. {move}")
    if changed := compared(run.cfg, resolve(folder / CONFIG_FILE)):
        raise UserError(
            f"{folder} was not made by variant {run.variant!r} as the study now has it (study and folder): "
            f"{'; '.join(changed)}. {move}"
        )
    metrics = read_json(folder / METRICS_FILE)
    if "results" not in provenance:
        return False
    if results_digest(metrics) != provenance["results"]:
        raise UserError(f"{folder}: {METRICS_FILE} is not what the run wrote into it. {move}")
    return True


def prepare(study: Study) -> None:
    """Makes what the runs need and is not there yet.

    Raises:
        UserError: a command failed, or did not make what it should.
        Interrupted: SIGINT or SIGTERM, which the command received too.
    """
    for number, step in enumerate(study.prepare, 1):
        if step.makes.exists():
            continue
        path = study.out / "prepare" / f"step_{number}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        for command in _commands(step):
            log.info("preparing %s: %s (log: %s)", step.makes, " ".join(command), path)
            with open(path, "a", encoding="utf-8") as file, StopRequest() as stop:
                process = _start(command, file, os.environ.copy())
                _wait_for(process, stop)
            if stop.requested is not None:
                raise Interrupted("Stopped while preparing; the same command goes on.", stop.requested)
            if process.returncode != 0:
                raise UserError(f"{' '.join(command)} ended with code {process.returncode}; {path}:\n{tail(path)}")
        if not step.makes.exists():
            raise UserError(f"prepare: {step.makes} is still missing after its commands; {path}:\n{tail(path)}")


def run_study(
    study: Study,
    runs: Sequence[Run],
    *,
    jobs: int = 1,
    gpus: Sequence[str] = (),
    allow_mixed: bool = False,
) -> dict[str, str]:
    """Runs what is not finished, `jobs` processes at a time; a run that fails does not stop the others.

    Args:
        gpus: values of CUDA_VISIBLE_DEVICES, one a process, the least busy first; empty leaves it as it is.
        allow_mixed: go on although code or data changed.

    Returns:
        Name of each failed run -> why.

    Raises:
        UserError: a folder holds another run, or code or data changed while the study ran.
        Interrupted: SIGINT or SIGTERM; the runs have saved their state.
    """
    waiting = deque(run for run in runs if not is_finished(run))
    log.info("%d runs, %d of them finished; %d at a time", len(runs), len(runs) - len(waiting), jobs)
    stamps = stored_stamps(study)
    active: list[Job] = []
    failures: dict[str, str] = {}
    halted = ""
    bar = tqdm(total=sum(run.cfg.SOLVER.MAX_EPOCHS for run in waiting), unit="epoch", disable=None)
    done_epochs, passed_on = 0, False
    with StopRequest() as stop:
        try:
            while active or (waiting and not halted and stop.requested is None):
                while waiting and len(active) < jobs and not halted and stop.requested is None:
                    run = waiting.popleft()
                    try:
                        now = stamp(run.cfg)
                        if halted := _mixes([*stamps, (f"now {run.name}", now)], allow_mixed):
                            break
                        gpu = _least_busy(gpus, active)
                        active.append(_launch(study, run, now | {"gpu": gpu, "jobs": jobs, "seconds": None}))
                        stamps.append((run.name, now))
                    except UserError as error:
                        _note_failure(failures, run, str(error))
                for job in [job for job in active if job.process.poll() is not None]:
                    active.remove(job)
                    done_epochs += job.run.cfg.SOLVER.MAX_EPOCHS
                    problem = _finish(study, job, stopped=stop.requested is not None)
                    if problem:
                        _note_failure(failures, job.run, problem)
                if stop.requested is not None and not passed_on:
                    passed_on = True
                    for job in active:
                        job.process.send_signal(signal.SIGTERM)
                bar.n = done_epochs + sum(_epochs_of(job.run) for job in active)
                bar.set_postfix_str(_status(active, waiting, failures))
                if active:
                    time.sleep(POLL)
        finally:
            for job in active:  # only after an error or a second signal
                job.process.terminate()
            bar.close()
    if stop.requested is not None:
        raise Interrupted("Stopped; the runs have saved their state. The same command goes on.", stop.requested)
    if halted:
        raise UserError(halted)
    return failures


def tail(path: Path, lines: int = TAIL) -> str:
    """The last lines of a log; of a progress bar's line what stood there last."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return str(error)
    shown = [line.rpartition("\r")[2] for line in text.rstrip().split("\n")]
    return "\n".join(f"    {line}" for line in shown[-lines:])


def stored_stamps(study: Study) -> list[tuple[str, dict[str, Any]]]:
    """(run, stamp) of every start that is part of a stored result, or of a run that can go on."""
    stamps = []
    for variant, seed, folder in study.folders():
        provenance = read_provenance(folder)
        if "results" in provenance or (folder / LAST).exists():
            stamps += [(f"{variant}/seed_{seed}", start) for start in provenance.get("starts", [])]
    return stamps


def _mixes(stamps: Sequence[tuple[str, dict[str, Any]]], allow_mixed: bool) -> str:
    """Why the last of these must not start: what could not be put into one report; empty where it may."""
    found = conflicts(stamps)
    if found and allow_mixed:
        log.warning("mixed: %s", "; ".join(found))
    return "" if allow_mixed or not found else "\n  ".join([MIXED, *found]) + f"\n{HOW_TO_MIX}"


def _launch(study: Study, run: Run, now: dict[str, Any]) -> Job:
    """Starts the process of a run; what it is made of, `now`, is written down first.

    Raises:
        UserError: another process works in the run's folder.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    lock = open(run.folder / LOCK, "w")  # noqa: SIM115  its process inherits it and holds it as long as it lives
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise UserError(f"another process is at work in {run.folder}") from error
    with lock:
        goes_on = (run.folder / LAST).exists()
        starts = read_provenance(run.folder).get("starts", []) if goes_on else []
        provenance = {"variant": run.variant, "seed": run.seed, "starts": [*starts, now]}
        write_provenance(run.folder, provenance)
        command = [*_python(study.command), "--config_file", study.config, *run.opts]
        command += ["TEST.WEIGHT", str(run.folder / LAST)] if goes_on else []
        environment = os.environ.copy()
        if now["gpu"] is not None:
            environment["CUDA_VISIBLE_DEVICES"] = now["gpu"]
        if now["jobs"] > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // now["jobs"])))
        with open(run.folder / PROCESS_LOG, "a", encoding="utf-8") as file:
            process = _start(command, file, environment, keep=lock)
    where = f" on GPU {now['gpu']}" if now["gpu"] is not None else ""
    log.info("%s %s%s", "going on with" if goes_on else "starting", run.name, where)
    return Job(run, process, provenance)


def _finish(study: Study, job: Job, stopped: bool) -> str:
    """Notes the end of a process; returns what went wrong, empty where nothing did."""
    run, code, start = job.run, job.process.returncode, job.provenance["starts"][-1]
    start |= {"seconds": round(time.monotonic() - job.began, 1), "device": device_of(run.folder)}
    metrics, problem = read_json(run.folder / METRICS_FILE), ""
    if code == 0 and metrics.get("last", {}).get("epoch") == run.cfg.SOLVER.MAX_EPOCHS and "best" in metrics:
        job.provenance["results"] = results_digest(metrics)
        log.info("%s is finished after %.0f s", run.name, start["seconds"])
    elif code == 0:
        problem = f"ended without results of epoch {run.cfg.SOLVER.MAX_EPOCHS} in {METRICS_FILE}"
    elif not (stopped and code in STOPPED):
        problem = f"ended with code {code}"
    write_provenance(run.folder, job.provenance)
    if problem:
        return f"{problem}; the end of {run.folder / PROCESS_LOG}:\n{tail(run.folder / PROCESS_LOG)}"
    if "results" in job.provenance:
        try:
            is_finished(run)  # its config.yml is what the variant asked for
        except UserError as error:
            return str(error)
        if not study.checkpoints:
            for path in run.folder.glob("*.pth"):
                path.unlink()
    return ""


def _note_failure(failures: dict[str, str], run: Run, problem: str) -> None:
    failures[run.name] = problem
    log.error("%s failed: %s", run.name, problem)


def _commands(step: Step) -> list[list[str]]:
    """The commands of a step, the first one going on from the step's checkpoint where there is one."""
    commands = [_python(words) for words in step.run]
    if step.resume is not None and step.resume.exists():
        commands[0] += ["TEST.WEIGHT", str(step.resume)]
    return commands


def _python(words: Sequence[str]) -> list[str]:
    """`python` means the interpreter that runs this."""
    return [sys.executable, *words[1:]] if words[0] == "python" else list(words)


def _start(command: Sequence[str], file: IO, environment: dict[str, str], keep: IO | None = None) -> subprocess.Popen:
    """A process in a session of its own: a Ctrl-C reaches it through this one, and once."""
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            pass_fds=(keep.fileno(),) if keep else (),
        )
    except OSError as error:
        raise UserError(f"{' '.join(command)}: cannot be started: {error}") from error


def _wait_for(process: subprocess.Popen, stop: StopRequest) -> None:
    """Until the process has ended; a stop reaches all that it started."""
    try:
        while process.poll() is None:
            if stop.requested is not None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
            time.sleep(POLL)
    finally:
        if process.poll() is None:  # a second signal
            os.killpg(process.pid, signal.SIGTERM)


def _least_busy(gpus: Sequence[str], active: Sequence[Job]) -> str | None:
    busy = Counter(job.provenance["starts"][-1]["gpu"] for job in active)
    return min(gpus, key=lambda gpu: busy[gpu]) if gpus else None


def _epochs_of(run: Run) -> int:
    """Finished epochs, as the last whole line of the run's metrics tells them."""
    try:
        with open(run.folder / METRICS_LOG, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            last = json.loads(file.read().splitlines()[-1])
        return last["epoch"] - (last["kind"] in ("train", "probe"))
    except (OSError, ValueError, IndexError, KeyError):
        return 0


def _status(active: Sequence[Job], waiting: Sequence[Run], failures: dict[str, str]) -> str:
    running = ", ".join(f"{job.run.name} {_epochs_of(job.run)}/{job.run.cfg.SOLVER.MAX_EPOCHS}" for job in active)
    return f"{running or 'nothing'}; {len(waiting)} waiting" + (f"; {len(failures)} failed" if failures else "")
