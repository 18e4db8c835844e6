"""Features of a folder, and the search among them: against brute force, and through the commands."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import tools.search
from configs import dump
from data.folders import load_folder, recognise
from data.make_dataloader import make_dataloader
from engine.evaluator import extract_features
from modeling import make_model
from tools.extract import extract
from utils.errors import UserError
from utils.feature_file import FeatureFile
from utils.modalities import MODALITIES
from utils.search import build_index, nearest, nearest_in_index


@pytest.fixture
def run_dir(tiny_cfg, tmp_path):
    cfg = tiny_cfg()
    torch.manual_seed(1)
    model = make_model(cfg, num_classes=6, num_cameras=2, pretrained=False)
    (tmp_path / "run").mkdir()
    torch.save({"model": model.state_dict()}, tmp_path / "run" / "last.pth")
    (tmp_path / "run" / "config.yml").write_text(dump(cfg))
    return tmp_path / "run", model, cfg


@pytest.mark.parametrize("normalised", [True, False])
def test_nearest_is_brute_force(normalised, monkeypatch):
    torch.manual_seed(0)
    query, gallery = torch.randn(5, 24), torch.randn(103, 24)
    if normalised:
        query, gallery = F.normalize(query), F.normalize(gallery)
    expected = query @ gallery.T if normalised else -torch.cdist(query, gallery).square()
    values, indices = expected.sort(dim=1, descending=True)
    for piece in (24 * 10, 24 * 1000, 1):  # pieces of 10 rows, one piece, single rows
        monkeypatch.setattr("utils.search.PIECE", piece)
        found = nearest(query, gallery, 7, normalised=normalised)
        torch.testing.assert_close(found[0], values[:, :7], atol=1e-4, rtol=1e-4)
        assert torch.equal(found[1], indices[:, :7])
    assert nearest(query, gallery, 1000, normalised=normalised)[1].shape == (5, 103)
    with pytest.raises(UserError, match="24 channels, the gallery 12"):
        nearest(query, gallery[:, :12], 3)


def test_faiss_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        build_index(torch.ones(2, 2), tmp_path / "x.faiss")


@pytest.mark.parametrize("normalised", [True, False])
def test_an_index_finds_most_of_the_nearest(tmp_path, normalised):
    pytest.importorskip("faiss")
    torch.manual_seed(0)
    centres = torch.randn(50, 32)
    gallery = F.normalize(centres.repeat(80, 1) + 0.3 * torch.randn(4000, 32)) * (1 if normalised else 3)
    build_index(gallery, tmp_path / "x.faiss", normalised=normalised)
    found = nearest_in_index(gallery[:20], tmp_path / "x.faiss", 10)
    expected = nearest(gallery[:20], gallery, 10, normalised=normalised)
    shared = sum(len(set(a) & set(b)) for a, b in zip(found[1].tolist(), expected[1].tolist(), strict=True))
    assert shared >= 160
    torch.testing.assert_close(found[0][:, 0], expected[0][:, 0], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_feature_file_reads_back(tmp_path, suffix):
    ids = torch.arange(3)
    paths = [["a/é.jpg", "", "b.jpg"], ["", "c.jpg", ""], ["s.jpg"] * 3]
    file = FeatureFile(torch.randn(3, 4), ids, ids, ids, paths, {"root": str(tmp_path), "branch": "ori"})
    file.save(tmp_path / f"x{suffix}")
    read = FeatureFile.load(tmp_path / f"x{suffix}")
    assert torch.equal(read.features, file.features) and torch.equal(read.camids, ids)
    assert read.paths == paths and read.info == file.info
    assert read.files(0) == [tmp_path / "a/é.jpg", None, tmp_path / "b.jpg"]
    (tmp_path / f"bad{suffix}").write_bytes(b"nothing of the kind")
    for name, told in ((f"bad{suffix}", "damaged"), (f"none{suffix}", "no such file"), ("x.txt", "must end in")):
        with pytest.raises(UserError, match=told):
            FeatureFile.load(tmp_path / name)


def test_a_large_gallery_stays_on_the_disk(tmp_path):
    """Opening 64 MB of features costs less than 8 MB of memory."""
    ids = torch.zeros(1000, dtype=torch.long)
    FeatureFile(torch.ones(1000, 16_000), ids, ids, ids, [[""] * 3] * 1000).save(tmp_path / "x.safetensors")
    code = f"""
from pathlib import Path
from utils.feature_file import FeatureFile
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
before = resident()
file = FeatureFile.load(Path({str(tmp_path / "x.safetensors")!r}))
print(resident() - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out) < 8e6


def test_extracted_features_are_the_evaluators(run_dir, tiny_dataset, tmp_path):
    folder, model, cfg = run_dir
    file = extract(folder, tiny_dataset, tmp_path / "x.safetensors", workers=0)
    val = make_dataloader(cfg, train=False).val
    expected = extract_features(model, val)[""].joined()["both"]
    torch.testing.assert_close(file.features, F.normalize(expected, dim=1))
    assert torch.equal(file.pids, val.pids) and torch.equal(file.camids, val.camids)
    assert [str(file.files(i)[0].resolve()) for i in range(3)] == val.paths[:3]
    assert file.info["camera"] == "True"
    training = extract(folder, tiny_dataset, tmp_path / "t.npz", splits=("train",), branch="ori", half=True, workers=0)
    assert training.features.shape == (24, 3 * 192) and training.features.dtype == torch.float16


def test_folders_are_recognised(tiny_dataset, tmp_path):
    own = tiny_dataset / "RGBNT201"
    assert recognise(tiny_dataset) == recognise(own) == ("RGBNT201", own)
    for name, parts in (
        ("RGBNT100/rgbir", ("query", "bounding_box_test")),
        ("MSVR310", ("query3", "bounding_box_test")),
    ):
        for part in parts:
            (tmp_path / name / part).mkdir(parents=True)
    assert recognise(tmp_path / "RGBNT100") == ("RGBNT100", tmp_path / "RGBNT100/rgbir")
    assert recognise(tmp_path / "RGBNT100" / "rgbir") == ("RGBNT100", tmp_path / "RGBNT100/rgbir")
    assert recognise(tmp_path / "MSVR310") == ("MSVR310", tmp_path / "MSVR310")
    assert recognise(tmp_path / "MSVR310" / "query3") is None
    loose = load_folder(own / "test")
    assert len(loose.query) == 12 and loose.query[0].pid == loose.query[0].camid == -1
    for path, told in (
        (tmp_path / "MSVR310" / "query3", "no layout that is known"),
        (tmp_path / "x", "no such folder"),
    ):
        with pytest.raises(UserError, match=told):
            load_folder(path)


def test_the_search_command_prints_and_draws(run_dir, tiny_dataset, tmp_path, capsys):
    folder, _, _ = run_dir
    test = tiny_dataset / "RGBNT201" / "test"
    extract(folder, test, tmp_path / "x.safetensors", workers=0)  # loose: nothing is known of the images
    query = [str(sorted((test / m).iterdir())[4]) for m in MODALITIES]
    arguments = (tmp_path / "x.safetensors", 3, tmp_path / "result.png", None, "exact", "cpu")
    tools.search.main(folder, query, *arguments)
    out = capsys.readouterr().out
    lines = out[out.index("rank ") :].splitlines()
    assert (
        lines[0].startswith("rank")
        and lines[1].split()[:2] == ["1", "1.000"]
        and lines[1].endswith(query[0].rpartition("/")[2])
    )
    picture = Image.open(tmp_path / "result.png")
    width, height = tools.search.CELL
    gap, caption = tools.search.GAP, tools.search.CAPTION
    assert picture.size == (4 * (width + gap) + gap, caption + 3 * (height + gap))

    def cell(column, row):
        left, top = gap + column * (width + gap), caption + row * (height + gap)
        return picture.crop((left, top, left + width, top + height)).tobytes()

    assert all(cell(0, row) == cell(1, row) for row in range(3))  # the query found itself
    tools.search.main(folder, ["-", "-", query[2]], *arguments)
    picture = Image.open(tmp_path / "result.png")
    assert picture.getpixel((gap + width // 2, caption + height // 2)) == (211, 211, 211)
    with pytest.raises(UserError, match="at least one image"):
        tools.search.main(folder, ["-", "-", "-"], *arguments)


def test_a_gallery_of_other_weights_is_refused(run_dir, tiny_dataset, tmp_path):
    folder, model, _ = run_dir
    extract(folder, tiny_dataset, tmp_path / "features.npz", workers=0)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    torch.save({"model": model.state_dict()}, folder / "last.pth")
    image = next(tiny_dataset.rglob("RGB/*.jpg"))
    with pytest.raises(UserError, match="extracted with other weights"):
        tools.search.search(folder, [str(image), "-", "-"], FeatureFile.load(tmp_path / "features.npz"))
