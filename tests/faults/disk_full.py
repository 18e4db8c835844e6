"""Fills the disk under a small training run, or makes it read-only, on a real tmpfs; needs the right to mount (root).

A disk that has room again before the next checkpoint costs nothing: the run ends as the one that was never disturbed.
One that stays full, or read-only, stops the run with the reason and exit code 2; the checkpoint before is whole,
nothing half written lies about, and the run that goes on once there is room ends as the undisturbed one. Prints a table
and ends with exit code 1 if any of this fails, 77 where nothing may be mounted.

python tests/faults/disk_full.py
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from sigkill import OPTS, TINY, difference, resume_opts, write_rgbnt201  # noqa: E402

import train_net  # noqa: E402
from engine import background  # noqa: E402
from utils.checkpoint import read_file  # noqa: E402
from utils.cli import run  # noqa: E402

SKIPPED = 77


def command(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A tmpfs of 256 MiB."""
    folder.mkdir()
    command("mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", folder)
    try:
        yield folder
    finally:
        command("umount", "--recursive", folder)


def fill(disk: Path) -> None:
    """Takes the last byte."""
    with open(disk / "ballast", "ab", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def train(config: Path, out: Path, log: Path, before_write: Callable[[int], None] = lambda number: None) -> int:
    """Exit code of a run, or of one that goes on, in a fork; calls a function before each writing of a checkpoint."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with open(log, "a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            number, write = 0, background._write

            def told(*args):
                nonlocal number
                number += 1
                before_write(number)
                write(*args)

            background._write = told
            code = run(lambda: train_net.main(str(config), [*OPTS, "OUTPUT_DIR", str(out), *resume_opts(out)]))
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def full_for_a_while(config: Path, whole: Path, disk: Path) -> str:
    """Full from the second checkpoint until the next one."""

    def disturb(number: int) -> None:
        if number == 2:
            fill(disk)
        elif number == 3:
            (disk / "ballast").unlink()

    code = train(config, disk / "run", log := disk.with_suffix(".log"), disturb)
    told = "No space left on device" in log.read_text() and "Training goes on" in log.read_text()
    return f"exit code {code}" if code else "nothing was told" * (not told) or difference(whole, disk / "run")


def full_for_good(config: Path, whole: Path, disk: Path) -> str:
    def disturb(number: int) -> None:
        if number == 2:
            fill(disk)

    code = train(config, disk / "run", log := disk.with_suffix(".log"), disturb)
    (disk / "ballast").unlink()
    return stopped(code, "No space left on device", log, disk / "run") or goes_on(config, whole, disk / "run", log)


def read_only(config: Path, whole: Path, disk: Path) -> str:
    """Read-only from the second checkpoint on; the files that are open stay so."""
    out = disk / "run"

    def disturb(number: int) -> None:
        if number == 2:
            command("mount", "--bind", out, out)
            command("mount", "-o", "remount,bind,ro", out)

    code = train(config, out, log := disk.with_suffix(".log"), disturb)
    fault = stopped(code, "Read-only file system", log, out)
    command("umount", out)
    return fault or goes_on(config, whole, out, log)


def read_only_at_the_start(config: Path, whole: Path, disk: Path) -> str:
    command("mount", "-o", "remount,ro", disk)
    code = train(config, disk / "run", log := disk.with_suffix(".log"))
    text = log.read_text()
    return "" if code == 2 and "OUTPUT_DIR" in text and "Name another folder" in text else f"exit code {code}"


def stopped(code: int, reason: str, log: Path, out: Path) -> str:
    """What is wrong with a run that had to stop after its first checkpoint."""
    if (
        code != 2
        or f"error: {out / 'last.pth'}: cannot be written" not in (text := log.read_text())
        or reason not in text
    ):
        return f"exit code {code}, see the reason in {log}"
    if read_file(out / "last.pth")["epoch"] != 1:
        return "last.pth is not that of the first epoch"
    return "half files" if list(out.glob(".*.tmp")) else ""


def goes_on(config: Path, whole: Path, out: Path, log: Path) -> str:
    code = train(config, out, log)
    return f"exit code {code} of the run that went on" if code else difference(whole, out)


def main() -> int:
    torch.set_num_threads(1)
    faults = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            with small_disk(folder / "try"):
                pass
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"skipped: nothing can be mounted here ({error})")
            return SKIPPED
        root = write_rgbnt201(folder / "data")
        config = folder / "tiny.yml"
        config.write_text(f"{TINY}DATASETS: {{NAMES: RGBNT201, ROOT_DIR: {root}}}\n")
        if code := train(config, folder / "whole", folder / "whole.log"):
            print(f"the undisturbed run ended with {code}\n{(folder / 'whole.log').read_text()}")
            return 1
        for case in (full_for_a_while, full_for_good, read_only, read_only_at_the_start):
            with small_disk(folder / case.__name__) as disk:
                fault = case(config, folder / "whole", disk)
            print(
                f"{case.__name__.replace('_', ' '):<24}  {'failed: ' + fault if fault else 'as it should be'}",
                flush=True,
            )
            if fault:
                print((folder / f"{case.__name__}.log").read_text())
            faults += bool(fault)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
