"""A data set listed in a CSV: hand-written rows, all faults with their lines, samples that lack a modality."""

import csv
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from configs import load_cfg
from data import make_dataloader
from data.datasets import ImageSource, Sample
from data.manifest import load_manifest
from engine import do_train
from modeling import make_model
from solver import create_scheduler, make_loss, make_optimizer
from tools.make_manifest import main as make_manifest
from utils.errors import UserError
from utils.modalities import MODALITIES

HEADER = "split,pid,camid,sceneid,RGB,NI,TI\n"


@pytest.fixture
def images(tmp_path):
    """A folder with a.png to f.png, each of one grey."""
    for i, name in enumerate("abcdef"):
        Image.new("RGB", (8, 16), (40 * i + 20,) * 3).save(tmp_path / f"{name}.png")
    return tmp_path


def read(folder, text, **options):
    (folder / "list.csv").write_text(text, encoding="utf-8")
    return load_manifest(folder / "list.csv", folder / "elsewhere", **options)


def test_rows_become_samples(images):
    (images / "elsewhere").mkdir()
    (images / "a.png").rename(images / "elsewhere" / "a.png")
    text = HEADER + "train,7,0,,a.png,b.png,c.png\ntrain,9,2,,,d.png,\n\nTest,12,1,,./e.png,,f.png\n"
    splits = read(images, "\ufeff" + text.replace("\n", "\r\n"))
    b, c, d, e, f = (ImageSource(str(images / f"{name}.png")) for name in "bcdef")
    a = ImageSource(str(images / "elsewhere" / "a.png"))
    assert splits.train == [Sample(7, 0, -1, (a, b, c)), Sample(9, 2, -1, (None, d, None))]
    assert splits.query == splits.gallery == [Sample(12, 1, -1, (e, None, f))]
    assert splits.protocol == "camera" and splits.num_cameras == 3 and splits.name == "list"
    assert splits.train[1].path == d.path and splits.train[1].present == (False, True, False)


def test_scenes_make_the_protocol(images):
    rows = "train,1,0,,a.png,,\ntrain,2,0,,b.png,,\nquery,3,0,{},c.png,,\ngallery,3,0,5,d.png,,\n"
    assert read(images, HEADER + rows.format(4)).protocol == "scene"
    with pytest.raises(UserError, match="some name a scene and some do not"):
        read(images, HEADER + rows.format(""))


def test_columns_may_stand_in_any_order(images):
    splits = read(images, "TI,NI,RGB,pid,split,camid,sceneid\n,,a.png,1,test,0,\n", train=False)
    assert splits.query[0].images[0] is not None and splits.query[0].images[2] is None


def test_all_faults_come_at_once_with_their_lines(images):
    text = HEADER + (
        "train,1,0,,a.png,b.png,c.png\n"
        "train,x,0,,a.png,,\n"
        "train,2,-1,,b.png,,\n"
        "train,3,0,first,c.png,,\n"
        "valid,4,0,,d.png,,\n"
        "train,5,0,,,,\n"
        "train,6,0,,../a.png,,\n"
        "train,6,0,,sub/../../a.png,,\n"
        f"train,6,0,,{images / 'a.png'},,\n"
        "train,7,0,,none.png,,\n"
        "train,8,0,,a.png\n"
        "train,1,0,,a.png,b.png,c.png\n"
        "query,9,1000,,e.png,,\n"
    )
    with pytest.raises(UserError) as error:
        read(images, text)
    for told in (
        "list.csv cannot be used",
        "pid: not whole numbers from 0 (1): line 3 'x'",
        "line 4 '-1'",
        "line 14 '1000'",
        "sceneid: not whole numbers from 0 (1): line 5 'first'",
        "no such split, expected train, query, gallery, test (1): line 6 'valid'",
        "rows without an image (1): line 7",
        "out of the data set's folder (3): line 8 '../a.png', line 9 'sub/../../a.png', line 10",
        "not there (1): line 11 'none.png'",
        "rows that have not 7 cells (1): line 12: 5",
        "rows that come twice (1): line 13 as line 2",
        "splits without a row (1): gallery",
    ):
        assert told in str(error.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"split;pid;camid;sceneid;RGB;NI;TI\n", "separated by commas"),
        (b"", "the first line is ''"),
        (b"\xff\xfe\x00", "cannot be read as a CSV in UTF-8"),
    ],
)
def test_files_that_are_no_manifest(tmp_path, content, told):
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(UserError, match=told):
        load_manifest(tmp_path / "list.csv", tmp_path)
    with pytest.raises(UserError, match=r"no such file.*\n?.*DATASETS.MANIFEST"):
        load_manifest(tmp_path / "other.csv", tmp_path)


@pytest.fixture
def partial(tiny_dataset, tiny_yaml, tmp_path):
    """`partial(KEY, VALUE, …)` -> config of the tiny data set as a manifest in which every second sample lacks NI, and
    every fifth has TI alone."""
    rows = []
    for split, name in (("train", "train_171"), ("test", "test")):
        for i, path in enumerate(sorted((tiny_dataset / "RGBNT201" / name / "RGB").iterdir())):
            files = [f"RGBNT201/{name}/{m}/{path.name}" for m in MODALITIES]
            for m in [1] * (i % 2) + [0, 1] * (i % 5 == 4):
                files[m] = ""
            rows.append([split, int(path.name[:6]), int(path.name[10]) - 1, "", *files])
    with open(tmp_path / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows([HEADER.strip().split(","), *rows])
    own = ("DATASETS.NAMES", "manifest", "DATASETS.MANIFEST", str(tmp_path / "list.csv"))
    return lambda *opts: load_cfg(tiny_yaml, (*own, *opts))


@pytest.mark.parametrize("cache", ["off", "memory"])
def test_batches_tell_what_is_present_and_blank_the_rest(partial, cache):
    data = make_dataloader(partial("DATALOADER.CACHE", cache))
    data.train.set_epoch(1)
    for batch in [*data.train, *data.val]:
        odd, fifth = batch.index % 2 == 1, batch.index % 5 == 4
        assert torch.equal(batch.present, torch.stack([~fifth, ~(odd | fifth), torch.ones_like(odd)], dim=1))
        for i, m in enumerate(MODALITIES):
            there = batch.images[m].flatten(1).abs().amax(1) > 0
            assert torch.equal(there, batch.present[:, i])


def test_complete_data_has_no_mask(tiny_cfg):
    data = make_dataloader(tiny_cfg())
    data.train.set_epoch(1)
    assert all(batch.present is None for batch in [*data.train, *data.val])


def test_cached_and_read_pixels_agree(partial):
    read, cached = (list(make_dataloader(partial("DATALOADER.CACHE", c), train=False).val) for c in ("off", "memory"))
    for a, b in zip(read, cached, strict=True):
        assert all(torch.equal(a.images[m], b.images[m]) for m in MODALITIES) and a.path == b.path


@pytest.mark.parametrize("direct", [0, 1])
def test_training_and_evaluation_with_samples_that_lack_a_modality(partial, direct, monkeypatch):
    """`present` reaches the model in every forward pass, and the run ends with weights that are finite."""
    cfg = partial("MODEL.DIRECT", str(direct), "MODEL.HDM", "True", "MODEL.ATM", "True", "SOLVER.MAX_EPOCHS", "2")
    data = make_dataloader(cfg)
    model = make_model(cfg, num_classes=data.num_classes, num_cameras=data.num_cameras, pretrained=False)
    seen, encode = [], type(model).encode

    def watched(self, images, camid=None, present=None):
        seen.append(present)
        return encode(self, images, camid, present)

    monkeypatch.setattr(type(model), "encode", watched)
    optimizer = make_optimizer(cfg, model)
    results = do_train(cfg, model, data, make_loss(cfg, data.num_classes), optimizer, create_scheduler(cfg, optimizer))
    assert all(present is not None for present in seen) and not all(present.all() for present in seen)
    assert all(p.isfinite().all() for p in model.parameters())
    assert results["last"]["both"]["mAP"] > 0


def test_market_1501_becomes_a_manifest(tmp_path):
    for name in (
        "bounding_box_train/0002_c1s1_000451_03.jpg",
        "bounding_box_train/0007_c6s3_000001_00.jpg",
        "query/0001_c1s1_001051_00.jpg",
        "bounding_box_test/0001_c2s1_000301_00.jpg",
        "bounding_box_test/-1_c1s1_000401_03.jpg",
        "bounding_box_test/0000_c1s1_000151_01.jpg",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    make_manifest(tmp_path, None, "NI")
    lines = (tmp_path / "manifest.csv").read_text().splitlines()
    assert lines[0] == HEADER.strip()
    assert lines[1] == "train,2,0,,,bounding_box_train/0002_c1s1_000451_03.jpg,"
    assert len(lines) == 6 and lines[5] == "gallery,1,1,,,bounding_box_test/0001_c2s1_000301_00.jpg,"
    splits = load_manifest(tmp_path / "manifest.csv", tmp_path)
    assert [(s.pid, s.camid) for s in splits.gallery] == [(0, 0), (1, 1)]
    (tmp_path / "query" / "me.jpg").touch()
    with pytest.raises(UserError, match="me.jpg: expected a name such as"):
        make_manifest(tmp_path, None, "NI")
    with pytest.raises(UserError, match="bounding_box_train: no image there"):
        make_manifest(tmp_path / "query", None, "NI")


def test_the_example_of_the_documentation_can_be_read(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "own_data.md").read_text(encoding="utf-8")
    text = re.search(r"```csv\n(.*?)```", page, re.DOTALL)[1]
    for name in re.findall(r"\w+/\w+\.jpg", text):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    splits = read(tmp_path, text)
    assert [len(split) for split in (splits.train, splits.query, splits.gallery)] == [4, 3, 3]
    assert splits.train[2].present == (True, False, False)
