"""One training step: forward and backward over the micro-batches, then a guarded update. Nothing here waits for the
device: values stay there until somebody reads them."""

from contextlib import nullcontext

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

from data import Batch
from engine.cuda_graph import Pass, ReplayedPass
from engine.device import autocast_dtype
from engine.guard import FiniteGuard
from engine.monitor import PartNorms
from engine.parallel import Objective
from modeling import ReIDOutput
from utils.modalities import MODALITIES


class TrainStep:
    """
    Args:
        cfg: SOLVER.AMP, ACCUMULATION and GRAD_CLIP are read.
        objective: model and loss, see `engine.parallel`.
        guard: updates the weights through optimizer and scaler.
        ema: moving average of the weights, or None.
        stream: of `recording_stream`; None launches every step kernel by kernel.
    """

    def __init__(
        self,
        cfg: CfgNode,
        objective: Objective | DistributedDataParallel,
        guard: FiniteGuard,
        ema: ModelEmaV3 | None = None,
        stream: torch.cuda.Stream | None = None,
    ):
        self.objective, self.guard, self.ema = objective, guard, ema
        alone = objective.module if isinstance(objective, DistributedDataParallel) else objective
        self.model = alone.model
        self.device = guard.parameters[0].device
        self.dtype = autocast_dtype(cfg.SOLVER.AMP, self.device)
        self.parts, self.grad_clip = cfg.SOLVER.ACCUMULATION, cfg.SOLVER.GRAD_CLIP
        self.part_norms = PartNorms(guard.names, self.device)
        self.differentiate: Pass = self._differentiate
        if stream is not None:
            self.differentiate = ReplayedPass(self._differentiate, self.model, alone.loss_fn, stream, self.dtype)

    def __call__(self, batch: Batch, epoch: int, step: int) -> tuple[dict[str, Tensor], ReIDOutput]:
        """
        Args:
            batch: on the device.
            epoch: the first is 1; the loss may depend on it.
            step: of the whole run, for what the guard tells.

        Returns:
            Loss, its terms, `acc` and gradient norms as 0-d tensors; and the output of the last micro-batch. Read
            the output before the next step, which may overwrite it.
        """
        guard = self.guard
        guard.before_forward()
        values, output = self.differentiate(batch, epoch)
        guard.scaler.unscale_(guard.optimizer)
        norms = guard.gradient_norms()
        if self.grad_clip > 0:
            nn.utils.clip_grads_with_norm_(guard.parameters, self.grad_clip, torch.linalg.vector_norm(norms))
        guard.step(step, {k: v for k, v in values.items() if k != "acc"}, norms)
        if self.ema:
            self.ema.update(self.model, step=step)
        return values | self.part_norms(norms), output

    def close(self) -> None:
        """Lets go of what was recorded: the ranks could not part while a recording holds their messages."""
        if isinstance(self.differentiate, ReplayedPass):
            self.differentiate.forget()

    def _differentiate(self, batch: Batch, epoch: int) -> tuple[dict[str, Tensor], ReIDOutput]:
        """Forward and backward pass: loss, its terms and `acc`, and the output; the gradients are in the parameters."""
        values: dict[str, Tensor] = {}
        self.guard.optimizer.zero_grad(set_to_none=True)
        for i, part in enumerate(_micro_batches(batch, self.parts), 1):
            with nullcontext() if i == self.parts else self.objective.no_sync():
                with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
                    loss, terms, output = self.objective(part, epoch)
                self.guard.scaler.scale(loss / self.parts).backward()
            for name, value in {"loss": loss, **terms, "acc": accuracy(output, part.pid)}.items():
                share = value.detach() / self.parts if self.parts > 1 else value.detach()
                values[name] = values[name] + share if name in values else share
        return values, output


def _micro_batches(batch: Batch, parts: int) -> list[Batch]:
    """Cuts a batch into equal parts; identities lie side by side in it, so none is split."""
    size = len(batch.pid) // parts
    return [batch] if parts == 1 else [batch.part(i * size, (i + 1) * size) for i in range(parts)]


def accuracy(output: ReIDOutput, pid: Tensor) -> Tensor:
    """Share of the batch that the classifier names rightly: `ori`'s, or `sdtps`'s where that is the only branch.

    Where each modality has its own head, their logits are summed.
    """
    if "RGB" in output.logits:
        logits = torch.stack([output.logits[m] for m in MODALITIES]).sum(0)
    else:
        logits = output.logits["ori" if "ori" in output.logits else "sdtps"]
    return (logits.argmax(dim=-1) == pid).float().mean()
