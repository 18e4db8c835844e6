"""The folder of a run: nothing in it is overwritten by accident."""

import json
import logging
import shutil
from pathlib import Path

from yacs.config import CfgNode

import configs
from utils.distributed import is_main
from utils.errors import UserError
from utils.files import read_json, save_text
from utils.logging import read_metrics

log = logging.getLogger(__name__)

CONFIG_FILE, METRICS_LOG, METRICS_FILE, LAST = "config.yml", "metrics.jsonl", "metrics.json", "last.pth"
WRITTEN_ASIDE = (".pth", ".yml", ".json", ".jsonl")
"""Kinds of files that are written aside as `.<name>.tmp`, which a run that was killed leaves behind."""


def check_output_dir(cfg: CfgNode, resume_from: Path | None) -> None:
    """Refuses an OUTPUT_DIR in which a run would overwrite another; touches nothing.

    Args:
        cfg: the run's config.
        resume_from: the checkpoint that the run goes on from, or None for a fresh start.

    Raises:
        UserError: the folder holds checkpoints of another run.
    """
    out = Path(cfg.OUTPUT_DIR)
    goes_on_here = resume_from is not None and resume_from.resolve().parent == out.resolve()
    if goes_on_here or not any(out.glob("*.pth")):
        return
    go_on = f" add TEST.WEIGHT {out / LAST} to go on with it;" if (out / LAST).exists() else ""
    raise UserError(
        f"OUTPUT_DIR {out} holds a run already, which would be overwritten. Name another folder (OUTPUT_DIR {out}-2);"
        f"{go_on} or remove the folder."
    )


def open_output_dir(cfg: CfgNode, resume_from: Path | None, epoch: int = 0, trains: bool = True) -> None:
    """Makes OUTPUT_DIR ready for a run and writes the resolved config into it; of several ranks, the main one does.

    A run that goes on from an earlier checkpoint of the same folder moves what came after that checkpoint into a
    folder `superseded` in it (the next time `superseded-2`, …); so does a fresh start after a run that left no
    checkpoint. What a run that was killed had half written is removed.

    Args:
        cfg: the run's config.
        resume_from: the checkpoint that the run goes on from, or None for a fresh start.
        epoch: finished epochs in that checkpoint.
        trains: False where nothing is left to train; then nothing is moved.

    Raises:
        UserError: the folder holds another run, or cannot be written.
    """
    if not is_main():
        return
    check_output_dir(cfg, resume_from)
    out = Path(cfg.OUTPUT_DIR)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for stale in (p for suffix in WRITTEN_ASIDE for p in out.glob(f".*{suffix}.tmp")):
            stale.unlink()
        if trains and (resume_from is None or resume_from.name != LAST):
            _set_aside(out, resume_from, epoch, cfg.MODEL.NAME)
        text = configs.dump(cfg)
        config = out / CONFIG_FILE
        if config.exists() and _lines(config.read_text()) != _lines(text):
            config.rename(_free_name(out, f"config-until-epoch-{epoch}", ".yml"))
        save_text(text, config)
    except OSError as error:
        raise UserError(f"OUTPUT_DIR {out}: cannot be written: {error}. Name another folder.") from error


def _lines(config: str) -> list[str]:
    """Of a resolved config, without the checkpoint that a run goes on from."""
    return [line for line in config.splitlines() if not line.strip().startswith("WEIGHT:")]


def _set_aside(out: Path, resume_from: Path | None, epoch: int, name: str) -> None:
    """Moves what was written after `resume_from`; the metrics log is copied and cut back to the finished epochs."""
    best = read_json(out / METRICS_FILE).get("best", {})
    later = [p for p in out.glob(f"{name}_*.pth") if p.stem.rpartition("_")[2].isdigit()]
    later = [p for p in later if int(p.stem.rpartition("_")[2]) > epoch]
    later += [p for p in (out / LAST,) if p.exists()]
    later += [p for p in (out / f"{name}best.pth",) if p.exists() and best.get("epoch", 0) > epoch]
    later = [p for p in later if resume_from is None or p.resolve() != resume_from.resolve()]
    logs = [p for p in (out / METRICS_LOG, out / METRICS_FILE) if p.exists()]
    if not later and not (resume_from is None and logs):
        return
    aside = _free_name(out, "superseded", "")
    aside.mkdir()
    for path in later:
        shutil.move(path, aside / path.name)
    for path in logs:
        shutil.copy2(path, aside / path.name)
    if (out / METRICS_LOG).exists():
        kept = [line for line in read_metrics(out / METRICS_LOG) if resume_from and line["epoch"] <= epoch]
        save_text("".join(json.dumps(line) + "\n" for line in kept), out / METRICS_LOG)
    log.info("what an earlier run left after epoch %d was moved to %s", epoch, aside)


def _free_name(folder: Path, stem: str, suffix: str) -> Path:
    path, n = folder / f"{stem}{suffix}", 1
    while path.exists():
        n += 1
        path = folder / f"{stem}-{n}{suffix}"
    return path
