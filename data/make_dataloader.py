"""Batches of aligned RGB, NI and TI images, for training by identity and for evaluation in a fixed order."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, default_collate
from yacs.config import CfgNode

from utils.distributed import from_main, local_rank, rank, share, world_size
from utils.errors import UserError
from utils.modalities import MODALITIES

from .batch import Batch
from .cache import PixelSource, choose_cache, load_pixels
from .cached_batches import CachedBatches
from .datasets import DatasetSplits, Sample, load_dataset
from .device_transforms import DeviceAugment, DeviceNormalize
from .images import check_images, read_triple
from .manifest import load_manifest
from .sampler import Draw, IdentityBatchSampler
from .transforms import EvalTransform, TrainTransform, make_transforms, seeded
from .workers import count_workers, tell_lost_workers, worker_options

logger = logging.getLogger(__name__)


def collate(items: Sequence[tuple]) -> Batch:
    """Joins items of a `TripleDataset`, tuples in the order of Batch's fields, with `present` in all or in none."""
    images, pid, camid, sceneid, index, path, *present = default_collate(items)
    return Batch(images, pid, camid, sceneid, index, list(path), *present)


class TripleDataset(Dataset):
    """The triples of a list, as `transform` makes them."""

    def __init__(self, samples: Sequence[Sample], transform: TrainTransform | EvalTransform):
        self.samples = samples
        self.transform = transform
        self.complete = all(all(sample.present) for sample in samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple:
        sample = self.samples[index]
        images = self.transform(read_triple(sample))  # (M, 3, H, W)
        present = torch.tensor(sample.present)
        images[~present] = 0.0
        named = dict(zip(MODALITIES, images, strict=True))
        item = (named, sample.pid, sample.camid, sample.sceneid, index, sample.path)
        return item if self.complete else (*item, present)


class AugmentedDataset(Dataset):
    """Training triples; the augmentation of a `Draw` depends on the seed, its epoch and its position alone."""

    def __init__(self, triples: TripleDataset, seed: int):
        self.triples = triples
        self.seed = seed

    def __len__(self) -> int:
        return len(self.triples)

    def __getitem__(self, draw: Draw) -> tuple:
        with seeded(self.seed, draw.epoch, draw.position):
            return self.triples[draw.index]


class TrainLoader:
    """The batches of one epoch; `set_epoch` comes before each pass.

    Nothing depends on the number of workers or on the global random state, and neither is changed: a run that stopped
    after step s of an epoch goes on with `set_epoch(epoch, start_step=s)` and sees the batches it would have seen.
    """

    def __init__(self, loader: DataLoader | CachedBatches):
        self.loader = loader

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Chooses the epoch (from 1); the next pass leaves out its first `start_step` batches."""
        self.loader.batch_sampler.set_epoch(epoch, start_step)

    def __len__(self) -> int:
        """Batches of the chosen epoch, counted from its beginning; varies a little from epoch to epoch."""
        return len(self.loader.batch_sampler)

    def batches(self, device: torch.device) -> Iterator[Batch]:
        """One pass, the batches on the device."""
        return _batches(self.loader, device)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(torch.device("cpu"))


class EvalLoader:
    """Every distinct triple of query and gallery once, in a fixed order.

    Of several ranks, each iterates over its share of that order, see `utils.distributed.share`.

    Attributes:
        indices: what a pass goes through of that order, all unless it is set to less.
        query, gallery: int64 indices into that order.
        pids, camids, sceneids: int64, one entry a triple.
        paths: the RGB images' files.
        protocol: "camera" or "scene", what a match must not share with its query.
    """

    def __init__(
        self,
        loader: DataLoader | CachedBatches,
        samples: Sequence[Sample],
        query: Sequence[Sample],
        gallery: Sequence[Sample],
        protocol: str,
    ):
        self.loader = loader
        self.protocol = protocol
        place = {sample: index for index, sample in enumerate(samples)}
        self.query, self.gallery = (torch.tensor([place[sample] for sample in split]) for split in (query, gallery))
        self.pids = torch.tensor([sample.pid for sample in samples])
        self.camids = torch.tensor([sample.camid for sample in samples])
        self.sceneids = torch.tensor([sample.sceneid for sample in samples])
        self.paths = [sample.path for sample in samples]

    @property
    def indices(self) -> Sequence[int]:
        return self.loader.batch_sampler.sampler

    @indices.setter
    def indices(self, indices: Sequence[int]) -> None:
        self.loader.batch_sampler.sampler = indices

    def __len__(self) -> int:
        return len(self.loader.batch_sampler)

    def batches(self, device: torch.device) -> Iterator[Batch]:
        """One pass, the batches on the device."""
        return _batches(self.loader, device)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(torch.device("cpu"))


@dataclass(frozen=True)
class ReidData:
    """What training and evaluation see of a data set.

    Attributes:
        train: None where the training set was not asked for.
        val: query and gallery.
        num_classes: training identities; 0 where there is no training folder.
        num_cameras: rows a camera embedding needs, see `DatasetSplits.num_cameras`.
        identities: label -> identity as the files name it.
    """

    train: TrainLoader | None
    val: EvalLoader
    num_classes: int
    num_cameras: int
    identities: tuple[int, ...]


def make_dataloader(cfg: CfgNode, train: bool = True) -> ReidData:
    """Builds the loaders that DATASETS, DATALOADER, INPUT, SOLVER and TEST describe.

    Args:
        train: False builds no training loader, decodes nothing beforehand and does not ask for a training folder.

    Raises:
        UserError: what is wrong with the data set, the batch size, the cache or, under DATASETS.CHECK or with a cache,
            the image files.
    """
    splits = load_splits(cfg, train)
    evaluated = list(dict.fromkeys(splits.query + splits.gallery))
    if len(evaluated) < world_size():
        raise UserError(
            f"{len(evaluated)} test images for {world_size()} ranks: start at most {len(evaluated)} processes."
        )
    workers = count_workers(cfg.DATALOADER.NUM_WORKERS)
    cuda = cfg.MODEL.DEVICE.startswith(("auto", "cuda")) and torch.cuda.is_available()
    augment, prepare = make_transforms(cfg)

    ordered = BatchSampler(share(len(evaluated)), cfg.TEST.IMS_PER_BATCH, drop_last=False)
    sources = [PixelSource(f"{splits.name}_test", evaluated, prepare.size, prepare.resample)]
    if train:
        labelled = _labelled(splits)
        _check_divides(cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATION, cfg.DATALOADER.NUM_INSTANCE)
        by_identity = _identity_sampler(cfg, labelled)
        sources.append(PixelSource(f"{splits.name}_train", labelled, augment.size, augment.resample))

    cache = from_main(lambda: choose_cache(cfg.DATALOADER.CACHE, sources, cuda=cuda, train=train))
    val: DataLoader | CachedBatches
    training: DataLoader | CachedBatches | None = None
    if cache == "off":
        if train and cfg.DATASETS.CHECK and local_rank() == 0:
            check_images(splits.train + evaluated, workers)
        options = _loader_options(workers, cfg.TEST.IMS_PER_BATCH, prepare.size, cuda)
        val = DataLoader(TripleDataset(evaluated, prepare), batch_sampler=ordered, **options)
        if train:
            triples = AugmentedDataset(TripleDataset(labelled, augment), cfg.SOLVER.SEED)
            options = _loader_options(workers, cfg.SOLVER.IMS_PER_BATCH // world_size(), augment.size, cuda)
            stay = options["num_workers"] > 0
            training = DataLoader(triples, batch_sampler=by_identity, persistent_workers=stay, **options)
    else:
        root = Path(cfg.DATASETS.ROOT_DIR).expanduser()
        folder = Path(cfg.DATALOADER.CACHE_DIR).expanduser() if cfg.DATALOADER.CACHE_DIR else root / "cache"
        pixels = load_pixels(sources, workers, folder=folder if cache == "disk" else None, root=root)
        val = CachedBatches(pixels[0], evaluated, ordered, DeviceNormalize(prepare.mean, prepare.std))
        if train:
            training = CachedBatches(pixels[1], labelled, by_identity, DeviceAugment(augment, cfg.SOLVER.SEED))
    return ReidData(
        train=TrainLoader(training) if training is not None else None,
        val=EvalLoader(val, evaluated, splits.query, splits.gallery, splits.protocol),
        num_classes=len(splits.identities),
        num_cameras=splits.num_cameras,
        identities=splits.identities,
    )


def load_splits(cfg: CfgNode, train: bool = True) -> DatasetSplits:
    """The lists of the data set that DATASETS names; see `datasets.load_dataset` and `manifest.load_manifest`."""
    names = cfg.DATASETS.NAMES
    name = names if isinstance(names, str) else names[0]
    if name != "manifest":
        return load_dataset(name, cfg.DATASETS.ROOT_DIR, train)
    root = Path(cfg.DATASETS.ROOT_DIR).expanduser()
    path = Path(cfg.DATASETS.MANIFEST).expanduser() if cfg.DATASETS.MANIFEST else root / "manifest.csv"
    return load_manifest(path, root, train)


def _labelled(splits: DatasetSplits) -> list[Sample]:
    """The training triples, their identities numbered from 0."""
    label = {pid: index for index, pid in enumerate(splits.identities)}
    return [replace(sample, pid=label[sample.pid]) for sample in splits.train]


def _identity_sampler(cfg: CfgNode, samples: Sequence[Sample]) -> IdentityBatchSampler:
    return IdentityBatchSampler(
        [sample.pid for sample in samples],
        ids_per_batch=cfg.SOLVER.IMS_PER_BATCH // cfg.DATALOADER.NUM_INSTANCE,
        instances=cfg.DATALOADER.NUM_INSTANCE,
        seed=cfg.SOLVER.SEED,
        rank=rank(),
        world_size=world_size(),
        parts=cfg.SOLVER.ACCUMULATION,
    )


def _check_divides(batch: int, parts: int, instances: int) -> None:
    ranks = world_size()
    if batch % (ranks * parts) == 0:
        return
    unit = math.lcm(ranks * parts, parts * instances)
    below = batch // unit * unit
    fits = f"{below} or {below + unit}" if below else str(unit)
    raise UserError(
        f"SOLVER.IMS_PER_BATCH {batch} is the batch of all ranks together, and cannot be divided among {ranks} ranks x "
        f"{parts} micro-batches (SOLVER.ACCUMULATION). Set SOLVER.IMS_PER_BATCH to {fits}, or start another number of "
        "processes."
    )


def _loader_options(workers: int, batch_size: int, size: Sequence[int], pin_memory: bool) -> dict[str, Any]:
    """Options of DataLoader common to training and evaluation, whose batches are float32."""
    batch_bytes = 4 * batch_size * len(MODALITIES) * 3 * size[0] * size[1]
    return {"collate_fn": collate, "pin_memory": pin_memory, **worker_options(workers, batch_bytes)}


def _batches(loader: DataLoader | CachedBatches, device: torch.device) -> Iterator[Batch]:
    """The loader's batches on a device; what went wrong in a worker process is told without its traceback."""
    if isinstance(loader, CachedBatches):
        yield from loader.batches(device)
        return
    try:
        with tell_lost_workers():
            for batch in loader:
                yield batch.to(device, non_blocking=True)
    except UserError as error:
        raise UserError(str(error).split(f"{UserError.__name__}: ")[-1].strip()) from None
