"""Exported files against the model that they came from."""

import sys

import pytest
import torch

import tools.export
from configs import dump
from engine import load_model
from modeling import make_model
from modeling.fusion import Fusion
from tools.export import export
from utils.errors import UserError
from utils.modalities import MODALITIES


@pytest.fixture
def run_dir(tiny_cfg, tmp_path):
    """`run_dir(KEY, VALUE, …)` -> a run's folder with an untrained model of one block."""

    def make(*opts):
        cfg = tiny_cfg("MODEL.DEPTH", "1", *opts)
        torch.manual_seed(1)
        model = make_model(cfg, num_classes=6, num_cameras=2, pretrained=False)
        (tmp_path / "run").mkdir()
        torch.save({"model": model.state_dict()}, tmp_path / "run" / "last.pth")
        (tmp_path / "run" / "config.yml").write_text(dump(cfg))
        return tmp_path / "run"

    return make


def five(same=False):
    """Five samples of random images (or of one colour: every patch scores the same), two lacking a modality."""
    images = {m: torch.randint(0, 256, (5, 3, 64, 32), dtype=torch.uint8) for m in MODALITIES}
    if same:
        images = {m: torch.full_like(x, 90) for m, x in images.items()}
    present = torch.ones(5, 3, dtype=torch.bool)
    present[1, 0] = present[4, 1] = False
    holes = {m: [x if present[i, j] else None for i, x in enumerate(images[m])] for j, m in enumerate(MODALITIES)}
    return [*images.values(), present], holes


def test_a_pt2_file_computes_what_embed_computes(run_dir, tmp_path):
    folder = run_dir()
    result = export(folder, tmp_path / "out" / "m.pt2", branch="sdtps")
    assert result.error <= 1e-5 and result.size == (tmp_path / "out" / "m.pt2").stat().st_size and result.latency > 0
    loaded = torch.export.load(tmp_path / "out" / "m.pt2").module()
    inputs, holes = five()
    torch.testing.assert_close(loaded(*inputs), load_model(folder, device="cpu").embed(holes, branch="sdtps"))


def test_an_onnx_file_computes_what_embed_computes(run_dir, tmp_path):
    """Also with scores that are all equal, where the order of a sort decides what is kept."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder = run_dir()
    assert export(folder, tmp_path / "m.onnx").error <= 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    model = load_model(folder, device="cpu")
    for same in (False, True):
        inputs, holes = five(same)
        named = {node.name: x.numpy() for node, x in zip(session.get_inputs(), inputs, strict=True)}
        assert list(named) == [*MODALITIES, "present"]
        found = torch.from_numpy(session.run(["features"], named)[0])
        torch.testing.assert_close(found, model.embed(holes), atol=1e-5, rtol=1e-4)


def test_the_fusion_is_exported_with_a_free_batch():
    fusion = Fusion(8, num_heads=2).eval()
    patches, globals_ = ({m: torch.randn(5, *shape) for m in MODALITIES} for shape in ((4, 8), (8,)))
    example = tuple({m: x[:2] for m, x in side.items()} for side in (patches, globals_))
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(fusion, example, dynamic_shapes=({m: {0: batch} for m in MODALITIES},) * 2)
    torch.testing.assert_close(program.module()(patches, globals_), fusion(patches, globals_))


def test_a_file_that_computes_something_else_is_refused(run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(tools.export, "_write_pt2", lambda program, out: lambda *x: program.module()(*x) + 1e-3)
    with pytest.raises(UserError, match="not to be used"):
        export(run_dir(), tmp_path / "m.pt2")


def test_what_cannot_be_exported_is_told(run_dir, tmp_path, monkeypatch):
    folder = run_dir()
    with pytest.raises(UserError, match=r"end in .pt2 or .onnx"):
        export(folder, tmp_path / "m.tflite")
    with pytest.raises(UserError, match="there is no 'moe'"):
        export(folder, tmp_path / "m.pt2", branch="moe")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match="pip install -r requirements-export.txt"):
        export(folder, tmp_path / "m.onnx")
