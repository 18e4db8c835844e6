import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file as save_safetensors
from torch import nn

from modeling import foreign
from modeling.backbone import Backbone
from modeling.fusion import Fusion
from modeling.make_model import ReIDModel
from modeling.sdtps import SDTPS
from utils.checkpoint import load_weights, save_file
from utils.errors import UserError

REFERENCE = Path(__file__).parent / "data" / "reference"


def foreign_checkpoint(*names: str) -> dict[str, torch.Tensor]:
    """Zeros by the names and shapes of a published checkpoint, of whose backbone only block 0 is kept."""
    shapes = {}
    for name in names:
        shapes |= json.loads((REFERENCE / f"{name}.keys.json").read_text())
    kept = {name: shape for name, shape in shapes.items() if "resblocks." not in name or "resblocks.0." in name}
    return {name: torch.zeros(shape) for name, shape in kept.items()}


def fork_checkpoint() -> dict[str, torch.Tensor]:
    state = foreign_checkpoint("baseline_rgbnt201", "sdtps")
    state["classifier_sdtps.weight"] = torch.zeros(171, 1536)
    for name, tensor in list(state.items()):
        if name.startswith("bottleneck."):
            state[name.replace("bottleneck", "bottleneck_sdtps")] = tensor
    return state


def reid_model(size=(256, 128), cameras=4, ids=171, heads=0, sdtps: dict | None = None, **kwargs) -> ReIDModel:
    backbone = Backbone("ViT-B-16", img_size=size, num_cameras=cameras, depth=1)
    return ReIDModel(
        backbone,
        num_classes=ids,
        global_local=True,
        fusion=Fusion(512, heads) if heads else None,
        sdtps=SDTPS(embed_dim=512, num_patches=128, **sdtps) if sdtps is not None else None,
        sdtps_pool="mean",
        **kwargs,
    )


def shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    "checkpoint, model",
    [
        (lambda: foreign_checkpoint("baseline_rgbnt201"), lambda: reid_model()),
        (lambda: foreign_checkpoint("demo_rgbnt201"), lambda: reid_model(heads=4)),
        (
            lambda: foreign_checkpoint("demo_rgbnt100"),
            lambda: reid_model((128, 256), cameras=8, ids=50, heads=8, head_per_modality=True),
        ),
        (fork_checkpoint, lambda: reid_model(sdtps={})),
    ],
    ids=["baseline_rgbnt201", "demo_rgbnt201", "demo_rgbnt100", "fork"],
)
def test_every_foreign_name_becomes_one_of_ours(checkpoint, model, prefix):
    state = {f"{prefix}{name}": tensor for name, tensor in checkpoint().items()}
    assert shapes(foreign.translate(state)) == shapes(model().state_dict())


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("BACKBONE.base.transformer.resblocks.7.ln_2.bias", "backbone.vit.blocks.7.norm2.bias"),
        ("BACKBONE.base.transformer.resblocks.0.attn.in_proj_bias", "backbone.vit.blocks.0.attn.qkv.bias"),
        ("BACKBONE.base.transformer.resblocks.11.mlp.c_proj.weight", "backbone.vit.blocks.11.mlp.fc2.weight"),
        ("BACKBONE.base.blocks.3.attn.qkv.weight", "backbone.vit.blocks.3.attn.qkv.weight"),
        ("nir_reduce.1.weight", "reduce.NI.linear.weight"),
        ("tir_reduce.0.bias", "reduce.TI.norm.bias"),
        ("bottleneck.running_var", "heads.ori.bottleneck.running_var"),
        ("bottleneck_n.weight", "heads.NI.bottleneck.weight"),
        ("classifier_moe.weight", "heads.moe.classifier.weight"),
        ("classifier_sdtps.weight", "heads.sdtps.classifier.weight"),
        ("sdtps.rgb_sparse.score_predictor.2.bias", "sdtps.predictor.RGB.2.bias"),
        ("sdtps.nir_aggr.weight.0.bias", "sdtps.aggregator.NI.norm.bias"),
        ("sdtps.tir_aggr.weight.3.weight", "sdtps.aggregator.TI.fc2.weight"),
        ("generalFusion.rnt.in_proj_weight", "fusion.hdm.attention.rnt.in_proj_weight"),
        ("generalFusion.moe.experts.3.expertHead.6.mlp.2.running_mean", "fusion.moe.experts.3.6.2.running_mean"),
        ("generalFusion.moe.gating_network.gate.linear_re.2.weight", "fusion.moe.gate.query.2.weight"),
        ("generalFusion.moe.gating_network.gate.k_.weight", "fusion.moe.gate.k.weight"),
    ],
)
def test_names(theirs, ours):
    tensor = torch.randn(2, 3)
    for prefix in ("", "module."):
        translated = foreign.translate({prefix + theirs: tensor})
        assert list(translated) == [ours] and torch.equal(translated[ours], tensor)


def test_tensors_that_change_their_shape_keep_their_values():
    theirs = {
        "BACKBONE.cv_embed": torch.randn(4, 1, 8),
        "BACKBONE.base.proj": torch.randn(8, 5),
        "BACKBONE.base.class_embedding": torch.randn(8),
        "BACKBONE.base.positional_embedding": torch.randn(7, 8),
        "generalFusion.rt_token": torch.randn(1, 1, 5),
        "sdtps.nir_aggr.scale": torch.randn(1, 1, 1),
    }
    ours = foreign.translate(theirs)
    expected = {
        "backbone.cam_embed": theirs["BACKBONE.cv_embed"][:, 0],
        "backbone.proj.weight": theirs["BACKBONE.base.proj"].T,
        "backbone.vit.cls_token": theirs["BACKBONE.base.class_embedding"][None, None],
        "backbone.vit.pos_embed": theirs["BACKBONE.base.positional_embedding"][None],
        "fusion.hdm.queries.rt": theirs["generalFusion.rt_token"][0, 0],
        "sdtps.aggregator.NI.scale": theirs["sdtps.nir_aggr.scale"][0, 0, 0],
    }
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor) and ours[name].shape == tensor.shape, name


def test_our_own_names_pass_unchanged():
    state = reid_model(heads=4, sdtps={}).state_dict()
    translated = foreign.translate(state)
    assert list(translated) == list(state)
    assert all(translated[name] is state[name] for name in state)


@pytest.mark.parametrize(
    "kept, aggregated, ratio",
    [(90, 44, 0.49), (90, 45, 0.5), (64, 25, 0.4), (128, 128, 1.0), (100, 7, 0.07), (1, 1, 1.0)],
)
def test_fitting_ratio(kept, aggregated, ratio):
    assert foreign.fitting_ratio(aggregated, kept) == ratio


def test_every_possible_count_has_a_ratio_that_this_project_reads_as_that_count():
    from modeling.sdtps import token_counts

    for kept in (1, 7, 64, 90, 251):
        for aggregated in range(1, kept + 1):
            assert token_counts(kept, 1.0, foreign.fitting_ratio(aggregated, kept)) == (kept, aggregated)


def test_an_aggregator_of_another_size_is_explained():
    hint = foreign.explain_mismatch("sdtps.aggregator.NI.fc2.weight", (44, 102), num_kept=90)
    assert "44" in hint and "MODEL.SDTPS_AGGR_RATIO 0.49" in hint
    assert foreign.explain_mismatch("sdtps.aggregator.NI.fc1.weight", (44, 102), num_kept=90) == ""
    assert foreign.explain_mismatch("reduce.RGB.linear.weight", (44, 102), num_kept=90) == ""
    assert "44 identities" in foreign.explain_mismatch("heads.ori.classifier.weight", (44, 102))
    assert "44 cameras" in foreign.explain_mismatch("backbone.cam_embed", (44, 102))
    assert foreign.explain_mismatch("sdtps.aggregator.NI.fc2.bias", (91,), num_kept=90) == ""


class Toy(nn.Module):
    def __init__(self, features=3, ids=4):
        super().__init__()
        self.backbone = nn.Linear(2, features)
        self.heads = nn.ModuleDict({"ori": nn.ModuleDict({"classifier": nn.Linear(features, ids, bias=False)})})
        self.norm = nn.BatchNorm1d(features)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", ["full", "bare", "safetensors", "half"])
def test_a_model_is_filled(kind, tmp_path):
    source, target = Toy(), Toy()
    source.norm(torch.randn(5, 3))
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "full":
        save_file({"model": source.state_dict(), "epoch": 3, "optimizer": {"state": {}}}, path)
    elif kind == "bare":
        torch.save(source.state_dict(), path)
    elif kind == "safetensors":
        save_safetensors(source.state_dict(), path)
    else:
        torch.save(source.half().state_dict(), path)
        source.float()
    assert not same(source, target)
    report = load_weights(target, path)
    assert same(source, target)
    assert set(report.loaded) == set(source.state_dict()) and report.skipped == ()


def test_skipped_parts_stay_whatever_the_file_holds(tmp_path):
    source, target = Toy(ids=9), Toy()
    state = source.state_dict() | {"sdtps.extra": torch.zeros(2)}
    del state["norm.weight"]
    torch.save(state, tmp_path / "w.pth")
    classifier = target.heads["ori"]["classifier"].weight.clone()
    report = load_weights(target, tmp_path / "w.pth", skip=("classifier", "sdtps", "norm.weight"))
    assert report.skipped == ("heads.ori.classifier.weight", "norm.weight")
    assert torch.equal(target.heads["ori"]["classifier"].weight, classifier)
    assert torch.equal(target.backbone.weight, source.backbone.weight)
    with pytest.raises(UserError):  # a part is a whole word between dots
        load_weights(target, tmp_path / "w.pth", skip=("class", "sdtps", "norm.weight"))


def test_one_report_names_all_that_does_not_fit_and_nothing_is_filled(tmp_path):
    state = Toy(ids=9).state_dict() | {"stranger": torch.zeros(2)}
    del state["backbone.bias"]
    torch.save({"model": state}, tmp_path / "w.pth")
    target = Toy()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_weights(target, tmp_path / "w.pth")
    message = str(error.value)
    assert "w.pth" in message
    assert "missing in the file (1): backbone.bias" in message
    assert "unexpected in the file (1): stranger" in message
    assert "heads.ori.classifier.weight (9, 3), wanted (4, 3)" in message
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


def test_a_file_without_tensors_is_told(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth.*epoch"):
        load_weights(Toy(), tmp_path / "w.pth")


def test_the_model_translates_and_explains(tmp_path):
    class Translating(Toy):
        def translate_state_dict(self, state):
            return {name.removeprefix("old."): tensor for name, tensor in state.items()}

        def explain_mismatch(self, name, file_shape):
            return f"set ids to {file_shape[0]}" if "classifier" in name else ""

    source, target = Toy(), Translating()
    torch.save({f"old.{name}": tensor for name, tensor in source.state_dict().items()}, tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    assert same(source, target)
    with pytest.raises(UserError, match="set ids to 4"):
        load_weights(Translating(ids=7), tmp_path / "w.pth")
