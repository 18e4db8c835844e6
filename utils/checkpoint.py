"""Checkpoint files: written so that a crash never leaves half a file, read so that a file never runs code."""

import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from safetensors.torch import load_file as load_safetensors
from torch import Tensor, nn

from utils.errors import UserError

BEGIN_AFTER = 2**26
"""Bytes of a checkpoint after which the disk is told to begin with them."""


def save_file(state: dict[str, Any], path: str | Path) -> None:
    """Write `state` to `path` with `torch.save`: aside in the same folder, flushed to the disk, then moved into place.

    Whoever looks at `path`, also after a crash or on a full disk, finds the old file or the new one, both whole.

    Raises:
        UserError: the folder or the disk cannot be written.
        TypeError: `state` holds objects that `read_file` would refuse (NumPy scalars, classes of one's own, ...).
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(aside, "wb") as file:
                torch.save(state, _BegunAtOnce(file))
                file.flush()
                os.fsync(file.fileno())
            refused = torch.serialization.get_unsafe_globals_in_checkpoint(str(aside))
            if refused:
                raise TypeError(f"{path}: not written, reading it back would run code: {', '.join(refused)}")
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch tells a full disk
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: cannot be written: {reason}. Check free space and rights of the folder.") from error


class _BegunAtOnce:
    """A binary file, which the disk begins with while the rest is packed, so that it is not waited for at the end. What
    is on the disk may leave memory, and is read from there next time."""

    def __init__(self, file: BinaryIO):
        self.file, self.begun, self.size = file, 0, 0

    def write(self, data: Any) -> int:
        written = self.file.write(data)
        self.size += written
        if self.size - self.begun >= BEGIN_AFTER and hasattr(os, "posix_fadvise"):
            self.file.flush()
            with suppress(OSError):  # a disk that takes no advice is waited for
                os.posix_fadvise(self.file.fileno(), self.begun, self.size - self.begun, os.POSIX_FADV_DONTNEED)
            self.begun = self.size
        return written

    def flush(self) -> None:
        self.file.flush()


class _Damaged(UserError):
    """A file that was cut short, or never was a checkpoint."""


def read_file(path: str | Path) -> dict[str, Any]:
    """Read a dict from a `.safetensors` file, or from anything that `torch.save` wrote, onto the CPU.

    Raises:
        UserError: there is no such file, it is damaged, it holds something else than a dict, or it needs code to run.
            Beside a damaged one, the newest whole checkpoint of a run is named.
    """
    try:
        return _read(Path(path))
    except _Damaged as error:
        whole = _newest_whole_beside(Path(path))
        advice = f"Take the newest whole one beside it: {whole}" if whole else "Fetch or copy the file again."
        raise UserError(f"{error} {advice}") from error


def _newest_whole_beside(path: Path) -> Path | None:
    """The newest other checkpoint in the folder from which a run can go on."""
    others = [other for other in path.parent.glob("*.pth") if other.is_file() and other.name != path.name]
    for other in sorted(others, key=lambda other: other.stat().st_mtime_ns, reverse=True):
        try:
            if "optimizer" in _read(other):
                return other
        except UserError:
            continue
    return None


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give a checkpoint file in it.{_files_in(path)}")
    if not path.exists():
        raise UserError(f"{path}: there is no such file.{_files_in(path.parent)}")
    try:
        if path.suffix == ".safetensors":
            return load_safetensors(path, device="cpu")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needed = re.search(r"(?:GLOBAL |class ')([\w.]+)", str(error))
        code = needed[1] if needed else _code_in(path)
        if not code:
            raise _damaged(path, "it is no checkpoint") from error
        raise UserError(
            f"{path}: refused, because reading it would run code ({code}). If you trust its origin, save its "
            "state dict anew: torch.save({name: tensor for each weight}, path)."
        ) from error
    except PermissionError as error:
        raise UserError(f"{path}: may not be read: {error}. Check the rights of the file.") from error
    except Exception as error:  # on half a file, the readers fail in any way
        if "TorchScript" in str(error):
            raise UserError(f"{path}: is a program (TorchScript archive); weights alone are needed.") from error
        tells = isinstance(error, (safetensors.SafetensorError, RuntimeError, EOFError, ValueError, OSError))
        raise _damaged(path, (str(error) or type(error).__name__) if tells else "it is no checkpoint") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}; a checkpoint is a dict of names and tensors.")
    return state


def _code_in(path: Path) -> str:
    """What a pickle of protocol 4 or later would call, found without running it; "" where nothing is found.

    torch's reader stops at such a pickle before it comes to names.
    """
    texts: list[str] = []
    names: list[str] = []
    memo: dict[int, str] = {}
    try:
        for opcode, value, _ in pickletools.genops(_pickle_in(path)):
            if opcode.name == "STACK_GLOBAL":
                names.append(".".join(texts[-2:]))
            elif "UNICODE" in opcode.name:
                texts.append(str(value))
            elif opcode.name == "MEMOIZE":
                memo[len(memo)] = texts[-1] if texts else ""
            elif "BINGET" in opcode.name:
                texts.append(memo.get(value or 0, ""))
    except Exception:  # half a pickle, or none
        pass
    harmless = ("torch.", "collections.OrderedDict")
    return next((name for name in names if not name.startswith(harmless)), names[0] if names else "")


def _pickle_in(path: Path, limit: int = 2**24) -> bytes:
    """The beginning of a pickle, alone in its file or packed as torch does."""
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            return file.read(limit)
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        with archive.open(name) as packed:
            return packed.read(limit)


class NotFinite(UserError):
    """A file with a NaN or an infinity in its tensors."""


def refuse_not_finite(tensors: dict[str, Tensor], path: str | Path) -> None:
    """
    Raises:
        NotFinite: a tensor holds a NaN or an infinity; names it.
    """
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise NotFinite(f"{path}: not finite (NaN or infinite) in {len(bad)} tensors: {_first(bad)}. Take another.")


def _damaged(path: Path, reason: str) -> _Damaged:
    size, reason = path.stat().st_size, reason.strip().splitlines()[0]
    return _Damaged(f"{path}: damaged or not a checkpoint ({size} bytes; {reason}).")


def _files_in(folder: Path) -> str:
    names = sorted(p.name for p in folder.glob("*") if p.suffix in {".pth", ".pt", ".safetensors"})
    return f" {folder} holds {', '.join(names)}." if names else ""


@dataclass(frozen=True)
class Mismatch:
    """How the tensors found in a file differ from those wanted; false if they do not."""

    missing: list[str]
    unexpected: list[str]
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """name -> (shape in the file, shape wanted)"""

    @classmethod
    def between(cls, wanted: dict[str, Tensor], found: dict[str, Tensor]) -> "Mismatch":
        return cls(
            missing=[name for name in wanted if name not in found],
            unexpected=[name for name in found if name not in wanted],
            reshaped={
                name: (tuple(found[name].shape), tuple(wanted[name].shape))
                for name in wanted
                if name in found and found[name].shape != wanted[name].shape
            },
        )

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.reshaped)

    def __str__(self) -> str:
        reshaped = [f"{name} {file}, wanted {ours}" for name, (file, ours) in self.reshaped.items()]
        kinds = (
            ("missing in the file", self.missing),
            ("unexpected in the file", self.unexpected),
            ("of another shape", reshaped),
        )
        return "\n".join(f"  {kind} ({len(names)}): {_first(names)}" for kind, names in kinds if names)


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did: the names of the tensors that it filled, and of those that it left as they were."""

    loaded: tuple[str, ...]
    skipped: tuple[str, ...]


def state_dict_in(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint that is a state dict, or that holds one under one of the usual names.

    Raises:
        UserError: it holds no tensors.
    """
    for container in ("model", "state_dict", "model_state_dict", "teacher"):
        if isinstance(checkpoint.get(container), dict):
            return state_dict_in(checkpoint[container], path)
    state = {name: value for name, value in checkpoint.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"{path}: holds no tensors, only {_first(list(checkpoint))}; a state dict is needed.")
    return state


def load_weights(model: nn.Module, path: str | Path, skip: Sequence[str] = ()) -> LoadReport:
    """Fills a model from a checkpoint of this project, or from one whose names the model knows how to translate.

    A model may have two methods to help: `translate_state_dict(state)` renames the tensors of other projects, and
    `explain_mismatch(name, file_shape)` says in words what to set where a shape differs ("" for nothing to say).

    Args:
        model: filled in place, only if all of it fits.
        path: a full checkpoint, or a bare state dict.
        skip: names or parts of names, such as "sdtps", "backbone.cam_embed" or "classifier": tensors that have one
            of them between their dots keep the values they have, whatever the file holds.

    Raises:
        UserError: the file cannot be read, or leaves a tensor unfilled, or holds one that the model has not or has in
            another shape, or one that is not finite; one report names them all.
    """
    state = state_dict_in(read_file(path), path)
    if hasattr(model, "translate_state_dict"):
        state = model.translate_state_dict(state)

    own = model.state_dict()
    wanted = {name: tensor for name, tensor in own.items() if not has_part(name, skip)}
    found = {name: tensor for name, tensor in state.items() if not has_part(name, skip)}
    if mismatch := Mismatch.between(wanted, found):
        lines = [f"{path}: does not fit the model.", str(mismatch)]
        if hasattr(model, "explain_mismatch"):
            depth = mismatch.missing or mismatch.unexpected  # the shapes are then not what is wrong
            hints = (model.explain_mismatch(name, file) for name, (file, _) in mismatch.reshaped.items() if not depth)
            lines += [f"  {hint}" for hint in dict.fromkeys(hints) if hint][:1]
        lines.append(
            "Set the config to what the file was trained with, or name the parts that shall start anew: SOLVER.REINIT "
            "in a config, skip in a call."
        )
        raise UserError("\n".join(lines))
    refuse_not_finite(found, path)
    model.load_state_dict(found, strict=False)
    return LoadReport(loaded=tuple(wanted), skipped=tuple(name for name in own if has_part(name, skip)))


def has_part(name: str, parts: Sequence[str]) -> bool:
    """Whether a name has one of the parts between its dots, as "heads.ori.classifier.weight" has "classifier"."""
    return any(f".{part}." in f".{name}." for part in parts)


def _first(names: Sequence[str], limit: int = 12) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
