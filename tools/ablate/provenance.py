"""What a run was made of: code, data, weights, config, versions. Results of different code or data do not mix."""

import hashlib
import json
import re
import subprocess
import time
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from configs.validate import flatten
from data.datasets import LAYOUTS
from tools.ablate.study import NOT_COMPARED
from utils.errors import UserError
from utils.files import read_json, save_text

ROOT = Path(__file__).parents[2]
SOURCES = ("configs", "data", "engine", "modeling", "solver", "utils")
"""Packages whose code may change a result, beside train_net.py."""
DRAWS_DATA = "synthetic"
"""The folder whose code makes sample data; it counts by the data that it made."""
FILE = "provenance.json"


def stamp(cfg: CfgNode) -> dict[str, Any]:
    """What a run that starts now is made of; plain values.

    Raises:
        UserError: there is no data.
    """
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "sources": source_digests(),
        "data": data_digest(cfg),
        "weights": weights_digest(cfg),
        "config": config_digest(cfg),
        "torch": version("torch"),
        "device": None,  # known once the run has started
    }


def source_digests(root: Path = ROOT) -> dict[str, str]:
    """Path -> digest of every source file that may change a result."""
    files = [root / "train_net.py", *(p for name in SOURCES for p in (root / name).rglob("*.py"))]
    files = [p for p in files if p.is_file() and DRAWS_DATA not in p.relative_to(root).parts]
    return {p.relative_to(root).as_posix(): _file_digest(p) for p in sorted(files)}


def data_digest(cfg: CfgNode) -> dict[str, Any]:
    """Files, bytes and a digest over the names and contents of the data set, wherever it lies.

    Raises:
        UserError: there is no such folder.
    """
    folder = Path(cfg.DATASETS.ROOT_DIR) / LAYOUTS[cfg.DATASETS.NAMES].home
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    if not files:
        raise UserError(f"{folder}: there is no data. See DATASETS.ROOT_DIR, or let the study prepare it.")
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(folder).as_posix()} {_file_digest(path)}\n".encode())
    return {"files": len(files), "bytes": sum(p.stat().st_size for p in files), "digest": digest.hexdigest()[:16]}


def weights_digest(cfg: CfgNode) -> dict[str, str]:
    """Path -> digest of the pretrained weights, where the run starts from a file."""
    path = Path(cfg.MODEL.PRETRAIN_PATH_T)
    return {str(path): _file_digest(path)} if cfg.MODEL.PRETRAINED and path.is_file() else {}


def config_digest(cfg: dict) -> str:
    """Of a resolved config, or of one read back from its file, but for where the run lies and goes on from."""
    values = {key: value for key, value in flatten(cfg).items() if key not in NOT_COMPARED}
    return _digest(values)


def results_digest(metrics: dict) -> str:
    """Of what training wrote into metrics.json."""
    return _digest({when: metrics.get(when) for when in ("last", "best")})


def read_provenance(folder: Path) -> dict[str, Any]:
    """The stored provenance of a run: `starts`, a stamp for each time it was begun, and `results` once it is finished.

    An empty dict where there is none.
    """
    return read_json(folder / FILE)


def write_provenance(folder: Path, provenance: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_text(json.dumps(provenance, indent=2) + "\n", folder / FILE)


def device_of(folder: Path) -> str | None:
    """The device as the run's log tells it: "cuda (NVIDIA H200), bfloat16, torch 2.11.0"."""
    try:
        told = re.findall(r"training on (.+)", (folder / "train.log").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return told[-1] if told else None


def conflicts(stamps: Iterable[tuple[str, dict[str, Any]]]) -> list[str]:
    """What differs between the code, the data or the weights of (name, stamp) pairs; one text each, none where all fit.

    Every stamp is compared with the first; weights only with those of the same path, since a variant may start from
    others.
    """
    texts: dict[str, str] = {}  # kind of conflict -> the first such text
    weights: dict[str, tuple[str, str]] = {}
    first_name, first = "", None
    for name, now in stamps:
        for path, digest in now["weights"].items():
            other, before = weights.setdefault(path, (name, digest))
            if digest != before:
                texts.setdefault(f"weights {path}", f"weights: {path} was another file in {other} than in {name}")
        if first is None:
            first_name, first = name, now
            continue
        if now["sources"] != first["sources"]:
            keys = sorted(now["sources"].keys() | first["sources"].keys())
            files = [key for key in keys if now["sources"].get(key) != first["sources"].get(key)]
            texts.setdefault(
                f"code {files}",
                f"code: {', '.join(files)} differ between {first_name} ({_commit(first)}) and {name} ({_commit(now)})",
            )
        if now["data"] != first["data"]:
            a, b = first["data"], now["data"]
            texts.setdefault(
                f"data {b}",
                f"data: {first_name} had {a['files']} files of {a['bytes']} bytes ({a['digest']}), "
                f"{name} {b['files']} of {b['bytes']} ({b['digest']})",
            )
    return list(texts.values())


def _commit(stamp: dict[str, Any]) -> str:
    return f"commit {stamp['commit'][:7]}{' with changes' if stamp['dirty'] else ''}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _file_digest(path: Path) -> str:
    status = path.stat()
    return _content_digest(path.resolve(), status.st_size, status.st_mtime_ns)


@cache
def _content_digest(path: Path, size: int, mtime: int) -> str:
    """Read once as long as size and time of the file stay what they were."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
