"""Batches from cached pixels: gathered and sent by one thread ahead of their use, finished on the device."""

import functools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from utils.modalities import MODALITIES

from .batch import Batch
from .datasets import Sample
from .device_transforms import DeviceAugment, DeviceNormalize

GATHERERS = 4
"""Threads that copy the pixels of one batch."""


@functools.cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    """The same in every pass: torch keeps freed memory for the stream that it was taken on, each for itself."""
    return torch.cuda.Stream(device)


@dataclass(frozen=True)
class Staged:
    """A batch on its way: pixels, ids and draws on the device, complete once `arrived` has happened there."""

    tensors: list[Tensor]
    path: list[str]
    arrived: torch.cuda.Event | None


class CachedBatches:
    """What a DataLoader is to files: the batches that a sampler asks for, of triples whose pixels are at hand.

    Args:
        pixels: (N, M, 3, H, W) uint8, in memory or memory-mapped; shared, never copied as a whole.
        samples: the N triples.
        batch_sampler: yields the batches, lists of `Draw` for a transform that augments, else of indices.
        transform: makes (M, B, 3, H, W) float32 of uint8, on the device.
    """

    def __init__(
        self,
        pixels: np.ndarray,
        samples: Sequence[Sample],
        batch_sampler: Sampler,
        transform: DeviceAugment | DeviceNormalize,
    ):
        self.pixels = pixels
        self.samples = samples
        self.batch_sampler = batch_sampler
        self.transform = transform
        self.ids = torch.tensor(
            [(s.pid, s.camid, s.sceneid, i, *s.present) for i, s in enumerate(samples)]
        )  # (N, 4 + M)
        self.complete = all(all(sample.present) for sample in samples)

    def batches(self, device: torch.device) -> Iterator[Batch]:
        """One pass of the sampler; while a batch is in use, the next is made ready."""
        self.transform.to(device)
        stream = _copying_stream(device) if device.type == "cuda" else None
        with ThreadPoolExecutor(1, "batches") as thread, ThreadPoolExecutor(GATHERERS, "pixels") as gatherers:
            current = None
            for items in self.batch_sampler:
                upcoming = thread.submit(self._stage, items, device, stream, gatherers)
                if current is not None:
                    yield self._finish(current.result())
                current = upcoming
            if current is not None:
                yield self._finish(current.result())

    def _stage(
        self, items: list, device: torch.device, stream: torch.cuda.Stream | None, gatherers: ThreadPoolExecutor
    ) -> Staged:
        """Gathers a batch and sends it to the device, on CUDA without waiting for it.

        Page-locked memory comes from torch's own pool, which hands a buffer out again only after the copies out of it.
        """
        indices, drawn = items, []
        if isinstance(self.transform, DeviceAugment):
            indices = [draw.index for draw in items]
            drawn = [self.transform.draw(items[0].epoch, [draw.position for draw in items])]
        ids = self.ids[indices].T.contiguous()
        path = [self.samples[index].path for index in indices]
        pinned = stream is not None
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            pixels = torch.empty((len(indices), *self.pixels.shape[1:]), dtype=torch.uint8, pin_memory=pinned)
            self._gather(indices, pixels.numpy(), gatherers)
            tensors = [tensor.pin_memory() if pinned else tensor for tensor in (pixels, ids, *drawn)]
            sent = [tensor.to(device, non_blocking=pinned) for tensor in tensors]
            return Staged(sent, path, stream.record_event() if stream is not None else None)

    def _gather(self, indices: list[int], out: np.ndarray, gatherers: ThreadPoolExecutor) -> None:
        """Copies the pixels of some triples, by a few threads: the first batch of a pass is waited for."""

        def copy(rows: slice) -> None:
            np.take(self.pixels, indices[rows], axis=0, out=out[rows], mode="clip")  # other modes copy twice

        size = max(1, math.ceil(len(indices) / GATHERERS))
        list(gatherers.map(copy, [slice(i, i + size) for i in range(0, len(indices), size)]))

    def _finish(self, staged: Staged) -> Batch:
        pixels, ids, *drawn = staged.tensors
        if staged.arrived is not None:
            stream = torch.cuda.current_stream(pixels.device)
            stream.wait_event(staged.arrived)
            for tensor in staged.tensors:
                tensor.record_stream(stream)  # its memory is not reused before this stream is done with it
        images = self.transform(pixels.transpose(0, 1), *drawn)  # one block a modality
        pid, camid, sceneid, index = ids[:4]
        present = None if self.complete else ids[4:].T.bool()
        if present is not None:
            images = torch.where(present.T[:, :, None, None, None], images, 0.0)
        return Batch(dict(zip(MODALITIES, images, strict=True)), pid, camid, sceneid, index, staged.path, present)
