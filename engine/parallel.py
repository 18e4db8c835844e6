"""A training step's forward pass, in one process or in each of several."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data import Batch
from engine.cuda_graph import on_stream
from modeling import ReIDModel, ReIDOutput
from modeling.regions import uncompiled
from modeling.sdtps import Selection
from solver.make_loss import ReIDLoss
from utils.distributed import gather_batch, world_size
from utils.modalities import MODALITIES

BUCKET_MIB = 160
"""Size of the messages in which DistributedDataParallel sends gradients. A message holds up the products that run
beside it, and the last one the update: for ViT-B/16's 330 MiB on two H200, 60 to 160 are as fast, torch's 25 and a
single message slower."""


class Objective(nn.Module):
    """Model and loss in one: what trains in parallel, so that a parameter without influence on the loss is seen."""

    def __init__(self, model: ReIDModel, loss_fn: ReIDLoss):
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor], ReIDOutput]:
        """A rank's slice of a micro-batch -> its loss, the loss's terms, and the output, both without graph.

        The mean of the ranks' losses, and of their gradients, is that of one process with the whole micro-batch.
        """
        output = self.model(batch.images, batch.camid, batch.present)
        mined = _join_ranks(output, batch.pid) if world_size() > 1 else None
        loss, terms = self.loss_fn(output, batch.pid, epoch, mined)
        return loss, terms, _detached(output)

    def no_sync(self) -> AbstractContextManager:
        """As DistributedDataParallel's: gradients stay on the rank. Here there is nothing to send."""
        return nullcontext()


def parallel(
    objective: Objective, idle: Sequence[str] = (), stream: torch.cuda.Stream | None = None
) -> Objective | DistributedDataParallel:
    """The objective itself or, of several ranks, one whose backward pass averages the gradients over them.

    Args:
        objective: on its device.
        idle: see `idle_parameters`.
        stream: on which steps will be recorded, see `engine.cuda_graph.recording_stream`.
    """
    if world_size() == 1:
        return objective
    with on_stream(stream):
        return DistributedDataParallel(
            objective,
            broadcast_buffers=False,  # batch statistics are synchronised where they are made
            gradient_as_bucket_view=True,
            find_unused_parameters=bool(idle),
            bucket_cap_mb=BUCKET_MIB,
        )


def idle_parameters(model: ReIDModel, loss_fn: ReIDLoss, epoch: int) -> list[str]:
    """Names of the trainable parameters that the loss of an epoch leaves without a gradient, such as SDTPS's in its
    warm-up; found by a pass over two blank samples, which changes nothing.

    Args:
        epoch: the first to be trained; in no later one do more parameters lie idle.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device, training = next(model.parameters()).device, model.training
    blank = torch.zeros(2, 3, *model.backbone.img_size, device=device)
    model.eval()
    try:
        with uncompiled(model, loss_fn):
            output = model(dict.fromkeys(MODALITIES, blank), torch.zeros(2, dtype=torch.long, device=device))
            loss, _ = loss_fn(output, torch.arange(2, device=device), epoch)
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    finally:
        model.train(training)
    return [name for name, grad in zip(named, grads, strict=True) if grad is None]


def _join_ranks(output: ReIDOutput, pid: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Features of every head and labels of all ranks, in one message each."""
    features = [output.features[head] for head in output.logits]
    joined = gather_batch(torch.cat(features, dim=1)).split([f.shape[1] for f in features], dim=1)
    return dict(zip(output.logits, joined, strict=True)), gather_batch(pid)


def _detached(output: ReIDOutput) -> ReIDOutput:
    def cut(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in tensors.items()}

    chosen = output.selection
    selection = chosen and Selection(**{f.name: cut(getattr(chosen, f.name)) for f in fields(chosen)})
    return ReIDOutput(cut(output.features), cut(output.logits), selection)
