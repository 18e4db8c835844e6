"""The state of a run: what a checkpoint holds, and how a run goes on from one."""

import logging
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from timm.utils import ModelEmaV3
from torch import nn
from yacs.config import CfgNode

import configs
from data.faults import listing
from engine.background import CheckpointWriter
from engine.meters import Meters
from utils.checkpoint import NotFinite, has_part, load_weights, read_file, refuse_not_finite
from utils.distributed import gather_objects, is_main, rank
from utils.errors import UserError
from utils.files import save_copy
from utils.seed import rank_seed, seed_everything

log = logging.getLogger(__name__)

VERSION = 1
"""Version of the checkpoint format."""
STATE_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("model", "optimizer", "scaler"), dict),
    "rng": (list, dict),
    **dict.fromkeys(("trained_model", "best", "meters"), (dict, type(None))),
    **dict.fromkeys(("epoch", "step", "global_step"), int),
    "config": str,
    "identities": list,
}
"""What a full checkpoint must hold to go on from."""
ORDER_KEYS = (
    *("SOLVER.IMS_PER_BATCH", "DATALOADER.NUM_INSTANCE", "SOLVER.SEED"),
    *("DATASETS.NAMES", "DATASETS.ROOT_DIR", "DATASETS.MANIFEST"),
)
"""Keys that decide which samples form which step of an epoch."""
NOT_COMPARED = ("TEST.WEIGHT", "OUTPUT_DIR", "SOLVER.REINIT")
"""Keys whose edit is no news when a run goes on."""


@dataclass
class Start:
    """What TEST.WEIGHT gives a training run to go on from."""

    path: Path
    epoch: int
    """Finished epochs."""
    state: dict | None
    """The full state, or None for bare weights: fresh optimizer and random states."""


def read_start(weight: str) -> Start | None:
    """Reads TEST.WEIGHT for training; an empty path means a fresh start.

    Raises:
        UserError: the file cannot be read, or holds bare weights and its name does not end in `_<epoch>`.
    """
    if not weight:
        return None
    path, state = Path(weight), read_file(weight)
    if "optimizer" in state and "epoch" in state:
        if state.get("version") != VERSION:
            raise UserError(f"{path}: checkpoint version {state.get('version')}, this code reads version {VERSION}.")
        if missing := sorted(STATE_TYPES.keys() - state.keys()):
            raise UserError(f"{path}: an incomplete checkpoint, it lacks {', '.join(missing)}. Take another one.")
        if wrong := [name for name, kind in STATE_TYPES.items() if not isinstance(state[name], kind)]:
            raise UserError(f"{path}: no checkpoint of this project: unexpected {', '.join(wrong)}. Take another one.")
        return Start(path, state["epoch"], state)
    number = re.search(r"_(\d+)$", path.stem)
    if number is None:
        raise UserError(
            f"{path} holds weights without optimizer and epoch, so the run cannot know where to go on. Rename it to "
            f"{path.stem}_<n>{path.suffix}, n being the epochs it was trained for (0 trains from the start), and it "
            "goes on at epoch n + 1; or evaluate it with test_net.py."
        )
    return Start(path, int(number[1]), None)


@dataclass
class TrainState:
    """Everything that a run needs to go on as if it had never stopped."""

    cfg: CfgNode
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    identities: tuple[int, ...]
    epoch: int = 0
    """Finished epochs."""
    step: int = 0
    """Finished steps of the epoch after those."""
    global_step: int = 0
    """Finished steps of the whole run."""
    best: dict | None = None
    """Metrics of the best evaluation so far, with its epoch."""
    meters: Meters = field(default_factory=Meters)
    """Means of the epoch under way."""
    numbered: list[int] = field(default_factory=list)
    """Epochs whose numbered checkpoints this run wrote into OUTPUT_DIR; the older ones may be pruned already."""

    def state_dict(self) -> dict:
        """The checkpoint; tensors and plain values only, so that it loads with `weights_only=True`.

        Of several ranks, all must call: random states and meters are those of each.
        """
        names = _parameter_names(self.model, self.optimizer)
        optimizer = self.optimizer.state_dict()
        return {
            "version": VERSION,
            "model": (self.ema.module if self.ema else self.model).state_dict(),  # what is evaluated
            "trained_model": self.model.state_dict() if self.ema else None,  # what the optimizer goes on with
            "optimizer": {
                "name": type(self.optimizer).__name__,
                "moments": {names[i]: state for i, state in optimizer["state"].items()},
            },
            "scheduler": {g["name"]: {"lr": g["lr"], "initial_lr": g["initial_lr"]} for g in optimizer["param_groups"]},
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "global_step": self.global_step,
            "best": self.best,
            "numbered": list(self.numbered),
            "meters": self.meters.state_dict() if self.step else None,
            "rng": gather_objects(_random_states()),
            "config": configs.dump(self.cfg),
            "identities": list(self.identities),
        }

    def save(self, writer: CheckpointWriter, path: Path, *also: Path) -> None:
        """Has the checkpoint written to `path`, and the same file under the names `also`; all ranks call, one writes.

        Where a numbered one is among these, the oldest beyond SOLVER.KEEP_CHECKPOINTS are removed after it is written.
        """
        keep, surplus = self.cfg.SOLVER.KEEP_CHECKPOINTS, []
        if self._numbered(path, self.epoch) in also:
            self.numbered = [*(n for n in self.numbered if n < self.epoch), self.epoch]
            surplus = [self._numbered(path, n) for n in self.numbered[:-keep]] if keep else []
        state = self.state_dict()
        if is_main():
            writer.save(state, path, *also, surplus=surplus)

    def _numbered(self, path: Path, epoch: int) -> Path:
        return path.with_name(f"{self.cfg.MODEL.NAME}_{epoch}.pth")

    def restore(self, start: Start) -> str:
        """Goes on from a checkpoint; an edited config wins over the stored one, and its differences are listed.

        Parts of the model that SOLVER.REINIT names start anew, with their moments; those that started anew in the
        stored run already do not do so again.

        Returns:
            What was done, in words.

        Raises:
            UserError: weights or identities do not fit this run, or SOLVER.REINIT names a part that is not there.
        """
        stored_cfg = stored_config(start.state, start.path) if start.state else {}
        done = stored_cfg.get("SOLVER", {}).get("REINIT", ())
        reinit = tuple(part for part in self.cfg.SOLVER.REINIT if part not in done)
        for part in reinit:
            if not any(has_part(name, (part,)) for name in self.model.state_dict()):
                raise UserError(f"SOLVER.REINIT names {part!r}, which is no part of this model's tensor names.")
        changes = config_changes(stored_cfg, self.cfg) if start.state else ""
        if start.state and start.state["step"]:
            _check_order(stored_cfg, self.cfg, start)
        try:
            report = load_weights(self.model, start.path, skip=reinit)
        except NotFinite:
            raise
        except UserError as error:
            raise UserError(
                f"{error}\n{changes or 'The config is the stored one.'}\nGive the keys their stored values, or name "
                "the part that shall start anew in SOLVER.REINIT, such as SOLVER.REINIT \"['sdtps', 'pool']\"."
            ) from error
        if self.ema:
            self.ema.module.load_state_dict(self.model.state_dict())
        anew = f"\nstarted anew: {len(report.skipped)} tensors of {', '.join(reinit)}" if reinit else ""
        if start.state is None:
            self.epoch = start.epoch
            return f"{start.path} holds weights only: going on at epoch {self.epoch + 1} with a fresh optimizer{anew}"

        state = start.state
        self._check_identities(state, start.path, reinit)
        try:
            self._restore_training(state, start.path, reinit)
        except UserError:
            raise
        except Exception as error:  # whatever the parts of a file that this code did not write hold
            raise UserError(
                f"{start.path}: its optimizer, meters or random states are not those of this model "
                f"({type(error).__name__}: {error}). Take another checkpoint."
            ) from error
        place = f"epoch {self.epoch + 1}" + (f", step {self.step + 1}" if self.step else "")
        return f"going on from {start.path} at {place}{anew}" + (f"\n{changes}" if changes else "")

    def _restore_training(self, state: dict, path: Path, reinit: tuple[str, ...]) -> None:
        """All of a checkpoint that is not the model which is evaluated."""
        if state["trained_model"]:
            kept = {name: tensor for name, tensor in state["trained_model"].items() if not has_part(name, reinit)}
            refuse_not_finite(kept, path)
            self.model.load_state_dict(kept, strict=False)
        self._restore_optimizer(state["optimizer"], path, reinit)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.global_step = state["epoch"], state["step"], state["global_step"]
        self.best = state["best"]
        if path.resolve().parent == Path(self.cfg.OUTPUT_DIR).resolve():
            self.numbered = [n for n in state.get("numbered", ()) if isinstance(n, int)]
        if state["meters"]:
            self.meters.load_state_dict(state["meters"], next(self.model.parameters()).device)
        self._restore_random_states(state["rng"])

    def keep_copies(self, start: Start, out: Path) -> dict | None:
        """Sees to it that the copies of this state lie in `out`, to which a run that was killed may not have come: the
        numbered one, and the best so far. Where the best cannot be had, it is sought anew.

        Returns:
            The metrics of the best so far.
        """
        numbered = self._numbered(out / start.path.name, self.epoch)
        if self.epoch in self.numbered and self.step == 0 and not numbered.exists():
            save_copy(start.path, numbered)
        best = out / f"{self.cfg.MODEL.NAME}best.pth"
        if self.best is None or self._is_best(best):
            return self.best
        for path in (start.path, start.path.with_name(best.name)):
            if self._is_best(path):
                save_copy(path, best)
                return self.best
        log.info("the best checkpoint so far (epoch %d) is not at hand: seeking anew", self.best["epoch"])
        return None

    def _is_best(self, path: Path) -> bool:
        """Whether a file is the checkpoint of the evaluation that `best` tells."""
        try:
            state = read_file(path)
        except UserError:
            return False
        best = self.best or {}
        return (state.get("best"), state.get("epoch"), state.get("step")) == (best, best.get("epoch"), 0)

    def _restore_random_states(self, stored: dict | list[dict]) -> None:
        """Each rank goes on with its own states; one that the stored run did not have gets new ones."""
        ranks = stored if isinstance(stored, list) else [stored]  # one process, before there were ranks
        if rank() < len(ranks):
            _set_random_states(ranks[rank()])
        else:
            seed_everything(rank_seed(self.cfg.SOLVER.SEED, self.global_step, rank()))

    def _check_identities(self, state: dict, path: Path, reinit: tuple[str, ...]) -> None:
        if tuple(state["identities"]) != tuple(self.identities) and not {"classifier", "heads"} & set(reinit):
            raise UserError(
                f"{path} was trained on {len(state['identities'])} other identities than the {len(self.identities)} "
                "of this data set: the classifier's rows would be mixed up. Set DATASETS to the set it was trained on, "
                "or let the classifiers start anew: SOLVER.REINIT \"['classifier']\"."
            )

    def _restore_optimizer(self, stored: dict, path: Path, reinit: tuple[str, ...]) -> None:
        if stored["name"] != type(self.optimizer).__name__:
            log.warning(
                "the checkpoint's optimizer is %s, this run's %s: its moments start anew",
                stored["name"],
                type(self.optimizer).__name__,
            )
            return
        names, moments = _parameter_names(self.model, self.optimizer), stored["moments"]
        kept = {i: moments[name] for i, name in enumerate(names) if name in moments and not has_part(name, reinit)}
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        tensors = {f"{names[i]}/{key}": value for i, moment in kept.items() for key, value in moment.items()}
        tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
        refuse_not_finite(tensors, path)
        if bad := [n for n, t in tensors.items() if t.ndim and t.shape != shapes[n.rpartition("/")[0]]]:
            raise UserError(f"{path}: the optimizer's state does not fit the model: {listing(bad)}. Take another one.")
        self.optimizer.load_state_dict({"state": kept, "param_groups": self.optimizer.state_dict()["param_groups"]})


def stored_config(state: dict, path: str | Path) -> dict:
    """The config inside a full checkpoint.

    Raises:
        UserError: it is no YAML of sections.
    """
    try:
        stored = yaml.safe_load(state["config"])
    except (yaml.YAMLError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: the config in it cannot be read ({str(error).splitlines()[0]}). Take another one."
        ) from error
    if not isinstance(stored, dict) or not all(isinstance(v, dict | str) for v in stored.values()):
        raise UserError(f"{path}: the config in it has no sections such as MODEL. Take another one.")
    return stored


def config_changes(stored: dict, cfg: CfgNode, sections: tuple[str, ...] = ()) -> str:
    """What differs between a checkpoint's config and this one, in words; of keys that begin so, where any are named."""
    changes = [change for change in configs.diff(stored, cfg) if change[0] not in NOT_COMPARED]
    changes = [change for change in changes if not sections or change[0].startswith(sections)]
    lines = [f"  {key}: stored {old!r}, now {new!r}" for key, old, new in changes]
    return "\n".join(["The config differs from the stored one, and wins:", *lines]) if lines else ""


def _check_order(stored: dict, cfg: CfgNode, start: Start) -> None:
    """Refuses to go on in the middle of an epoch whose steps would be made of other samples."""
    if changed := [c for c in configs.diff(stored, cfg) if c[0] in ORDER_KEYS]:
        values = "; ".join(f"{key}: stored {old!r}, now {new!r}" for key, old, new in changed)
        raise UserError(
            f"{start.path} stands in the middle of epoch {start.epoch + 1}, the rest of which would be made of other "
            f"samples ({values}). Give these keys their stored values, or take a checkpoint of an epoch's end."
        )


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the parameters in the order in which the optimizer numbers them."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _random_states() -> dict:
    version, internal, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],  # of the card in use
    }


def _set_random_states(states: dict) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and states["cuda"]:
        torch.cuda.set_rng_state(states["cuda"][0])
