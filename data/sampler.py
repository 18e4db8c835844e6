"""Batches of P identities with K images each, for losses that compare images of one identity with those of others."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from utils.errors import UserError


@dataclass(frozen=True)
class Draw:
    """One training image of an epoch: which one, and its place in the epoch's list, which fixes its augmentation."""

    index: int
    epoch: int
    position: int


def identity_batches(pids: Sequence[int], ids_per_batch: int, instances: int, seed: int, epoch: int) -> list[list[int]]:
    """Splits one epoch into batches of P identities x K images (Hermans et al., In Defense of the Triplet Loss, 2017).

    The images of an identity are shuffled and cut into groups of K; what does not fill a group waits for another
    epoch. An identity with fewer than K images forms one group of all of them, filled up with random repeats. As long
    as P identities have groups left, P of these are drawn and one group of each makes a batch.

    Args:
        pids: identity of each image.
        ids_per_batch: P.
        instances: K.
        seed, epoch: not negative; the same pair gives the same batches.

    Returns:
        Batches of P * K indices into `pids`, the images of an identity side by side. Which identities run out first
        is random, so the number of batches varies a little between epochs.

    Raises:
        UserError: fewer than P identities.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, epoch]))
    identity = np.asarray(pids)
    groups = [_groups(np.flatnonzero(identity == pid), instances, rng) for pid in np.unique(identity)]
    if len(groups) < ids_per_batch:
        raise UserError(
            f"A batch takes {ids_per_batch} identities (SOLVER.IMS_PER_BATCH / DATALOADER.NUM_INSTANCE), "
            f"the training set has {len(groups)}: lower IMS_PER_BATCH or raise NUM_INSTANCE."
        )
    batches = []
    while len(groups) >= ids_per_batch:
        drawn = rng.choice(len(groups), size=ids_per_batch, replace=False)
        batches.append([index for place in drawn for index in groups[place].pop()])
        groups = [left for left in groups if left]
    return batches


def _groups(indices: np.ndarray, instances: int, rng: np.random.Generator) -> list[list[int]]:
    indices = rng.permutation(indices)
    if len(indices) < instances:
        indices = np.append(indices, rng.choice(indices, size=instances - len(indices)))
    full = len(indices) // instances * instances
    return indices[:full].reshape(-1, instances).tolist()


class IdentityBatchSampler(Sampler[list[Draw]]):
    """Yields the batches of one epoch, which `set_epoch` chooses, as lists of `Draw`.

    The epoch travels with every item, so that worker processes that outlive an epoch need not be told of it.

    Args:
        rank, world_size: which process of how many this is; each gets its slice, and positions stay those in the whole.
        parts: micro-batches of a step; each is cut into slices of its own, so that the ranks' n-th parts together are
            the n-th part of the whole batch.
    """

    def __init__(
        self,
        pids: Sequence[int],
        ids_per_batch: int,
        instances: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        parts: int = 1,
    ):
        size = ids_per_batch * instances
        if size % (parts * world_size):
            raise ValueError(f"a batch of {size} cannot be cut into {parts} x {world_size} equal pieces")
        self.pids = pids
        self.ids_per_batch = ids_per_batch
        self.instances = instances
        self.seed = seed
        piece = size // (parts * world_size)
        starts = [(part * world_size + rank) * piece for part in range(parts)]
        self.places = [start + i for start in starts for i in range(piece)]
        self.set_epoch(1)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Chooses the epoch; its first `start_step` batches are passed over, the others stay what they are."""
        self.epoch = epoch
        self.start_step = start_step
        self.batches = identity_batches(self.pids, self.ids_per_batch, self.instances, self.seed, epoch)

    def __len__(self) -> int:
        """Batches of the whole epoch, those before `start_step` included."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Draw]]:
        size = self.ids_per_batch * self.instances
        for step in range(self.start_step, len(self.batches)):
            batch = self.batches[step]
            yield [Draw(batch[place], self.epoch, step * size + place) for place in self.places]
