"""Decoded and resized images of a list of triples, (N, M, 3, H, W) uint8, in memory or in a memory-mapped file."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from utils.distributed import local_world_size
from utils.errors import UserError
from utils.modalities import MODALITIES

from .datasets import Sample
from .images import check_images, read_triple
from .transforms import to_pixels
from .workers import tell_lost_workers, worker_options

logger = logging.getLogger(__name__)

AUTO_LIMIT = 8 * 2**30
"""Bytes that `auto` takes at most."""
AUTO_SHARE = 4
"""... and at most one part in this many of the free memory."""
FORMAT = 1
"""Of the cache files; a file of another format is made anew."""
HEADER = 4096
"""Bytes before the pixels: the key, padded with spaces, so that the pixels begin on a page."""
BATCH = 16
"""Triples that a process decodes before it hands them over."""
MEMORY_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)
"""Limit, usage and its parts of a container's memory, in cgroups of version 2 and 1."""


@dataclass(frozen=True)
class PixelSource:
    """Which pixels a cache holds.

    Args:
        name: of the cache file, without the size: data set and split.
        samples: N triples.
        size: height and width in pixels.
        resample: the filter for images of another size.
    """

    name: str
    samples: Sequence[Sample]
    size: tuple[int, int]
    resample: Image.Resampling

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.samples), len(MODALITIES), 3, *self.size

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


def choose_cache(requested: str, sources: Sequence[PixelSource], *, cuda: bool, train: bool) -> str:
    """Makes "memory", "disk" or "off" of DATALOADER.CACHE, and logs why where that is "auto".

    Raises:
        UserError: "memory" is asked for and does not fit.
    """
    if requested not in ("auto", "memory"):
        return requested
    needed, free = sum(source.nbytes for source in sources), free_memory()
    processes = local_world_size()  # each of them has a cache of its own
    size = f"{_size(needed)} of decoded images" + (f" in each of {processes} processes" if processes > 1 else "")
    if requested == "memory":
        if free is not None and needed * processes > free:
            raise UserError(
                f"DATALOADER.CACHE memory: {size}, but {_size(free)} of memory are free. Set DATALOADER.CACHE to disk "
                "or off."
            )
        return "memory"
    if not cuda:
        chosen, reason = "off", "the network does not run on CUDA"
    elif not train:
        chosen, reason = "off", "the images are needed once"
    elif free is None:
        chosen, reason = "off", "the free memory is not known"
    else:
        chosen = "memory" if needed <= AUTO_LIMIT and needed * processes <= free // AUTO_SHARE else "off"
        reason = f"{size}; allowed are {_size(AUTO_LIMIT)} and 1/{AUTO_SHARE} of the {_size(free)} that are free"
    logger.info("DATALOADER.CACHE auto: %s (%s)", chosen, reason)
    return chosen


def load_pixels(sources: Sequence[PixelSource], workers: int, *, folder: Path | None, root: Path) -> list[np.ndarray]:
    """The pixels of each source, (N, M, 3, H, W) uint8.

    Args:
        workers: processes that decode; 0 decodes in this one.
        folder: of the cache files; None keeps everything in memory.
        root: image files are remembered relative to it, so that a data set may move together with its cache.

    Raises:
        UserError: images that cannot be decoded, all in one list, or a folder that cannot be written.
    """
    try:
        return [in_memory(s, workers) if folder is None else on_disk(s, folder, root, workers) for s in sources]
    except UserError:
        check_images([sample for source in sources for sample in source.samples], workers)
        raise
    except OSError as error:
        needed = _size(sum(source.nbytes for source in sources))
        raise UserError(
            f"{folder} cannot hold decoded images: {error}. Set DATALOADER.CACHE_DIR to a folder that you may write "
            f"to, with {needed} free, or DATALOADER.CACHE to memory or off."
        ) from error


def in_memory(source: PixelSource, workers: int) -> np.ndarray:
    """Decodes everything into an array; errors as in `decoded`."""
    start = time.perf_counter()
    pixels = np.empty(source.shape, dtype=np.uint8)
    for row, triple in zip(pixels, decoded(source, workers), strict=True):
        row[:] = triple
    seconds = time.perf_counter() - start
    logger.info(
        "%s: %d triples decoded in %.1f s, %s in memory", source.name, len(pixels), seconds, _size(pixels.nbytes)
    )
    return pixels


def on_disk(source: PixelSource, folder: Path, root: Path, workers: int) -> np.ndarray:
    """Maps the cache file of `source`, which is made before where it is missing, broken or made of anything else.

    It is written aside and moved into place when it is whole. One process writes, others wait for it.

    Raises:
        OSError: the folder cannot be written.
        UserError: as in `decoded`.
    """
    path = folder / f"{source.name}_{source.size[0]}x{source.size[1]}.pixels"
    header = _header(source, root)
    if _fault(path, header, source.nbytes):
        folder.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(folder / f".{path.name}.lock"):
            if fault := _fault(path, header, source.nbytes):  # another process may have been here first
                logger.info("%s: decoding %d triples, %s", path, len(source.samples), fault)
                _write(path, header, source, workers)
    pixels = np.memmap(path, dtype=np.uint8, mode="r", offset=HEADER, shape=source.shape)
    logger.info("%s: %d triples, %s mapped from %s", source.name, len(pixels), _size(pixels.nbytes), path)
    return pixels


class _Decoding(Dataset):
    """The triples of a source, decoded: (M, 3, H, W) uint8, or the UserError that says why not."""

    def __init__(self, source: PixelSource):
        self.source = source

    def __len__(self) -> int:
        return len(self.source.samples)

    def __getitem__(self, index: int) -> Tensor | UserError:
        try:
            return to_pixels(read_triple(self.source.samples[index]), self.source.size, self.source.resample)
        except UserError as error:  # one that is raised in a worker would keep all workers alive with its traceback
            return error


def _stack(items: Sequence[Tensor | UserError]) -> Tensor | UserError:
    """A batch, or the first of its errors."""
    errors = [item for item in items if isinstance(item, UserError)]
    return errors[0] if errors else torch.stack(items)


def decoded(source: PixelSource, workers: int) -> Iterator[np.ndarray]:
    """The triples in order, (M, 3, H, W) uint8 each, decoded by processes; shows its progress after two seconds.

    Threads would wait for Python's lock, which small images need for much of the time.

    Raises:
        UserError: a file cannot be decoded; the message names it.
    """
    batch_bytes = BATCH * int(np.prod(source.shape[1:]))
    loader = DataLoader(_Decoding(source), BATCH, collate_fn=_stack, **worker_options(workers, batch_bytes))
    bar = tqdm(total=len(source.samples), desc=f"decoding {source.name}", delay=2, leave=False, disable=None)
    with bar, tell_lost_workers():
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield from batch.numpy()
            bar.update(len(batch))


def free_memory() -> int | None:
    """Bytes that processes may still take: the kernel's estimate, or less where a container's limit is nearer."""
    try:
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(meminfo["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        return None
    for limit, usage, stat in MEMORY_GROUPS:
        try:
            statistics = dict(line.split() for line in Path(stat).read_text().splitlines())
            reclaimable = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
            taken = int(Path(usage).read_text()) - reclaimable
            free = min(free, int(Path(limit).read_text()) - taken)
        except (OSError, ValueError):  # no such group, or no limit ("max")
            continue
    return max(0, free)


def _header(source: PixelSource, root: Path) -> bytes:
    """What the pixels depend on, as a digest that begins the file."""
    files = {image.path: _size_and_time(image.path) for sample in source.samples for image in sample.sources}
    images = [
        image and (os.path.relpath(image.path, root), image.box, *files[image.path])
        for sample in source.samples
        for image in sample.images
    ]
    parts = (images, source.shape, source.resample.name, PIL.__version__)
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return json.dumps({"format": FORMAT, "shape": source.shape, "made_of": digest}).encode().ljust(HEADER)


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1  # no cache holds it; decoding will say what is wrong
    return status.st_size, status.st_mtime_ns


def _fault(path: Path, header: bytes, nbytes: int) -> str | None:
    """Why a cache file cannot be used."""
    try:
        with open(path, "rb") as file:
            found = file.read(HEADER)
            length = file.seek(0, os.SEEK_END)
    except FileNotFoundError:
        return "it is not there yet"
    if found != header:
        return "the one that is there was made of other files or in another way"
    if length != HEADER + nbytes:
        return f"the one that is there has {length} bytes instead of {HEADER + nbytes}"
    return None


def _write(path: Path, header: bytes, source: PixelSource, workers: int) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(header)
            for triple in decoded(source, workers):
                file.write(triple.data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Waits until no other process is inside; the lock ends with the process that holds it."""
    import fcntl  # not on Windows, where the rest of this file works

    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**29 else f"{nbytes / 2**20:.1f} MiB"
