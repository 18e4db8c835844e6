"""The commands in tools/, on small runs and files."""

import json
from pathlib import Path

import pytest
import torch

from configs import dump, load_cfg
from data import make_dataloader
from modeling import make_model
from tools.colour_means import colour_means
from tools.extract_backbone import extract
from tools.plot_curves import main as plot_curves
from utils.errors import UserError


@pytest.fixture
def checkpoint(tiny_cfg, tmp_path):
    """A checkpoint as training writes it, of images twice as high as wide, and its model."""
    cfg = tiny_cfg("MODEL.STRIDE_SIZE", "[8, 16]")
    model = make_model(cfg, num_classes=3, num_cameras=2, pretrained=False)
    torch.save({"model": model.state_dict(), "config": dump(cfg)}, tmp_path / "last.pth")
    return tmp_path / "last.pth", model


@pytest.mark.parametrize("size", [[64, 32], [32, 64]])
def test_an_extracted_backbone_fills_another_model(checkpoint, tiny_cfg, tmp_path, size):
    """Also one for images lying down: the position grid, 7 x 2, is known to the file and resized."""
    path, model = checkpoint
    out = tmp_path / "weights.safetensors"
    assert extract(path, out) == sum(p.numel() for n, p in model.backbone.named_parameters() if n != "cam_embed")
    opts = ("MODEL.PRETRAINED", "True", "MODEL.PRETRAIN_PATH_T", str(out), "MODEL.STRIDE_SIZE", "[8, 16]")
    cfg = tiny_cfg(*opts, "INPUT.SIZE_TRAIN", str(size), "INPUT.SIZE_TEST", str(size))
    other = make_model(cfg, num_classes=7, num_cameras=5).backbone.state_dict()
    for name, tensor in model.backbone.state_dict().items():
        if name == "cam_embed":
            continue
        if name == "vit.pos_embed" and size == [32, 64]:
            grid = tensor[:, 1:].unflatten(1, (7, 2)).permute(0, 3, 1, 2)
            resized = torch.nn.functional.interpolate(grid, (3, 4), mode="bilinear", align_corners=False)
            tensor = torch.cat([tensor[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)
        torch.testing.assert_close(other[name], tensor, msg=name)


def test_extract_tells_what_it_cannot_use(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="holds no tensors named backbone"):
        extract(tmp_path / "other.pth", tmp_path / "out.safetensors")
    torch.save({"backbone.vit.cls_token": torch.ones(2)}, tmp_path / "bare.pth")
    with pytest.raises(UserError, match="does not say what it was trained on"):
        extract(tmp_path / "bare.pth", tmp_path / "out.safetensors")


def test_colour_means_see_the_colours(tiny_yaml):
    """The small test set's identities differ in nothing but colour: means rank them without a fault."""
    cfg = load_cfg(tiny_yaml)
    assert colour_means(cfg)["R1"] == 100
    assert len(make_dataloader(cfg, train=False).val.pids) == 12


def test_plot_curves(tmp_path):
    for name in "ab":
        lines = [{"kind": "epoch", "step": 3 * e, "epoch": e, "loss": 4.0 - e, "acc": 0.1 * e} for e in (1, 2)]
        lines += [{"kind": "eval", "step": 6, "epoch": 2, "ori/mAP": 50.0, "both/mAP": 60.0}]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_curves([tmp_path / "a", tmp_path / "b"], None, tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="metrics.jsonl: cannot be read"):
        plot_curves([tmp_path / "nothing"], None, tmp_path / "out.png")
    with pytest.raises(UserError, match="1 names for 2 runs"):
        plot_curves([tmp_path / "a", tmp_path / "b"], ["x"], tmp_path / "out.png")


@pytest.mark.parametrize("path", sorted(Path("tools").glob("*.py")), ids=lambda path: path.stem)
def test_every_command_tells_how_it_is_called(path):
    source = path.read_text(encoding="utf-8")
    assert "__main__" not in source or f"python -m tools.{path.stem} " in source
