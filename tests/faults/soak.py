"""Trains a small model for thousands of steps, with evaluations and checkpoints, and watches memory and file handles.

After every epoch it reads the resident memory, the number of open files, of threads and of tensors that are alive. The
slope is the median of the slopes between all pairs of readings after the warm-up (Theil 1950, Sen 1968), which one
jump of the allocator does not move. Ends with exit code 1 if memory grows by more than `LIMIT` or a handle is left.

python tests/faults/soak.py --steps 2000
"""

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import torch  # noqa: E402
from conftest import TINY, write_rgbnt201  # noqa: E402

import train_net  # noqa: E402
from engine import processor  # noqa: E402
from utils.cli import run  # noqa: E402

LIMIT = 2.0
"""KiB a step: 4 MiB in 2,000 steps, a tenth of the model with its optimizer."""
WARM_UP = 0.25
"""Share of the readings that is left out."""


@dataclass(frozen=True)
class Reading:
    """What the process holds after so many steps."""

    step: int
    memory: int
    """Resident, in KiB."""
    files: int
    threads: int
    tensors: int


def read(step: int) -> Reading:
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    tensors = sum(issubclass(type(value), torch.Tensor) for value in gc.get_objects())
    memory, threads = (int(status[key].split()[0]) for key in ("VmRSS", "Threads"))
    return Reading(step, memory, len(os.listdir("/proc/self/fd")), threads, tensors)


def slope(readings: list[Reading]) -> float:
    """KiB a step: the median over all pairs of readings."""
    return statistics.median((b.memory - a.memory) / (b.step - a.step) for a, b in combinations(readings, 2))


def soak(steps: int, folder: Path) -> list[Reading]:
    """Trains for at least so many steps in this process; a reading after each evaluation.

    Raises:
        RuntimeError: the run failed.
    """
    readings: list[Reading] = []
    record = processor._record_evaluation

    def told(result, writer, epoch, global_step):
        record(result, writer, epoch, global_step)
        readings.append(read(global_step))

    root = write_rgbnt201(folder / "data", identities=20, frames=4)
    config = folder / "tiny.yml"
    config.write_text(f"{TINY}DATASETS: {{NAMES: RGBNT201, ROOT_DIR: {root}}}\nOUTPUT_DIR: {folder / 'run'}\n")
    epochs = -(-steps // 9)  # an epoch has 9 or 10 steps
    opts = ["SOLVER.MAX_EPOCHS", str(epochs), "SOLVER.CHECKPOINT_PERIOD", "5", "SOLVER.KEEP_CHECKPOINTS", "2"]
    processor._record_evaluation = told
    try:
        if code := run(lambda: train_net.main(str(config), [*opts, "SOLVER.EMA_DECAY", "0.9"]), debug=True):
            raise RuntimeError(f"exit code {code}")
    finally:
        processor._record_evaluation = record
    return readings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    out = os.dup(1)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 1)
        try:
            readings = soak(args.steps, Path(folder))
        finally:
            os.dup2(out, 1)
    settled = readings[int(len(readings) * WARM_UP) :]
    first, last, kib = settled[0], settled[-1], slope(settled)
    print(f"{last.step} steps with {len(readings)} evaluations, {time.perf_counter() - begin:.0f} s")
    print(f"memory {kib:+.2f} KiB/step after step {first.step} ({first.memory >> 10} to {last.memory >> 10} MiB)")
    for name in ("files", "threads", "tensors"):
        print(f"{name:<8} {getattr(first, name):5} then, {getattr(last, name):5} at the end")
    return int(kib > LIMIT or last.files > first.files or last.tensors > first.tensors)


if __name__ == "__main__":
    sys.exit(main())
