"""Runs train_net.py or test_net.py as a person would, in a fork of this process, and watches what it touches.

A fork finds torch imported, so that a run which ends at its first look at the input takes a fraction of a second. An
audit hook of the interpreter tells every file that is opened for writing, moved or removed, and every program started.
"""

import os
import runpy
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
sys.path[:0] = [str(ROOT), str(TESTS)]

import encodings.utf_8_sig  # noqa: E402, F401  # one without rights may not be able to read it

import torch  # noqa: E402
import torch.utils.tensorboard  # noqa: E402  # what a run would import late
from spoil import Spoil  # noqa: E402

import test_net  # noqa: E402, F401
import train_net  # noqa: E402, F401

NOBODY = 65534
LIMIT = 60
"""Seconds after which a run is stuck."""
CHANGES = {"os.mkdir": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.link": 1, "os.symlink": 1}
CHANGES |= {"os.truncate": 0, "os.chmod": 0, "os.chown": 0}
"""Audit events that change a folder -> which argument names what is changed."""
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn")
OWN_PROGRAM = repr("git")
"""A run asks it for the commit of its own code."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
HARMLESS = ("/dev/", "/proc/", "pipe:", "socket:")


BASE = "_BASE_: tiny.yml\n"
TEST, TRAIN = "test_net.py", "train_net.py"
WEIGHT = "TEST.WEIGHT run/last.pth"


@dataclass(frozen=True)
class Case:
    """A bad input: what is bad about it, and what the message must say.

    Args:
        words: parts of the message, in any order.
        opts: KEY VALUE words behind the config file.
        yaml: what stands in the config file besides `_BASE_: tiny.yml`, or all of it where it is bytes.
        spoil: changes the folder of the run before.
        writes: what a run may try to write.
        argv: the whole command line, in place of `--config_file bad.yml OPTS`.
    """

    name: str
    words: tuple[str, ...] = ()
    opts: str = ""
    yaml: str | bytes = ""
    spoil: Spoil = lambda here: None
    script: str = TRAIN
    argv: tuple[str, ...] | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    as_nobody: bool = False
    writes: tuple[str, ...] = ("out", "run")


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code (None if it was stuck), what it said, and what it touched."""

    code: int | None
    seconds: float
    out: str
    err: str
    written: tuple[Path, ...]
    """Files and folders that were written, moved or removed."""
    started: tuple[str, ...]
    """Programs."""


def run_script(
    script: str, words: Sequence[str], folder: Path, env: Mapping[str, str] | None = None, as_nobody: bool = False
) -> Ended:
    """Runs a script of this project in a folder, from its command line on.

    Args:
        script: "train_net.py" or "test_net.py".
        words: of the command line.
        folder: the working directory.
        env: environment variables on top of those of this process.
        as_nobody: gives up the rights of root, where this process has them.
    """
    logs = [folder.with_name(f"{folder.name}.{kind}") for kind in ("out", "err", "audit")]
    begin = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            out, err, audit = (os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666) for path in logs)
            os.dup2(out, 1)
            os.dup2(err, 2)
            sys.stdout, sys.stderr = (open(n, "w", buffering=1, errors="backslashreplace") for n in (1, 2))  # noqa: SIM115
            os.chdir(folder)
            os.environ.update(env or {})
            if as_nobody and os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            torch.set_num_threads(1)
            sys.argv = [script, *words]
            sys.addaudithook(lambda event, args: _audit(audit, event, args))
            try:
                runpy.run_path(str(ROOT / script), run_name="__main__")
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                code = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    status = _wait(pid, begin)
    out, err, audit = (path.read_text(errors="replace") for path in logs)
    touched = [line.partition("\t") for line in audit.splitlines()]
    return Ended(
        code=None if status is None else os.waitstatus_to_exitcode(status),
        seconds=time.perf_counter() - begin,
        out=out,
        err=err,
        written=tuple(dict.fromkeys(Path(what) for event, _, what in touched if event not in PROGRAMS)),
        started=tuple(what for event, _, what in touched if event in PROGRAMS and what != OWN_PROGRAM),
    )


def _wait(pid: int, begin: float) -> int | None:
    while time.perf_counter() - begin < LIMIT:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _audit(descriptor: int, event: str, args: tuple) -> None:
    if event == "open" and isinstance(args[2], int) and args[2] & WRITING:
        what = args[0]
    elif event in CHANGES:
        what = args[CHANGES[event]]
    elif event in PROGRAMS:
        os.write(descriptor, f"{event}\t{args[0]!r}\n".encode(errors="replace"))
        return
    else:
        return
    if isinstance(what, int):  # a descriptor that is open already
        return
    path = os.path.abspath(os.fsdecode(what))
    if not path.startswith(HARMLESS) and "__pycache__" not in path:
        os.write(descriptor, f"{event}\t{path}\n".encode(errors="replace"))
