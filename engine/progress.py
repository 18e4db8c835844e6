"""What training tells on its way: means, rates, speed and memory, as a log line and as records."""

import logging
import time
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from yacs.config import CfgNode

from engine.guard import FiniteGuard
from engine.meters import Meters, Readout
from engine.monitor import selection_statistics
from modeling import ReIDOutput
from solver.scheduler import CosineSchedule, DemoSchedule
from utils.distributed import average
from utils.logging import MetricsWriter

log = logging.getLogger(__name__)


@dataclass
class _Look:
    """What there is to see after a step, on its way to the host: `window`, `epoch`, `selection`, `probe`, `guard`."""

    step: int
    global_step: int
    seen: Readout
    known: dict[str, float]


class Progress:
    """Gathers what every step gives, and tells of it every LOG_PERIOD steps and at the end of an epoch.

    The host reads what a step gave after it has launched the next one: the device has work meanwhile. A context
    manager: an error that ends training does not keep it from telling what was seen before.

    Args:
        cfg: SOLVER.LOG_PERIOD and IMS_PER_BATCH are read.
        scheduler: whose rates are told.
        guard: asked before anything is told.
        writer: of the records.
        meters: of the epoch, which a checkpoint keeps.
        device: where the values are.
    """

    def __init__(
        self,
        cfg: CfgNode,
        scheduler: CosineSchedule | DemoSchedule,
        guard: FiniteGuard,
        writer: MetricsWriter,
        meters: Meters,
        device: torch.device,
    ):
        self.period, self.batch_size = cfg.SOLVER.LOG_PERIOD, cfg.SOLVER.IMS_PER_BATCH
        self.scheduler, self.guard, self.writer, self.device = scheduler, guard, writer, device
        self.epoch_meters, self.window_meters = meters, Meters()
        self.epoch = self.steps = self.clock_step = 0
        self.clock = 0.0
        self.probe: dict[str, Tensor] = {}
        """Of this epoch; told at the next look."""
        self.look: _Look | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is not None:
            with suppress(Exception):  # whatever comes of it, the error is what counts
                self.tell()

    def begin(self, epoch: int, steps: int, step: int) -> None:
        """An epoch of so many steps begins, of which the first `step` are done."""
        self.epoch, self.steps, self.clock_step, self.clock = epoch, steps, step, time.perf_counter()

    def update(self, step: int, global_step: int, values: dict[str, Tensor], output: ReIDOutput) -> None:
        """Adds a step that was launched just now; then tells of the one before, if that was due.

        Raises:
            NonFiniteError: a loss or a gradient was not finite.
        """
        self.epoch_meters.update(values)
        self.window_meters.update(values)
        self.tell()
        if step % self.period == 0 or step == self.steps:
            self.look = self._look(step, global_step, output)
        if step == self.steps:
            self.tell()

    def _look(self, step: int, global_step: int, output: ReIDOutput) -> _Look:
        """Begins to read everything back; the next step may overwrite the output."""
        known = {f"lr/{name}": lr for name, lr in self.scheduler.rates().items()}
        if self.guard.scaler.is_enabled():
            self.guard.raise_if_bad()
            known |= {"scale": self.guard.scaler.get_scale(), "skipped_steps": float(self.guard.skipped)}
        seen = {
            "window": self.window_meters.means(),
            "epoch": self.epoch_meters.means(),
            "selection": {} if output.selection is None else average(selection_statistics(output.selection)),
            "probe": self.probe,
            "guard": {"bad": self.guard.bad},
        }
        self.window_meters.reset()
        self.probe = {}
        return _Look(step, global_step, Readout(seen), known)

    def tell(self) -> None:
        """Waits for what was looked at last, and tells it, unless that was done.

        Raises:
            NonFiniteError: a loss or a gradient was not finite.
        """
        if self.look is None:
            return
        look, self.look = self.look, None
        seen = look.seen.read()
        if seen["guard"]["bad"]:
            self.guard.raise_if_bad()
        if seen["probe"]:
            self.writer.scalars(look.global_step, self.epoch, seen["probe"], kind="probe")
        scalars = seen["window"] | look.known | seen["selection"]
        seconds, self.clock = look.seen.when - self.clock, look.seen.when
        scalars["samples_per_second"] = (look.step - self.clock_step) * self.batch_size / seconds
        self.clock_step = look.step
        if self.device.type == "cuda":
            scalars["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            scalars["reserved_memory_gib"] = torch.cuda.max_memory_reserved(self.device) / 2**30
        self.writer.scalars(look.global_step, self.epoch, scalars, kind="train")
        mean = seen["epoch"]
        log.info(
            f"Epoch[{self.epoch}] Iteration[{look.step}/{self.steps}] Loss: {mean['loss']:.3f}, "
            f"Acc: {mean['acc']:.3f}, Base Lr: {look.known['lr/heads']:.2e}"
        )

    def leave(self, global_step: int) -> None:
        """The run stops within the epoch: tells what was seen and not told, the probe too."""
        self.tell()
        if self.probe:
            self.writer.scalars(global_step, self.epoch, Readout({"probe": self.probe}).read()["probe"], kind="probe")
            self.probe = {}

    def end(self, global_step: int) -> None:
        """The epoch is over: tells its means."""
        self.tell()
        mean = self.epoch_meters.read()
        log.info(f"Epoch {self.epoch} done. Loss: {mean['loss']:.3f}, Acc: {mean['acc']:.3f}")
        self.writer.scalars(global_step, self.epoch, mean, kind="epoch")
        self.epoch_meters.reset()
