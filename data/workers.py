"""Processes that read files ahead of their use: how many, what they have to know, and what is told when they fail."""

import logging
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from utils.distributed import local_world_size, own_cores
from utils.errors import UserError

logger = logging.getLogger(__name__)

PREFETCH = 2
"""Batches that a worker process prepares ahead."""
SHARED_MEMORY = "/dev/shm"


def count_workers(requested: int) -> int:
    """DATALOADER.NUM_WORKERS as worker processes of this rank: -1 leaves it one core free.

    More than its cores are not started; the ranks of a machine share its cores.
    """
    cores = own_cores()
    if requested < 0:
        return cores - 1
    if requested > cores:
        logger.info("DATALOADER.NUM_WORKERS: %d workers instead of %d, one for each core", cores, requested)
    return min(requested, cores)


def worker_options(workers: int, batch_bytes: int) -> dict[str, Any]:
    """Options of a DataLoader about its workers; fewer of them where shared memory is too small for their batches."""
    if workers and os.path.isdir(SHARED_MEMORY):
        affordable = shutil.disk_usage(SHARED_MEMORY).free // (PREFETCH * batch_bytes * local_world_size())
        if affordable < workers:
            logger.warning(
                "%s has room for the batches of %d workers instead of %d; in a container, start it with more "
                "shared memory (docker run --shm-size=8g) to load faster",
                SHARED_MEMORY,
                affordable,
                workers,
            )
            workers = affordable
    return {
        "num_workers": workers,
        "prefetch_factor": PREFETCH if workers else None,
        "worker_init_fn": _outlive_one_sigterm,
        "generator": torch.Generator(),  # of its own, so that a pass leaves the global random state alone
    }


def _outlive_one_sigterm(worker: int) -> None:
    """In a worker process: a signal to the whole group is for the main process, which ends the workers in its time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))


@contextmanager
def tell_lost_workers() -> Iterator[None]:
    """Makes a UserError of a data worker's death, which torch raises wherever the main process happens to be."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"A data loading process ended unexpectedly ({error}). This is most often a lack of memory: lower "
            "DATALOADER.NUM_WORKERS (0 loads in the main process) or the batch size. Training goes on from its "
            "last.pth, given as TEST.WEIGHT."
        ) from error
