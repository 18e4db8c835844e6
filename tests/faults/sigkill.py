"""Kills a small training run on the CPU by SIGKILL at random moments, and lets it go on.

After every kill each checkpoint in the folder must load, and the run that goes on must end as the one that was never
killed did: the same weights, moments, random states and metrics in every checkpoint, bit for bit. A third of the
moments lie in the writing of a checkpoint, a third in evaluations, a third anywhere; a part of the runs is killed again
after it went on. Every epoch counts as the best so far, so that each writes all kinds of checkpoints. Prints a table
and ends with exit code 1 if a kill was not survived.

python tests/faults/sigkill.py --kills 50
"""

import argparse
import json
import mmap
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import torch  # noqa: E402
import torch.utils.tensorboard  # noqa: E402  # every run is a fork that finds it imported
from conftest import TINY, write_rgbnt201  # noqa: E402

import train_net  # noqa: E402
from engine import background, processor  # noqa: E402
from engine.guard import FiniteGuard  # noqa: E402
from utils.checkpoint import read_file  # noqa: E402
from utils.cli import run  # noqa: E402
from utils.errors import UserError  # noqa: E402
from utils.logging import read_metrics  # noqa: E402

EPOCHS = 3
OPTS = ["SOLVER.MAX_EPOCHS", str(EPOCHS), "SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.EMA_DECAY", "0.9"]
OPTS += ["MODEL.DROP_PATH", "0.3", "DATASETS.CHECK", "False"]
MAIN = ("start", "step", "evaluation", "end of an epoch")
WRITER = ("", ", checkpoint being written", ", copies being made")
PATIENCE = 300
"""Seconds after which a run is stuck."""


@dataclass
class Kill:
    """One kill: where it hit, what it left, and whether the run ended as it should."""

    seconds: float
    where: str
    found: str
    half_files: int
    fault: str = ""


class Run:
    """A training run in a fork of this process, which tells in shared memory what it is doing."""

    def __init__(self, config: Path, out: Path, *opts: str):
        self.places = mmap.mmap(-1, 2)  # of the main thread, and of the thread that writes
        self.begin = time.perf_counter()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                with open(f"{out}.log", "a") as log:
                    os.dup2(log.fileno(), 1)
                    os.dup2(log.fileno(), 2)
                self._report()
                code = run(lambda: train_net.main(str(config), [*OPTS, "OUTPUT_DIR", str(out), *opts]))
            finally:
                os._exit(code)

    def _report(self) -> None:
        def telling(function: Callable, thread: int, place: int, after: int | None = None) -> Callable:
            def told(*args, **kwargs):
                self.places[thread] = place
                try:
                    return function(*args, **kwargs)
                finally:
                    if after is not None:
                        self.places[thread] = after

            return told

        FiniteGuard.before_forward = telling(FiniteGuard.before_forward, 0, 1)
        processor._score = lambda metrics: metrics["epoch"]
        processor.evaluate = telling(processor.evaluate, 0, 2, after=3)
        background.save_file = telling(background.save_file, 1, 1, after=2)
        background._write = telling(background._write, 1, 1, after=0)

    def wait(self) -> int:
        """Exit code."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def wait_for(self, thread: int, place: int, times: int) -> None:
        """Returns when the run comes to a place for the n-th time, or has ended."""
        inside = False
        while times and time.perf_counter() - self.begin < PATIENCE:
            if inside != (self.places[thread] == place):
                inside = not inside
                times -= inside
            if self._ended():
                return
            time.sleep(0.0002)

    def kill(self) -> str | None:
        """Where it was; None if it had ended."""
        if self._ended():
            self.wait()
            return None
        os.kill(self.pid, signal.SIGKILL)
        self.wait()
        return MAIN[self.places[0]] + WRITER[self.places[1]]

    def _ended(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def resume_opts(out: Path) -> list[str]:
    last = out / "last.pth"
    return ["TEST.WEIGHT", str(last)] if last.exists() else []


def kill_once(config: Path, out: Path, duration: float, kind: int, rng: random.Random) -> Kill | None:
    """Starts the run, or lets it go on, and kills it; None if it was quicker."""
    started = Run(config, out, *resume_opts(out))
    if kind == 0:
        started.wait_for(thread=1, place=1, times=rng.randint(1, EPOCHS))
        time.sleep(rng.uniform(0, 0.04))
    elif kind == 1:
        started.wait_for(thread=0, place=2, times=rng.randint(1, EPOCHS + 1))
        time.sleep(rng.uniform(0, 0.1))
    else:
        time.sleep(rng.uniform(0, duration))
    seconds = time.perf_counter() - started.begin
    where = started.kill()
    if where is None:
        return None
    kill = Kill(seconds, where, "none yet", len(list(out.glob(".*.tmp"))))
    for path in sorted(out.glob("*.pth")):
        try:
            state = read_file(path)
            kill.found = f"epoch {state['epoch']}" if path.name == "last.pth" else kill.found
        except UserError as error:
            kill.fault = str(error)
    return kill


def difference(whole: Path, out: Path) -> str:
    """What differs between what two runs left, in words."""
    names = sorted(p.name for p in whole.glob("*.pth"))
    if (found := sorted(p.name for p in out.glob("*.pth"))) != names:
        return f"checkpoints {found}, expected {names}"
    for name in names:
        a, b = read_file(whole / name), read_file(out / name)
        if places := _unequal({k: v for k, v in a.items() if k != "config"}, b):
            return f"{name}: {places[:3]}"
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in (whole, out))
    if any(one[key] != two.get(key) for key in ("last", "best")):
        return "metrics.json"
    one, two = (
        {
            (line["kind"], line["step"]): line.get("loss")
            for line in read_metrics(folder / "metrics.jsonl")
            if line["kind"] not in ("seconds", "diagnosis")
        }
        for folder in (whole, out)
    )
    one, two = ({at: loss for at, loss in lines.items() if at[0] != "diagnosis"} for lines in (one, two))  # told anew
    if one != two:
        return "metrics.jsonl"
    return "half files" if list(out.glob(".*.tmp")) else ""


def _unequal(a: object, b: object, name: str = "") -> list[str]:
    if isinstance(a, torch.Tensor):
        return [] if isinstance(b, torch.Tensor) and torch.equal(a, b) else [name]
    if isinstance(a, dict):
        return [n for k in a for n in _unequal(a[k], b.get(k), f"{name}/{k}")] if isinstance(b, dict) else [name]
    if isinstance(a, (list, tuple)):
        pairs = zip(a, b, strict=True) if isinstance(b, (list, tuple)) and len(a) == len(b) else None
        return [name] if pairs is None else [n for i, (x, y) in enumerate(pairs) for n in _unequal(x, y, f"{name}/{i}")]
    return [] if a == b else [name]


def survive(kills: int, folder: Path, seed: int = 0, tell: Callable[[str], None] = lambda line: None) -> list[Kill]:
    """Kills runs in a folder until there were `kills`; what went wrong is in each one's `fault`."""
    rng = random.Random(seed)
    root = write_rgbnt201(folder / "data")
    config = folder / "tiny.yml"
    config.write_text(f"{TINY}DATASETS: {{NAMES: RGBNT201, ROOT_DIR: {root}}}\n")
    whole = folder / "whole"
    first = Run(config, whole)
    if code := first.wait():
        raise RuntimeError(f"the run that is not killed ended with {code}: see {whole}.log")
    duration = time.perf_counter() - first.begin
    tell(f"a run takes {duration:.1f} s\n  #  after  {'killed in':<44}  last.pth   half files  survived")
    result: list[Kill] = []
    while len(result) < kills:
        out = folder / f"killed-{len(result)}"
        of_run: list[Kill] = []
        while len(result) + len(of_run) < kills and (not of_run or rng.random() < 0.3):
            kill = kill_once(config, out, duration, (len(result) + len(of_run)) % 3, rng)
            if kill is None:
                break
            of_run.append(kill)
        if not of_run:
            continue
        code = Run(config, out, *resume_opts(out)).wait()
        fault = f"exit code {code}, see {out}.log" if code else difference(whole, out)
        for number, kill in enumerate(of_run, len(result) + 1):
            kill.fault = kill.fault or fault
            row = f"{number:3}  {kill.seconds:4.1f}s  {kill.where:<44}  {kill.found:<9}  {kill.half_files:10}"
            tell(f"{row}  {'no: ' + kill.fault if kill.fault else 'yes'}")
        result += of_run
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        kills = survive(args.kills, Path(folder), args.seed, lambda line: print(line, flush=True))
        survived = sum(not kill.fault for kill in kills)
        print(f"{survived} of {len(kills)} kills survived, {time.perf_counter() - begin:.0f} s")
        writing = sum("checkpoint" in kill.where or "copies" in kill.where for kill in kills)
        halves = sum(kill.half_files > 0 for kill in kills)
        print(f"{writing} while a checkpoint was written, {halves} left half a file")
    return int(survived < len(kills))


if __name__ == "__main__":
    sys.exit(main())
