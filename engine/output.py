"""The folder of a run: nothing in it is overwritten by accident."""

import json
import logging
import shutil
from pathlib import Path

from yacs.config import CfgNode

import configs
from utils.errors import UserError
from utils.files import save_text
from utils.logging import read_metrics

log = logging.getLogger(__name__)

CONFIG_FILE, METRICS_LOG, METRICS_FILE, LAST = "config.yml", "metrics.jsonl", "metrics.json", "last.pth"


def open_output_dir(cfg: CfgNode, resume_from: Path | None, epoch: int = 0) -> Path:
    """Makes OUTPUT_DIR ready for a run and writes the resolved config into it.

    A run that goes on from an earlier checkpoint of the same folder moves what came after that checkpoint into a
    folder `superseded-<n>` in it.

    Args:
        cfg: the run's config.
        resume_from: the checkpoint that the run goes on from, or None for a fresh start.
        epoch: finished epochs in that checkpoint.

    Raises:
        UserError: the folder holds another run, or cannot be written.
    """
    out = Path(cfg.OUTPUT_DIR)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"OUTPUT_DIR {out}: cannot be made: {error}. Name another folder.") from error
    used = any((out / name).exists() for name in (LAST, METRICS_LOG)) or any(out.glob("*_*.pth"))
    if used:
        if resume_from is None or resume_from.resolve().parent != out.resolve():
            go_on = f"add TEST.WEIGHT {out / LAST} to go on with it, " if (out / LAST).exists() else ""
            raise UserError(
                f"OUTPUT_DIR {out} holds a run already, which would be overwritten. To keep it, name another folder "
                f"(OUTPUT_DIR {out}-2); or {go_on}or remove the folder."
            )
        if resume_from.name != LAST:
            _set_aside(out, resume_from, epoch, cfg.MODEL.NAME)
    text = configs.dump(cfg)
    config = out / CONFIG_FILE
    if config.exists() and config.read_text() != text:
        config.rename(_free_name(out, f"config-until-epoch-{epoch}", ".yml"))
    save_text(text, config)
    return out


def _set_aside(out: Path, resume_from: Path, epoch: int, name: str) -> None:
    """Moves what was written after `resume_from`; the metrics log is copied and cut back to the finished epochs."""
    metrics = json.loads((out / METRICS_FILE).read_text()) if (out / METRICS_FILE).exists() else {}
    later = [p for p in out.glob(f"{name}_*.pth") if p.stem.rpartition("_")[2].isdigit()]
    later = [p for p in later if int(p.stem.rpartition("_")[2]) > epoch]
    later += [out / LAST] if (out / LAST).exists() else []
    best = out / f"{name}best.pth"
    if best.exists() and best.resolve() != resume_from.resolve() and metrics.get("best", {}).get("epoch", 0) > epoch:
        later.append(best)
    if not later:
        return
    aside = _free_name(out, "superseded", "")
    aside.mkdir()
    for path in later:
        shutil.move(path, aside / path.name)
    for path in (out / METRICS_LOG, out / METRICS_FILE):
        if path.exists():
            shutil.copy2(path, aside / path.name)
    if (out / METRICS_LOG).exists():
        kept = [line for line in read_metrics(out / METRICS_LOG) if line["epoch"] <= epoch]
        save_text("".join(json.dumps(line) + "\n" for line in kept), out / METRICS_LOG)
    log.info("going on from %s; what came after it was moved to %s", resume_from.name, aside)


def _free_name(folder: Path, stem: str, suffix: str) -> Path:
    path, n = folder / f"{stem}{suffix}", 1
    while path.exists():
        n += 1
        path = folder / f"{stem}-{n}{suffix}"
    return path
