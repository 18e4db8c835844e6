"""Loaders from cached pixels against loaders from files: the same batches, in every cut, and nothing left behind."""

import importlib
import shutil
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data import cache, make_dataloader
from data.images import read_triple
from data.sampler import Draw
from utils.errors import UserError
from utils.modalities import MODALITIES

module = importlib.import_module("data.make_dataloader")  # the package exports a function of the same name
CPU = torch.device("cpu")
SIZE = (32, 16)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Four training identities with five triples each, two test identities with three; some files need resizing."""
    root = tmp_path_factory.mktemp("data")
    names = [("train_171", f"{pid:06}_cam{1 + i % 3}_0_{i:02}") for pid in (12, 5, 30, 7) for i in range(5)]
    names += [("test", f"{pid:06}_cam{1 + i % 2}_0_{i:02}") for pid in (900, 901) for i in range(3)]
    rng = np.random.default_rng(0)
    for place, (split, name) in enumerate(names):
        for modality in MODALITIES:
            path = root / "RGBNT201" / split / modality / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            height, width = (41, 27) if place % 3 == 0 else SIZE
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture
def config(root, tmp_path):
    def make(cache, root=root, **changes):
        inputs = {"PROB": 0.5, "RE_PROB": 0.5, "PADDING": 2, "SYNC_AUG": False}
        colours = {"PIXEL_MEAN": [0.5, 0.4, 0.3], "PIXEL_STD": [0.5, 0.25, 0.2]}
        return SimpleNamespace(
            MODEL=SimpleNamespace(DEVICE="cpu"),
            INPUT=SimpleNamespace(SIZE_TRAIN=list(SIZE), SIZE_TEST=list(SIZE), **colours, **(inputs | changes)),
            DATASETS=SimpleNamespace(NAMES="RGBNT201", ROOT_DIR=str(root), CHECK=True),
            DATALOADER=SimpleNamespace(
                NUM_WORKERS=0, NUM_INSTANCE=2, CACHE=cache, CACHE_DIR=str(tmp_path / "cache") if cache == "disk" else ""
            ),
            SOLVER=SimpleNamespace(SEED=1111, IMS_PER_BATCH=4, ACCUMULATION=1),
            TEST=SimpleNamespace(IMS_PER_BATCH=4),
        )

    return make


def epoch_of(loader, epoch, start_step=0):
    loader.set_epoch(epoch, start_step)
    return list(loader.batches(CPU))


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.path == other.path
        for name in ("pid", "camid", "sceneid", "index"):
            assert torch.equal(getattr(batch, name), getattr(other, name))
        assert tuple(batch.images) == tuple(other.images) == MODALITIES
        for modality in MODALITIES:
            assert batch.images[modality].is_contiguous()
            assert torch.equal(batch.images[modality], other.images[modality])


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_evaluation_batches_have_the_bits_of_the_plain_path(config, cache):
    plain, cached = (make_dataloader(config(kind), train=False).val for kind in ("off", cache))
    assert list(cached.indices) == list(plain.indices) == list(range(6)) and len(cached) == len(plain) == 2
    assert_same(list(cached.batches(CPU)), list(plain.batches(CPU)))
    for val in (plain, cached):
        val.indices = [4, 1, 3, 0, 5]
        assert len(val) == 2
    assert_same(list(cached.batches(CPU)), list(plain.batches(CPU)))
    assert torch.cat([batch.index for batch in cached]).tolist() == [4, 1, 3, 0, 5]


def test_training_batches_without_augmentation_have_the_bits_of_the_plain_path(config):
    still = {"PROB": 0.0, "RE_PROB": 0.0, "PADDING": 0}
    plain, cached = (make_dataloader(config(kind, **still)).train for kind in ("off", "memory"))
    for epoch in (1, 2):
        assert_same(epoch_of(cached, epoch), epoch_of(plain, epoch))


def test_memory_and_disk_give_the_same_augmented_batches(config):
    memory, disk, plain = (make_dataloader(config(kind)).train for kind in ("memory", "disk", "off"))
    batches, others, files = (epoch_of(loader, 1) for loader in (memory, disk, plain))
    assert_same(batches, others)
    assert [batch.path for batch in batches] == [batch.path for batch in files]
    assert not torch.equal(batches[0].images["RGB"], files[0].images["RGB"])  # other draws of the same distribution


def test_resume_in_the_middle_of_an_epoch_repeats_nothing(config):
    whole = epoch_of(make_dataloader(config("memory")).train, 2)
    loader = make_dataloader(config("memory")).train
    loader.set_epoch(2)
    passing = loader.batches(CPU)
    first = next(passing)
    passing.close()  # the next batch was being made ready
    assert_same([first, *epoch_of(loader, 2, start_step=1)], whole)
    assert not torch.equal(epoch_of(loader, 3)[0].images["RGB"], whole[0].images["RGB"])
    assert_same(epoch_of(loader, 2), whole)


def test_augmentation_does_not_depend_on_how_an_epoch_is_split(config):
    """As if each batch were shared out: every second triple of a batch on its own."""
    reid = make_dataloader(config("memory"))
    whole = epoch_of(reid.train, 1)
    sampler = reid.train.loader.batch_sampler
    reid.train.loader.batch_sampler = [draws[1::2] for draws in sampler]
    for batch, part in zip(whole, reid.train.batches(CPU), strict=True):
        assert part.path == batch.path[1::2] and torch.equal(part.index, batch.index[1::2])
        for modality in MODALITIES:
            assert torch.equal(part.images[modality], batch.images[modality][1::2])


def test_the_same_image_is_augmented_anew_at_another_place(config):
    loader = make_dataloader(config("memory")).train
    places = [(1, 0), (1, 1), (2, 0), (1, 0)]
    loader.loader.batch_sampler = [[Draw(0, epoch, position)] for epoch, position in places]
    first, *others, again = [torch.stack(list(batch.images.values())) for batch in loader.batches(CPU)]
    assert torch.equal(first, again)
    assert not any(torch.equal(first, other) for other in others)


def test_batches_may_be_kept(config):
    """A batch owns its memory: the ones that are made ready behind it do not change it."""
    loader = make_dataloader(config("memory")).train
    loader.set_epoch(1)
    for batch, again in zip(epoch_of(loader, 1), loader.batches(CPU), strict=True):
        assert torch.equal(batch.images["TI"], again.images["TI"])


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.mark.parametrize("end", ["close", "error", "forget"])
def test_an_early_end_leaves_no_thread(config, end):
    loader = make_dataloader(config("memory")).train
    loader.set_epoch(1)
    passing = loader.batches(CPU)
    next(passing)
    assert threads()
    if end == "close":
        passing.close()
    elif end == "error":
        with pytest.raises(KeyError):
            passing.throw(KeyError())
    else:
        del passing
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads()


def test_an_error_in_the_thread_reaches_the_loop(config):
    reid = make_dataloader(config("memory"), train=False)
    reid.val.indices = [0, 1, 2, 3, 99]
    passing = reid.val.batches(CPU)
    next(passing)
    with pytest.raises(IndexError):
        next(passing)
    assert not threads()


def test_with_a_cache_nothing_is_decoded_twice(config, monkeypatch):
    monkeypatch.setattr(module, "check_images", None)
    seen = []
    monkeypatch.setattr(cache, "read_triple", lambda sample: seen.append(sample.path) or read_triple(sample))
    reid = make_dataloader(config("memory"))
    epoch_of(reid.train, 1)
    list(reid.val)
    assert len(seen) == len(set(seen)) == 26


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_broken_images_of_all_splits_are_told_together(config, root, tmp_path, cache):
    copy = shutil.copytree(root, tmp_path / "copy")
    for split in ("train_171", "test"):
        for path in sorted((copy / "RGBNT201" / split / "NI").iterdir())[:2]:
            path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="4 of 78 image files") as error:
        make_dataloader(config(cache, copy))
    assert str(error.value).count("/train_171/NI/") == 2 and str(error.value).count("/test/NI/") == 2


def test_cache_lies_beside_the_data_unless_told_otherwise(config, root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")
    cfg = config("disk", copy)
    make_dataloader(cfg)
    names = {"RGBNT201_test_32x16.pixels", "RGBNT201_train_32x16.pixels"}
    assert {path.name for path in (tmp_path / "cache").glob("*.pixels")} == names
    cfg.DATALOADER.CACHE_DIR = ""
    make_dataloader(cfg)
    assert {path.name for path in (copy / "cache").glob("*.pixels")} == names
