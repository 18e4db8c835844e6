"""What a run tells: lines for people (console and train.log) and numbers for tools (TensorBoard and metrics.jsonl)."""

import errno
import json
import logging
import logging.handlers
import math
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from utils.distributed import is_main, rank
from utils.errors import UserError

logger = logging.getLogger(__name__)

OWN_LOGGERS = ("__main__", "configs", "data", "engine", "modeling", "solver", "test_net", "tools", "utils")


def setup_logging(output_dir: str | Path | None = None, level: int = logging.INFO) -> None:
    """Send this project's log to the console and, given a folder, to its train.log, which is appended to.

    What is told after a call without a folder is kept, and stands in the train.log of the call with one that follows.
    Libraries are quiet: their warnings go to the file only, the console shows their errors. Of several ranks, the main
    one logs; the others show their warnings on the console. Calling this again replaces what an earlier call set up.

    Raises:
        UserError: the folder cannot be written.
    """
    root = logging.getLogger()
    kept: list[logging.LogRecord] = []
    for handler in [h for h in root.handlers if isinstance(h, (_ConsoleHandler, _KeepingHandler, _LogFileHandler))]:
        if isinstance(handler, _KeepingHandler):
            kept += handler.buffer
        root.removeHandler(handler)
        handler.close()
    logging.captureWarnings(True)
    root.setLevel(logging.WARNING)
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(level if is_main() else logging.WARNING)
    if not is_main():
        logging.getLogger("configs").setLevel(logging.ERROR)  # all ranks read the same file

    console = _ConsoleHandler()
    who = "" if is_main() else f"rank {rank()} "
    console.setFormatter(logging.Formatter(f"%(asctime)s {who}%(levelname)s: %(message)s", datefmt="%H:%M:%S"))
    console.addFilter(lambda record: record.levelno >= logging.ERROR or record.name.split(".")[0] in OWN_LOGGERS)
    root.addHandler(console)
    if output_dir is None:
        root.addHandler(_KeepingHandler())
    elif is_main():
        path = Path(output_dir) / "train.log"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = _LogFileHandler(path, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error}. Choose another OUTPUT_DIR.") from error
        file.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
        root.addHandler(file)
        for record in kept:
            file.handle(record)


class _ConsoleHandler(logging.Handler):
    """Writes above a tqdm bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except Exception:
            self.handleError(record)


class _KeepingHandler(logging.handlers.BufferingHandler):
    """Keeps the first records, as many as a run may make before it has a folder."""

    def __init__(self) -> None:
        super().__init__(capacity=1000)

    def emit(self, record: logging.LogRecord) -> None:
        if len(self.buffer) < self.capacity:
            self.buffer.append(record)


class _LogFileHandler(logging.FileHandler):
    """Complains once about a full disk, not once a line."""

    complained = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.complained:
            self.complained = True
            super().handleError(record)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; half a line at its end, which a killed run may leave, is passed over.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}. Give a file that train_net.py wrote.") from error


class MetricsWriter:
    """Numbers and pictures of a run: TensorBoard events in `<output_dir>/tensorboard`, lines in `metrics.jsonl`.

    A line is one JSON object: kind, step, epoch and the values, each a number or null (not finite). A resumed run
    appends; where it repeats steps, the later line counts. What cannot be written is told once and never stops the run;
    lines that found no room are written with the next one that does. Of several ranks, the main one writes.

    Pictures, and what is given to `later`, are written by a thread, in their order; `close` waits for it, and so does
    the end of the process.

    Args:
        output_dir: the folder of the run.
        resume_step: first step of a resumed run; TensorBoard hides what an interrupted run wrote from there on.
    """

    def __init__(self, output_dir: str | Path, resume_step: int | None = None) -> None:
        self.path = Path(output_dir) / "metrics.jsonl"
        self.board: Any = None
        self._complained: set[str] = set()
        self._unwritten = b""
        self._writes = is_main()
        self._thread = ThreadPoolExecutor(1, "writer")
        self._excepthook = threading.excepthook
        self.attempt(str(self.path), self._open_lines)
        self.attempt("TensorBoard", self._open_board, Path(output_dir) / "tensorboard", resume_step)

    def scalars(self, step: int, epoch: float, values: dict[str, Any], kind: str = "train") -> None:
        """Write named numbers (floats, ints, one-element tensors) of one moment; TensorBoard gets `<kind>/<name>`."""
        numbers = {name: float(value) for name, value in values.items()}
        line = {"kind": kind, "step": step, "epoch": epoch}
        line |= {name: number if math.isfinite(number) else None for name, number in numbers.items()}
        self.attempt(str(self.path), self._append, json.dumps(line, allow_nan=False) + "\n")
        for name, number in numbers.items():
            self._on_board("add_scalar", f"{kind}/{name}", number, step)

    def image(self, tag: str, picture: torch.Tensor, step: int, epoch: int) -> None:
        """Show a uint8 picture (3, H, W) in TensorBoard, and keep it as `pictures/<tag>_epoch_<n>.png`; does not wait.

        The picture must stay as it is until it is written.
        """
        path = self.path.parent / "pictures" / f"{tag}_epoch_{epoch:03d}.png"
        self._thread.submit(self._write_picture, tag, picture, step, path)

    def later(self, what: str, call: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """`attempt` by the thread. A file that is made anew would wait for the disk, for 0.3 s and more, while a
        checkpoint is on its way there; a line that is added does not."""
        self._thread.submit(self.attempt, what, call, *args, **kwargs)

    def close(self) -> None:
        """Waits until all is written."""
        self._thread.shutdown()
        if self._unwritten:
            self.attempt(str(self.path), self._append, "")
        self._on_board("close")
        self.board = None
        threading.excepthook = self._excepthook

    def _open_lines(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not (lines := self.path.read_bytes()).endswith(b"\n"):
            self.path.write_bytes(lines[: lines.rfind(b"\n") + 1])  # a killed run may leave half a line

    def _append(self, text: str) -> None:
        self._unwritten += text.encode()
        with open(self.path, "ab", buffering=0) as file:
            before = file.tell()
            if file.write(self._unwritten) < len(self._unwritten):  # a disk that has room for a part of it
                file.truncate(before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._unwritten = b""

    def _write_picture(self, tag: str, picture: torch.Tensor, step: int, path: Path) -> None:
        self._on_board("add_image", tag, picture, step)
        self.attempt(str(path.parent), self._save_picture, picture, path)

    def _save_picture(self, picture: torch.Tensor, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)

    def _open_board(self, folder: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only training needs it

        threading.excepthook = self._thread_failed
        self.board = SummaryWriter(folder, purge_step=resume_step, flush_secs=30)

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread keeps its error for the next call, which tells it; other threads show theirs."""
        if not type(failure.thread).__module__.startswith("tensorboard."):
            self._excepthook(failure)

    def _on_board(self, method: str, *args: Any) -> None:
        board = self.board  # the other thread may give it up
        if board is not None and not self.attempt("TensorBoard", getattr(board, method), *args):
            self.board = None

    def attempt(self, what: str, call: Callable[..., None], *args: Any, **kwargs: Any) -> bool:
        """Writes something by a call, and whether that worked; a failure is told, once until it works again."""
        if not self._writes:
            return False
        try:
            call(*args, **kwargs)
            self._complained.discard(what)
        except Exception as error:
            if what not in self._complained:
                self._complained.add(what)
                logger.warning("%s cannot be written (%s: %s); the run goes on", what, type(error).__name__, error)
            return False
        return True
