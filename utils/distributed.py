"""Which of several processes ("ranks") this is, and what they tell one another.

Everything that depends on ranks asks here. In a single process nothing is sent: the functions give back what they got.
Tensors travel over the default group (NCCL between cards, gloo between CPUs), everything else over `control`, a gloo
group that never waits for a device.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

LONGEST_WAIT = timedelta(minutes=30)
"""For what one rank does while the others wait: ranking, writing, compiling before the first step."""

control: dist.ProcessGroup | None = None
"""The group of messages between hosts, made by `engine.launch`; None is the default group."""


def is_launched() -> bool:
    """Whether torchrun, or whoever sets its variables, started this process as one of several or as the only one."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


def is_joined() -> bool:
    """Whether this process has met the others."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of processes that train or evaluate together."""
    return dist.get_world_size() if is_joined() else 1


def rank() -> int:
    """Which of them this is, from 0; known before they have met."""
    if is_joined():
        return dist.get_rank()
    return int(os.environ["RANK"]) if is_launched() else 0


def local_rank() -> int:
    """Which of the processes on this machine this is; it picks the card."""
    return int(os.environ["LOCAL_RANK"]) if is_launched() else 0


def local_world_size() -> int:
    """Processes on this machine, which share its cores and its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if is_launched() else 1


def own_cores() -> int:
    """Cores that this process may use: its share of the machine's, which the ranks on it divide among them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_world_size())


def is_main() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def share(count: int) -> range:
    """This rank's part of 0 .. count - 1: contiguous, in the order of the ranks, sizes differ by one at most."""
    size, me = world_size(), rank() if is_joined() else 0
    return range(count * me // size, count * (me + 1) // size)


# tensors, over the default group


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum of the tensors of all ranks, without a gradient."""
    if world_size() == 1:
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor


def gather_alike(tensor: Tensor) -> Tensor:
    """The tensors of all ranks, of one shape (n, …), on every rank: (R, n, …) without a gradient."""
    if world_size() == 1:
        return tensor.unsqueeze(0)
    joined = tensor.new_empty(world_size() * len(tensor), *tensor.shape[1:])
    renamed = hasattr(dist, "all_gather_single")  # since torch 2.14
    gather = dist.all_gather_single if renamed else dist.all_gather_into_tensor
    gather(joined, tensor.contiguous())
    return joined.unflatten(0, (world_size(), len(tensor)))


def average(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means over the ranks of 0-d tensors, in one message; the host does not wait for the device."""
    if world_size() == 1:
        return values
    total = sum_over_ranks(torch.stack([value.float() for value in values.values()]))
    return dict(zip(values, (total / world_size()).unbind(), strict=True))


def any_rank(flags: Tensor) -> Tensor:
    """Where the flag (bool) is raised on any rank; the host does not wait for the device."""
    if world_size() == 1:
        return flags
    flags = flags.to(torch.uint8)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return flags.bool()


def gather_rows(rows: Tensor) -> Tensor:
    """Rows (n, …) of each rank -> (sum of n, …) on the main rank, in the order of the ranks; the others keep theirs."""
    if world_size() == 1:
        return rows
    counts = gather_objects(len(rows))
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts] if is_main() else None
    dist.gather(padded, parts)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]) if parts else rows


class GatherBatch(torch.autograd.Function):
    """Features (b, D) of each rank -> (R * b, D) on every rank, for a loss that all ranks compute alike from them.

    As each rank has the same loss, the gradient of the R losses together is R times the rank's own, and none is sent.
    DistributedDataParallel divides by R.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        return gather_alike(features).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.chunk(world_size())[rank()] * world_size()


def gather_batch(tensor: Tensor) -> Tensor:
    """The tensors (b, …) of all ranks joined along the batch, on every rank, with gradient; see `GatherBatch`."""
    return GatherBatch.apply(tensor) if world_size() > 1 else tensor


# everything else, between the hosts


def gather_objects(value: T) -> list[T]:
    """The values of all ranks, on every rank."""
    values: list[Any] = [value]
    if world_size() > 1:
        values = [None] * world_size()
        dist.all_gather_object(values, value, group=control)
    return values


def from_main(function: Callable[[], T]) -> T:
    """What `function` gives on the main rank, on every rank; the others wait and do not call it."""
    if world_size() == 1:
        return function()
    result = [function() if is_main() else None]
    dist.broadcast_object_list(result, src=0, group=control)
    return result[0]  # type: ignore[return-value]


def barrier() -> None:
    """Waits until all ranks are here."""
    if world_size() > 1:
        dist.barrier(group=control)


def greatest(value: int, patience: timedelta = LONGEST_WAIT) -> int:
    """The greatest of the ranks' values, on every rank.

    Raises:
        RuntimeError: a rank did not answer in time, or is gone.
    """
    if world_size() == 1:
        return value
    message = torch.tensor(value)
    dist.all_reduce(message, op=dist.ReduceOp.MAX, group=control, async_op=True).wait(patience)
    return int(message)
