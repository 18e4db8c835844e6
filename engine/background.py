"""Checkpoints written in the background: the training loop waits for a snapshot, not for the disk."""

import copy
import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.checkpoint import save_file
from utils.errors import UserError
from utils.files import save_copy

log = logging.getLogger(__name__)


class CheckpointWriter:
    """Context manager that writes checkpoints in one thread, one at a time; on leaving it, all of them are written.

    A snapshot goes into host memory that is used again and again. From a GPU it is copied in the order of the device's
    stream, so that the host does not wait for it either.

    A write that fails (a full disk, say) is told at once and tried again before the next one, or at the end; training
    goes on meanwhile. If it fails again, the run stops with the reason: nothing that was to be kept is passed over.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._write: Callable[[], None] = lambda: None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None:
            self.finish()
        elif not issubclass(kind, KeyboardInterrupt):  # that is a second signal, which ends at once
            try:
                self.finish()
            except Exception as error:
                log.error("%s", error)

    @property
    def busy(self) -> bool:
        """Whether a write is under way, for which the next call of `save` would wait."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, state: dict[str, Any], path: Path, *also: Path, surplus: Sequence[Path] = ()) -> None:
        """Takes a snapshot and has it written to `path`, then under the names `also`; afterwards `surplus` is removed.

        Waits for the write before it.

        Raises:
            UserError: that one failed for the second time.
        """
        self.finish()
        buffers, self._buffers = self._buffers, {}
        snapshot = self._snapshot(state, "", buffers)
        devices = {device for device in (t.device for t in _tensors(state)) if device.type == "cuda"}
        copied = [torch.cuda.current_stream(device).record_event() for device in devices]
        self._write = partial(_write, copied, snapshot, path, also, surplus)
        self._thread = threading.Thread(target=self._attempt, name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Waits until all is written; what failed is tried once more.

        Raises:
            UserError: it failed again.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if isinstance(error, UserError):
            log.warning("Trying the checkpoint again that could not be written.")
            self._write()
        elif error is not None:
            raise error

    def _attempt(self) -> None:
        try:
            self._write()
        except Exception as error:
            self._error = error
            log.error("%s Training goes on; this checkpoint is tried once more before the next one.", error)

    def _snapshot(self, value: Any, name: str, old: dict[str, Tensor]) -> Any:
        """A copy of a nested state on the CPU, in the buffers `old` where they fit."""
        if isinstance(value, Tensor):
            buffer = old.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
                buffer = torch.empty_like(value, device="cpu", requires_grad=False, pin_memory=value.is_cuda)
            self._buffers[name] = buffer
            return buffer.copy_(value.detach(), non_blocking=value.is_cuda)
        if isinstance(value, dict):
            result = copy.copy(value)  # keeps the class, and the attributes of a module's state dict
            result.update((key, self._snapshot(child, f"{name}/{key}", old)) for key, child in value.items())
            return result
        if isinstance(value, (list, tuple)):
            return type(value)(self._snapshot(child, f"{name}/{i}", old) for i, child in enumerate(value))
        return value


def _tensors(value: Any) -> list[Tensor]:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [value] if isinstance(value, Tensor) else [tensor for child in children for tensor in _tensors(child)]


def _write(
    copied: list[torch.cuda.Event], state: dict[str, Any], path: Path, also: Sequence[Path], surplus: Sequence[Path]
) -> None:
    for event in copied:
        event.synchronize()
    save_file(state, path)
    for other in also:
        save_copy(path, other)
    for old in surplus:
        try:
            old.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s: an old checkpoint that could not be removed: %s", old, error)
