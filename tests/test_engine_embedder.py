"""`load_model` and `embed` against the evaluator and the model's own forward pass."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from configs import dump
from data import make_dataloader
from data.transforms import make_transforms
from engine import load_model
from modeling import make_model
from utils.errors import UserError
from utils.modalities import MODALITIES

PAGE = Path(__file__).parents[1] / "docs" / "using_a_model.md"


@pytest.fixture
def run_dir(tiny_cfg, tmp_path):
    """`run_dir(KEY, VALUE, …)` -> a run's folder with the best checkpoint of an untrained model."""

    def make(*opts, name="DeMobest.pth"):
        cfg = tiny_cfg(*opts)
        torch.manual_seed(1)
        model = make_model(cfg, num_classes=6, num_cameras=2, pretrained=False)
        folder = Path(cfg.OUTPUT_DIR)
        folder.mkdir(exist_ok=True)
        torch.save({"model": model.state_dict()}, folder / name)
        (folder / "config.yml").write_text(dump(cfg))
        return folder

    return make


@pytest.fixture
def triples(tiny_dataset):
    """Paths of five test triples."""
    folder = tiny_dataset / "RGBNT201" / "test"
    return {m: sorted((folder / m).iterdir())[:5] for m in MODALITIES}


def test_embed_agrees_with_a_loader_and_the_forward_pass(run_dir, triples):
    model = load_model(run_dir())
    assert not model.training
    batch = next(iter(make_dataloader(model.cfg, train=False).val))
    with torch.no_grad():
        expected = model(batch.images, batch.camid).features
    features = model.embed(triples, camid=batch.camid[:5].tolist())
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, F.normalize(expected["both"][:5], dim=1))
    torch.testing.assert_close(
        model.embed(triples, batch.camid[:5], branch="sdtps"), F.normalize(expected["sdtps"][:5], dim=1)
    )
    raw = load_model(run_dir("TEST.FEAT_NORM", "False"))
    torch.testing.assert_close(raw.embed(triples, batch.camid[:5]), expected["both"][:5])


def test_paths_pil_images_and_tensors_are_the_same(run_dir, triples):
    model = load_model(run_dir())
    expected = model.embed({m: [str(path) for path in paths] for m, paths in triples.items()})
    opened = {m: [Image.open(path) for path in paths] for m, paths in triples.items()}
    assert torch.equal(model.embed(opened), expected)
    transform = make_transforms(model.cfg)[1]
    large = {m: [image.resize((50, 90)) for image in images] for m, images in opened.items()}
    tensors = {
        m: [
            torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(90, 50, 3).permute(2, 0, 1)
            for image in images
        ]
        for m, images in large.items()
    }
    with torch.no_grad():
        output = model({m: transform(images) for m, images in large.items()})
    torch.testing.assert_close(model.embed(tensors), F.normalize(output.features["both"], dim=1))


def test_missing_modalities_are_those_of_present(run_dir, triples):
    model = load_model(run_dir())
    batch = next(iter(make_dataloader(model.cfg, train=False).val))
    images = {m: x[:5] for m, x in batch.images.items()}
    with torch.no_grad():
        without_ni = model(images, present=torch.tensor([True, False, True]).expand(5, 3)).features["both"]
        third_has_ti_alone = model(images, present=torch.tensor([[i != 2, i != 2, True] for i in range(5)])).features[
            "both"
        ]
    torch.testing.assert_close(model.embed({m: triples[m] for m in ("RGB", "TI")}), F.normalize(without_ni, dim=1))
    holes = {m: [None if i == 2 and m != "TI" else path for i, path in enumerate(triples[m])] for m in MODALITIES}
    torch.testing.assert_close(model.embed(holes), F.normalize(third_has_ti_alone, dim=1))


def test_batches_do_not_matter(run_dir, triples):
    folder = run_dir()
    whole, pieces = (load_model(folder, opts=("TEST.IMS_PER_BATCH", n)).embed(triples) for n in (5, 2))
    torch.testing.assert_close(whole, pieces)


def test_the_best_checkpoint_goes_before_the_last(run_dir, triples):
    folder = run_dir(name="last.pth")
    last = load_model(folder).embed(triples)
    state = torch.load(folder / "last.pth")
    state["model"] = {n: t + 0.01 if t.is_floating_point() else t for n, t in state["model"].items()}
    torch.save(state, folder / "DeMobest.pth")
    assert not torch.allclose(load_model(folder).embed(triples), last)
    assert torch.equal(load_model(folder / "last.pth").embed(triples), last)


def test_what_cannot_be_used_is_told(run_dir, triples, tmp_path):
    model = load_model(run_dir())
    rgb = triples["RGB"]
    for images, told in (
        ({"RGB": rgb, "NIR": rgb}, "unknown modalities NIR"),
        ({"RGB": rgb, "TI": rgb[:2]}, "as many images of each modality"),
        ({}, "as many images of each modality"),
        ({"RGB": []}, "as many images of each modality"),
        ({"RGB": [rgb[0], None]}, "sample 1 has no image"),
        ({"RGB": [torch.rand(3, 8, 8)]}, r"got torch.float32 \(3, 8, 8\)"),
        ({"RGB": [7]}, "got int"),
        ({"RGB": [tmp_path / "none.png"]}, "no such file"),
    ):
        with pytest.raises(UserError, match=told):
            model.embed(images)
    with pytest.raises(UserError, match="no branch 'moe'; this model has ori, sdtps, both"):
        model.embed(triples, branch="moe")
    with pytest.raises(UserError, match="the model knows 0 to 1"):
        model.embed(triples, camid=[0, 1, 2, 0, 0])
    with pytest.raises(UserError, match="camid has 1 entries for 5"):
        model.embed(triples, camid=[0])
    with pytest.raises(UserError, match="no config.yml there"):
        load_model(tmp_path / "nothing")
    folder = run_dir()
    (folder / "DeMobest.pth").unlink()
    with pytest.raises(UserError, match="neither DeMobest.pth nor last.pth"):
        load_model(folder)


def test_the_example_of_the_documentation_runs(run_dir, tiny_dataset, monkeypatch, tmp_path):
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    Path("runs/sample").mkdir(parents=True)
    run_dir().rename("runs/sample/DeMo_SDTPS")
    Path("datasets/sample").mkdir(parents=True)
    (tmp_path / "datasets" / "sample" / "RGBNT201").symlink_to(tiny_dataset / "RGBNT201")
    names = {}
    exec(code, names)
    assert names["features"].shape == (2, 6 * 192) and names["similarity"].shape == ()
