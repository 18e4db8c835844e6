"""Parsers against hand-written file names; every fault of the files on disk told once."""

import shutil

import pytest

from data.datasets import ImageSource, Sample, load_dataset
from utils.errors import UserError
from utils.modalities import MODALITIES


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def write_rgbnt201(root, train=("000003_cam2_0_05.jpg", "000001_cam4_0_00.jpg"), test=("000300_cam1_1_12.jpg",)):
    home = root / "RGBNT201"
    for modality in MODALITIES:
        touch(*(home / "train_171" / modality / name for name in train))
        touch(*(home / "test" / modality / name for name in test))
    return home


def test_rgbnt201_by_hand(tmp_path):
    home = write_rgbnt201(tmp_path)
    splits = load_dataset("RGBNT201", tmp_path)
    train = home / "train_171"

    def sources(name):
        return tuple(ImageSource(str(train / modality / name)) for modality in ("RGB", "NI", "TI"))

    assert splits.train == [
        Sample(1, 3, -1, sources("000001_cam4_0_00.jpg")),
        Sample(3, 1, -1, sources("000003_cam2_0_05.jpg")),
    ]
    assert [(s.pid, s.camid) for s in splits.query] == [(300, 0)]
    assert splits.gallery == splits.query
    assert splits.protocol == "camera"
    assert splits.identities == (1, 3)
    assert splits.num_cameras == 4
    assert splits.train[0].path == str(train / "RGB" / "000001_cam4_0_00.jpg")


def test_rgbnt100_by_hand(tmp_path):
    home = tmp_path / "RGBNT100" / "rgbir"
    touch(
        home / "bounding_box_train" / "0502_c0001_000.jpg",
        home / "bounding_box_train" / "0007_c0008_012.jpg",
        home / "bounding_box_train" / "-1_c0002_012.jpg",
        home / "query" / "0009_c0002_001.jpg",
        home / "bounding_box_test" / "0009_c0003_001.jpg",
        home / "bounding_box_test" / "0010_c0003_001.jpg",
    )
    splits = load_dataset("RGBNT100", tmp_path)
    strip = str(home / "bounding_box_train" / "0007_c0008_012.jpg")
    boxes = [(0, 0, 256, 128), (256, 0, 512, 128), (512, 0, 768, 128)]
    assert splits.train[0] == Sample(7, 7, -1, tuple(ImageSource(strip, box) for box in boxes))
    assert splits.identities == (7, 502)  # -1 marks what shows nobody in particular
    assert [(s.pid, s.camid) for s in splits.query] == [(9, 1)]
    assert [(s.pid, s.camid) for s in splits.gallery] == [(9, 2), (10, 2)]
    assert splits.num_cameras == 8


def test_msvr310_by_hand(tmp_path):
    home = tmp_path / "MSVR310"
    for split, names in {
        "bounding_box_train": ["0038_s014_v7_003.jpg", "0040_s001_v0_001.jpg"],
        "query3": ["0050_s002_v3_001.jpg"],
        "bounding_box_test": ["0050_s003_v3_001.jpg"],
    }.items():
        touch(*(home / split / name[:4] / folder / name for name in names for folder in ("vis", "ni", "th")))
    splits = load_dataset("MSVR310", tmp_path)
    first = splits.train[0]
    assert (first.pid, first.camid, first.sceneid) == (38, 7, 14)
    assert [source.path for source in first.images] == [
        str(home / "bounding_box_train" / "0038" / folder / "0038_s014_v7_003.jpg") for folder in ("vis", "ni", "th")
    ]
    assert splits.protocol == "scene"
    assert [(s.pid, s.sceneid) for s in splits.query + splits.gallery] == [(50, 2), (50, 3)]


def test_other_files_suffixes_spaces_and_unicode(tmp_path):
    root = tmp_path / "mes données 数据"
    home = write_rgbnt201(root, train=("000002_cam1_0 ü.JPG", "000001_cam1_0_00.png", "000004_cam10_0.jpeg"))
    touch(*(home / "train_171" / "RGB" / name for name in ("Thumbs.db", "._000001_cam1_0_00.png", "list.txt")))
    (home / "train_171" / "NI" / "000001_cam1_0_00.png").rename(home / "train_171" / "NI" / "000001_cam1_0_00.BMP")
    splits = load_dataset("RGBNT201", root)
    assert [(s.pid, s.camid) for s in splits.train] == [(1, 0), (2, 0), (4, 9)]
    assert splits.train[0].images[1].path.endswith("000001_cam1_0_00.BMP")


@pytest.mark.parametrize("name", ["RGBNT201", "RGBNT100", "MSVR310"])
def test_missing_root_tells_every_way_out(tmp_path, name):
    root = tmp_path / "no such place"
    with pytest.raises(UserError) as error:
        load_dataset(name, root)
    message = str(error.value)
    assert str(root / name) in message
    assert "Download" in message and "DATASETS.ROOT_DIR" in message
    assert f"python -m data.synthetic --out '{root}'" in message


def test_missing_partners_are_gathered_by_folder(tmp_path):
    home = write_rgbnt201(tmp_path, train=[f"{pid:06}_cam1_0_00.jpg" for pid in range(1, 9)])
    for pid in range(1, 8):
        (home / "train_171" / "NI" / f"{pid:06}_cam1_0_00.jpg").unlink()
    (home / "test" / "TI" / "000300_cam1_1_12.jpg").rename(home / "test" / "TI" / "000301_cam1_1_12.jpg")
    with pytest.raises(UserError) as error:
        load_dataset("RGBNT201", tmp_path)
    message = str(error.value)
    assert f"no partner of the same name in {home / 'train_171' / 'NI'} (7): 000001_cam1_0_00.jpg" in message
    assert "000005_cam1_0_00.jpg, and 2 more" in message and "000006" not in message
    assert f"no partner of the same name in {home / 'test' / 'TI'} (1): 000300_cam1_1_12.jpg" in message
    assert f"no partner of the same name in {home / 'test' / 'RGB'} (1): 000301_cam1_1_12.jpg" in message
    assert message.count("no partner") == 3


def test_a_missing_rgb_image_is_a_fault_too(tmp_path):
    home = write_rgbnt201(tmp_path)
    for modality in ("NI", "TI"):
        touch(home / "train_171" / modality / "000009_cam1_0_00.jpg")
    with pytest.raises(UserError, match=r"in \S*RGB \(1\): 000009_cam1_0_00.jpg") as error:
        load_dataset("RGBNT201", tmp_path)
    assert all(f"{home / 'train_171' / modality} too" in str(error.value) for modality in ("NI", "TI"))


def test_a_camera_number_beyond_reason_is_a_fault(tmp_path):
    write_rgbnt201(tmp_path, train=["000001_cam1_0_00.jpg", "000002_cam99999999999_0_00.jpg"])
    with pytest.raises(UserError, match=r"cameras above 999[\s\S]*000002_cam99999999999"):
        load_dataset("RGBNT201", tmp_path)


def test_all_names_that_do_not_parse_are_told_with_the_other_faults(tmp_path):
    bad = ["person_cam1.jpg", "000001_cam0_0.jpg", "00001_cam1_0.jpg", "000002_1_0.jpg"]
    home = write_rgbnt201(tmp_path, train=[*bad, "000005_cam1_0.jpg"])
    shutil.rmtree(home / "test" / "NI")
    with pytest.raises(UserError) as error:
        load_dataset("RGBNT201", tmp_path)
    message = str(error.value)
    assert "do not parse (4)" in message and all(name in message for name in bad)
    assert "000030_cam1_1_12.jpg" in message and "000005_cam1_0.jpg" not in message
    assert f"missing (1): {home / 'test' / 'NI'}" in message
    assert "no partner" not in message


def test_empty_folder_missing_split_and_doubled_name(tmp_path):
    home = write_rgbnt201(tmp_path)
    shutil.rmtree(home / "test")
    for path in (home / "train_171" / "TI").iterdir():
        path.unlink()
    touch(home / "train_171" / "RGB" / "000003_cam2_0_05.png")
    with pytest.raises(UserError) as error:
        load_dataset("RGBNT201", tmp_path)
    message = str(error.value)
    assert f"(1): {home / 'train_171' / 'TI'}" in message and "without an image" in message
    assert f"missing (1): {home / 'test'}" in message
    assert "share a name" in message and "000003_cam2_0_05.png" in message
    assert "no partner" not in message


def test_one_identity_cannot_be_trained_on_but_evaluated(tmp_path):
    write_rgbnt201(tmp_path, train=("000001_cam1_0_00.jpg", "000001_cam1_0_01.jpg"))
    with pytest.raises(UserError, match="one identity only"):
        load_dataset("RGBNT201", tmp_path)
    assert load_dataset("RGBNT201", tmp_path, train=False).identities == (1,)


def test_training_folder_is_optional_for_evaluation(tmp_path):
    home = write_rgbnt201(tmp_path)
    shutil.rmtree(home / "train_171")
    with pytest.raises(UserError, match="train_171"):
        load_dataset("RGBNT201", tmp_path)
    splits = load_dataset("RGBNT201", tmp_path, train=False)
    assert splits.train == [] and len(splits.query) == 1


def test_unknown_data_set_names_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="RGBNT201, RGBNT100, MSVR310"):
        load_dataset("Market1501", tmp_path)
