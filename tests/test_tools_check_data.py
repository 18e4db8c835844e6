"""What is told of good and of damaged data, with the exit code."""

import shutil

import pytest
from PIL import Image

from configs import load_cfg
from tools.check_data import check_config, check_folder, main
from utils.cli import run


@pytest.fixture
def copy(tiny_dataset, tmp_path):
    """A copy of the tiny data set that may be damaged: the folder RGBNT201."""
    shutil.copytree(tiny_dataset / "RGBNT201", tmp_path / "RGBNT201")
    return tmp_path / "RGBNT201"


def told(findings, mark):
    return [line for line in findings.lines if line.startswith(mark)]


def test_good_data(copy, capsys):
    findings = check_folder(copy)
    assert findings.wrong == 0 and not told(findings, "WRONG")
    assert "note   train: 6 identities, 24 samples, 2 cameras; the published set has 171, 3951, 4" in findings.lines
    assert "ok     108 image files decode" in findings.lines
    assert "ok     sizes (width x height): 32 x 64" in findings.lines
    assert check_folder(copy.parent).lines == findings.lines
    assert run(lambda: main(copy, None, [])) == 0
    assert "every query's identity is in the gallery" in capsys.readouterr().out


def test_damaged_images_and_sizes(copy):
    first, second = sorted((copy / "test" / "NI").iterdir())[:2]
    Image.new("RGB", (40, 64)).save(second)
    findings = check_folder(copy)
    assert findings.wrong == 0
    assert (
        "1 samples have images of different sizes" in told(findings, "note")[-1] and second.name in findings.lines[-1]
    )
    first.write_bytes(first.read_bytes()[:300])
    findings = check_folder(copy)
    assert findings.wrong == 1 and str(first) in told(findings, "WRONG")[0]


def test_a_partner_that_is_missing(copy, capsys):
    gone = sorted((copy / "train_171" / "TI").iterdir())[3]
    gone.unlink()
    assert run(lambda: main(copy, None, [])) == 2
    captured = capsys.readouterr()
    assert gone.name in captured.out and "1 thing wrong" in captured.err


def test_a_manifest_with_identities_that_are_not_in_the_gallery(copy):
    names = sorted(path.name for path in (copy / "test" / "RGB").iterdir())
    rows = ["split,pid,camid,sceneid,RGB,NI,TI", "train,500,0,,{},,", "train,501,0,,{},,", "query,502,0,,{},,"]
    rows += ["query,500,0,,{},{},", "query,503,0,,{},,", "gallery,500,0,,{},,", "gallery,503,1,,{},,"]
    lines = [row.format(*[f"test/RGB/{names[i]}"] * 2) for i, row in enumerate(rows)]
    (copy / "list.csv").write_text("\n".join(lines).replace(f",test/RGB/{names[4]},\n", f",test/NI/{names[4]},\n"))
    findings = check_folder(copy / "list.csv")
    assert findings.wrong == 1
    assert told(findings, "WRONG") == ["WRONG  query identities that are not in the gallery (1): 502"]
    notes = "\n".join(told(findings, "note"))
    assert "7 of 7 samples lack a modality" in notes
    assert "identities in training and in the test (1): 500" in notes
    assert "1 queries have no match from another camera" in notes


def test_every_kind_of_fault_of_a_manifest_counts(copy, tiny_yaml, capsys):
    image = next((copy / "test" / "RGB").iterdir()).relative_to(copy)
    rows = ["split,pid,camid,sceneid,RGB,NI,TI", f"train,x,0,,{image},,", f"train,y,0,,{image},,", "query,1,0,,none,,"]
    (copy / "list.csv").write_text("\n".join([*rows, f"gallery,1,1,,{image},,", f"test,2,-1,,{image},,"]))
    opts = ["DATASETS.NAMES", "manifest", "DATASETS.MANIFEST", str(copy / "list.csv")]
    for arguments in ((copy / "list.csv", None, []), (None, tiny_yaml, opts)):
        assert run(lambda arguments=arguments: main(*arguments)) == 2
        captured = capsys.readouterr()
        for kind in ("pid: not whole numbers from 0 (2)", "images that are not there (1)", "camid: not whole numbers"):
            assert kind in captured.out
        assert captured.err.startswith("error: 3 things wrong.")


def test_what_is_no_data_set(tmp_path):
    for path, what in ((tmp_path / "none", "no such folder"), (tmp_path, "no layout that is known")):
        findings = check_folder(path)
        assert findings.wrong == 1 and what in findings.lines[0] and "RGBNT100/rgbir" in findings.lines[0]


def test_a_config_with_its_weights(tiny_yaml, tmp_path):
    findings = check_config(load_cfg(tiny_yaml))
    assert findings.wrong == 0 and "no weights are needed" in findings.lines[-1]
    opts = ["MODEL.PRETRAINED", "True", "MODEL.PRETRAIN_PATH_T", str(tmp_path / "none.pt")]
    findings = check_config(load_cfg(tiny_yaml, [*opts, "DATASETS.ROOT_DIR", str(tmp_path)]))
    assert findings.wrong == 2 and "none.pt" in findings.lines[-1]


def test_without_a_folder_it_tells_where_to_get_data(capsys):
    main(None, None, [])
    out = capsys.readouterr().out
    assert all(word in out for word in ("RGBNT201", "RGBNT100", "MSVR310", "ViT-B-16.pt", "DINOv2/v3"))
