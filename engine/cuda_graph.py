"""Forward and backward pass of a training step as one CUDA graph: one launch in place of hundreds.

The device needs about 32 ms for a step of ViT-B/16, a host 25 to 50 to launch its kernels one by one; replayed, a step
takes what the device needs, whatever the host.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from yacs.config import CfgNode

from data import Batch
from engine.device import autocast_dtype
from modeling import ReIDModel, ReIDOutput
from solver.make_loss import ReIDLoss
from utils.distributed import world_size
from utils.errors import UserError

log = logging.getLogger(__name__)

Pass = Callable[[Batch, int], tuple[dict[str, Tensor], ReIDOutput]]
"""Batch and epoch -> values and output; leaves the gradients in the parameters' `grad`."""

WARM_UP, WARM_UP_OF_RANKS = 2, 11
"""Passes before a recording: what is set up only once, such as kernels and workspaces, must be there. Of several ranks,
DistributedDataParallel sorts its buckets after the first and times the first ten."""


def recording_stream(cfg: CfgNode, model: ReIDModel, idle: Sequence[str] = ()) -> torch.cuda.Stream | None:
    """Where training steps are recorded, to be replayed; None where they are not. Where SOLVER.CUDA_GRAPH asks for it
    in vain on a GPU, the log says why.

    Args:
        model: on its device.
        idle: of several ranks, names of parameters without a gradient, see `engine.parallel.idle_parameters`.
    """
    device = next(model.parameters()).device
    if device.type != "cuda" or not cfg.SOLVER.CUDA_GRAPH:
        return None
    fused = has_fused_blocks(model, autocast_dtype(cfg.SOLVER.AMP, device))
    if found := obstacles(cfg, fused, idle):
        log.info("steps are launched kernel by kernel, not replayed as a CUDA graph: %s", ", ".join(found))
        return None
    return torch.cuda.Stream(device)


def obstacles(cfg: CfgNode, fused: bool, idle: Sequence[str]) -> list[str]:
    """What keeps a config's steps from being replayed.

    Args:
        fused: see `has_fused_blocks`.
        idle: see `recording_stream`.
    """
    named = {
        "several ranks, and parts that do not learn from the first step on": bool(idle),
        "SOLVER.GRAD_CHECKPOINT of blocks that are not fused": cfg.SOLVER.GRAD_CHECKPOINT and not fused,
        "SOLVER.DETERMINISTIC": cfg.SOLVER.DETERMINISTIC,
    }
    return [name for name, there in named.items() if there]


def has_fused_blocks(model: ReIDModel, dtype: torch.dtype | None) -> bool:
    """Whether the kernels of `modeling.fused_vit` run a model's backbone under autocast to a type, None for none."""
    backbone, device = model.backbone, next(model.parameters()).device
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        return backbone.fuses(backbone.vit.num_prefix_tokens + backbone.num_patches, device)


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Within it, a stream other than the current one is used, behind what is under way; what follows waits for it."""
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


@dataclass
class Recording:
    """A recorded pass, and the tensors that each replay reads and writes."""

    batch: Batch
    result: tuple[dict[str, Tensor], ReIDOutput]
    grads: list[Tensor | None]
    graph: torch.cuda.CUDAGraph


class ReplayedPass:
    """A pass that is recorded after some calls, and again once batches or the loss's weights are of another kind.

    Everything that hangs on a Python value is fixed in the recording: whatever may change from step to step must be a
    tensor of the batch or the model. Random numbers are drawn anew in every replay.

    Args:
        run: the pass. It must not wait for the device.
        model: whose parameters get the gradients.
        loss_fn: its weights may change with the epoch.
        stream: of `recording_stream`. What keeps autograd's nodes of the parameters, as DistributedDataParallel does,
            must have been made on it.
        dtype: autocast type, None for float32. The recording keeps its images in it, as the backbone takes them.
    """

    def __init__(
        self,
        run: Pass,
        model: ReIDModel,
        loss_fn: ReIDLoss,
        stream: torch.cuda.Stream,
        dtype: torch.dtype | None = None,
    ):
        self.run, self.model, self.loss_fn, self.stream, self.dtype = run, model, loss_fn, stream, dtype
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.warm_up = WARM_UP if world_size() == 1 else WARM_UP_OF_RANKS
        self.kind: tuple = ()
        self.passes = 0
        self.recording: Recording | None = None

    def __call__(self, batch: Batch, epoch: int) -> tuple[dict[str, Tensor], ReIDOutput]:
        """As the pass itself; the next call overwrites the output, and the gradients.

        Raises:
            UserError: the pass cannot be recorded.
        """
        if (kind := self._kind(batch, epoch)) != self.kind:
            self.forget()
            self.kind = kind
        if self.passes < self.warm_up:
            self.passes += 1
            # Autograd keeps to the stream on which it first met a parameter, for as long as anything holds that graph,
            # and a recording must not reach for another stream.
            with on_stream(self.stream):
                return self.run(batch, epoch)
        if self.recording is None:
            self.recording = self._record(batch, epoch)
        recording = self.recording
        for static, new in zip(_inputs(recording.batch), _inputs(batch), strict=True):
            static.copy_(new)
        for parameter, grad in zip(self.parameters, recording.grads, strict=True):
            parameter.grad = grad
        recording.graph.replay()
        values, output = recording.result
        return dict(zip(values, torch.stack(list(values.values())), strict=True)), output

    def forget(self) -> None:
        """Drops the recording, and with it the memory that it holds."""
        if self.recording is not None:
            self.recording.graph.reset()
        self.passes, self.recording = 0, None

    def _kind(self, batch: Batch, epoch: int) -> tuple:
        """What is fixed in a recording: weights of the loss, shapes and types of the batch."""
        weights = tuple(self.loss_fn.branch_weight(head, epoch) for head in self.model.heads)
        return weights, tuple((tensor.shape, tensor.dtype) for tensor in _inputs(batch))

    def _record(self, batch: Batch, epoch: int) -> Recording:
        images = torch.stack([image.to(self.dtype or image.dtype) for image in batch.images.values()])
        static = replace(
            batch,
            images=dict(zip(batch.images, images, strict=True)),
            pid=batch.pid.clone(),
            camid=batch.camid.clone(),
            present=None if batch.present is None else batch.present.clone(),
        )
        for parameter in self.parameters:
            parameter.grad = None
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads load the next batch meanwhile: only this one's calls are recorded and restricted.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                result = self.run(static, epoch)
        except (torch.OutOfMemoryError, UserError):
            raise
        except Exception as error:
            raise UserError(
                f"A training step cannot be recorded as a CUDA graph: {_first_cause(error)}. Set SOLVER.CUDA_GRAPH "
                "False to train without it, or keep what waits for the device (.item(), .cpu(), a condition on a "
                "tensor) out of model and loss."
            ) from error
        return Recording(static, result, [p.grad for p in self.parameters], graph)


def _inputs(batch: Batch) -> list[Tensor]:
    """What of a batch a pass reads."""
    present = [] if batch.present is None else [batch.present]
    return [*batch.images.values(), batch.pid, batch.camid, *present]


def _first_cause(error: BaseException) -> str:
    """The first line of what went wrong first: a recording that fails fails once more as it is closed."""
    while error.__context__ is not None:
        error = error.__context__
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
