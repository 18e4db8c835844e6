"""Loaders on small image files: the same batches whatever the workers, and faults that reach the user."""

import importlib
import os
import pickle
import random
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data import make_dataloader
from utils.errors import UserError
from utils.modalities import MODALITIES

module = importlib.import_module("data.make_dataloader")  # the package exports a function of the same name
TRAIN_IDS = (12, 5, 30, 7)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Four training identities with five triples each on three cameras, two test identities on two cameras."""
    root = tmp_path_factory.mktemp("data")
    names = [("train_171", f"{pid:06}_cam{1 + i % 3}_0_{i:02}") for pid in TRAIN_IDS for i in range(5)]
    names += [("test", f"{pid:06}_cam{1 + i % 2}_0_{i:02}") for pid in (900, 901) for i in range(3)]
    rng = np.random.default_rng(0)
    for split, name in names:
        for modality in MODALITIES:
            path = root / "RGBNT201" / split / modality / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 16, 3), dtype=np.uint8)).save(path)
    return root


def config(root, workers=0, **datasets):
    return SimpleNamespace(
        MODEL=SimpleNamespace(DEVICE="cpu"),
        INPUT=SimpleNamespace(
            SIZE_TRAIN=[32, 16],
            SIZE_TEST=[32, 16],
            PROB=0.5,
            RE_PROB=0.5,
            PADDING=2,
            PIXEL_MEAN=[0.5, 0.5, 0.5],
            PIXEL_STD=[0.5, 0.5, 0.5],
            SYNC_AUG=False,
        ),
        DATASETS=SimpleNamespace(**{"NAMES": "RGBNT201", "ROOT_DIR": str(root), "CHECK": False} | datasets),
        DATALOADER=SimpleNamespace(NUM_WORKERS=workers, NUM_INSTANCE=2, CACHE="off", CACHE_DIR=""),
        SOLVER=SimpleNamespace(SEED=1111, IMS_PER_BATCH=4, ACCUMULATION=1),
        TEST=SimpleNamespace(IMS_PER_BATCH=4),
    )


def epoch_of(loader, epoch, start_step=0):
    loader.set_epoch(epoch, start_step)
    return list(loader)


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.path == other.path
        for name in ("pid", "camid", "sceneid", "index"):
            assert torch.equal(getattr(batch, name), getattr(other, name))
        for modality in MODALITIES:
            assert torch.equal(batch.images[modality], other.images[modality])


def test_training_batches(root):
    reid = make_dataloader(config(root))
    assert reid.num_classes == 4 and reid.identities == (5, 7, 12, 30)
    assert reid.num_cameras == 3 and reid.val.protocol == "camera"
    batches = epoch_of(reid.train, 1)
    assert len(batches) == len(reid.train) >= 3
    for batch in batches:
        assert tuple(batch.images) == MODALITIES
        assert all(x.shape == (4, 3, 32, 16) and x.dtype == torch.float32 for x in batch.images.values())
        for i, path in enumerate(batch.path):
            name = os.path.basename(path)
            assert reid.identities[batch.pid[i]] == int(name[:6])
            assert batch.camid[i] == int(name[10]) - 1
        assert batch.pid[0] == batch.pid[1] != batch.pid[2] == batch.pid[3]


def test_batches_do_not_depend_on_workers(root, monkeypatch):
    monkeypatch.setattr(module, "count_workers", lambda requested: requested)
    epochs = {}
    for workers in (0, 1, 2):
        loader = make_dataloader(config(root, workers)).train
        epochs[workers] = [epoch_of(loader, epoch) for epoch in (1, 2)]
        assert_same(epoch_of(loader, 2, start_step=1), epochs[workers][1][1:])
        next(iter(loader))  # a pass that is left early does not disturb the next
        assert_same(epoch_of(loader, 1), epochs[workers][0])
    for workers in (1, 2):
        assert_same(epochs[workers][0], epochs[0][0])
        assert_same(epochs[workers][1], epochs[0][1])
    assert epochs[0][0][0].path != epochs[0][1][0].path


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pass_draws_nothing_from_the_global_generators(root, workers):
    reid = make_dataloader(config(root, workers))
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    epoch_of(reid.train, 1)
    list(reid.val)
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state


def test_global_generators_do_not_change_the_augmentation(root):
    loader = make_dataloader(config(root)).train
    torch.manual_seed(1)
    first = epoch_of(loader, 3)
    torch.manual_seed(2)
    random.seed(2)
    assert_same(epoch_of(loader, 3), first)


def test_the_same_image_is_augmented_anew_at_another_place(root):
    dataset = make_dataloader(config(root)).train.loader.dataset
    draws = [module.Draw(0, epoch, position) for epoch, position in ((1, 0), (1, 1), (2, 0))]
    images = [dataset[draw][0]["RGB"] for draw in draws]
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_evaluation_sees_each_distinct_triple_once_in_order(root):
    val = make_dataloader(config(root)).val
    assert val.query.tolist() == val.gallery.tolist() == list(range(6))
    assert val.pids.tolist() == [900] * 3 + [901] * 3
    assert val.camids.tolist() == [0, 0, 1, 0, 0, 1]
    assert val.sceneids.tolist() == [-1] * 6
    batches = list(val)
    assert len(batches) == len(val) == 2
    assert [path for batch in batches for path in batch.path] == val.paths == sorted(val.paths)
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(6))
    assert torch.cat([batch.pid for batch in batches]).tolist() == val.pids.tolist()
    pixels = np.asarray(Image.open(val.paths[4].replace("/RGB/", "/TI/")))
    expected = torch.from_numpy(pixels.transpose(2, 0, 1) / 127.5 - 1).float()
    torch.testing.assert_close(batches[1].images["TI"][0], expected, rtol=0, atol=1e-6)


def test_query_apart_from_gallery(tmp_path):
    home = tmp_path / "RGBNT100" / "rgbir"
    files = {
        "bounding_box_train": ["0001_c0001_0", "0001_c0001_1", "0002_c0001_0", "0002_c0001_1"],
        "query": ["0007_c0002_0", "0009_c0002_0"],
        "bounding_box_test": ["0006_c0003_0", "0007_c0003_0", "0009_c0003_0"],
    }
    for folder, names in files.items():
        (home / folder).mkdir(parents=True)
        for name in names:
            Image.new("RGB", (768, 128)).save(home / folder / f"{name}.jpg")
    val = make_dataloader(config(tmp_path, NAMES=("RGBNT100",))).val
    assert val.pids[val.query].tolist() == [7, 9]
    assert val.pids[val.gallery].tolist() == [6, 7, 9]
    assert len(val.paths) == 5


def test_evaluation_alone(root, tmp_path):
    reid = make_dataloader(config(root), train=False)
    assert reid.train is None and reid.num_classes == 4
    (tmp_path / "RGBNT201").mkdir()
    (tmp_path / "RGBNT201" / "test").symlink_to(root / "RGBNT201" / "test")
    reid = make_dataloader(config(tmp_path), train=False)
    assert reid.num_classes == 0 and reid.identities == () and reid.num_cameras == 2


def break_image(root, tmp_path):
    copy = tmp_path / "copy"
    (copy / "RGBNT201").mkdir(parents=True)
    (copy / "RGBNT201" / "test").symlink_to(root / "RGBNT201" / "test")
    for modality in MODALITIES:
        folder = copy / "RGBNT201" / "train_171" / modality
        folder.mkdir(parents=True)
        for path in (root / "RGBNT201" / "train_171" / modality).iterdir():
            (folder / path.name).write_bytes(path.read_bytes()[: 100 if modality == "NI" else None])
    return copy


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_stops_training_with_its_name(root, tmp_path, workers):
    copy = break_image(root, tmp_path)
    with pytest.raises(UserError, match=r"20 of 78 image files"):
        make_dataloader(config(copy, workers, CHECK=True))
    loader = make_dataloader(config(copy, workers)).train
    with pytest.raises(UserError, match=r"^\S+/NI/0000\d\d_cam\S+png: cannot be decoded") as error:
        epoch_of(loader, 1)
    assert "Traceback" not in str(error.value)


def test_killed_worker_is_told(root):
    class Deadly(module.TripleDataset):
        def __getitem__(self, index):
            os.kill(os.getpid(), signal.SIGKILL)

    val = make_dataloader(config(root, workers=1)).val
    loader = torch.utils.data.DataLoader(Deadly(val.loader.dataset.samples, None), num_workers=1)
    with pytest.raises(UserError, match=r"NUM_WORKERS"):
        list(module._batches(loader, torch.device("cpu")))


def test_too_few_identities_for_a_batch(root):
    cfg = config(root)
    cfg.SOLVER.IMS_PER_BATCH = 10
    with pytest.raises(UserError, match=r"takes 5 identities .* has 4"):
        make_dataloader(cfg)


def test_batch_moves_and_datasets_pickle(root):
    reid = make_dataloader(config(root))
    batch = next(iter(reid.val)).to("meta", non_blocking=True)
    assert batch.images["NI"].is_meta and batch.index.is_meta and len(batch.path) == 4
    pickle.dumps((reid.train.loader.dataset, reid.val.loader.dataset))
