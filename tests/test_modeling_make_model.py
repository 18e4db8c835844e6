"""The whole model: its contract, its branches, and that every SDTPS key changes what it says."""

import pytest
import torch

from configs import load_cfg
from engine.step import accuracy
from modeling import make_model
from modeling.make_model import _stack
from solver import make_loss, make_optimizer
from utils.modalities import MODALITIES

CLASSES, CAMERAS, BATCH, WIDTH, PATCHES = 5, 3, 8, 192, 8


def build(cfg, seed=0):
    torch.manual_seed(seed)
    return make_model(cfg, num_classes=CLASSES, num_cameras=CAMERAS, pretrained=False)


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = {m: torch.randn(BATCH, 3, 64, 32, generator=generator) for m in MODALITIES}
    return images, torch.arange(BATCH) % CAMERAS, torch.arange(BATCH) // 2


def loss_of(cfg, model, epoch=1):
    images, camid, pid = batch()
    total, terms = make_loss(cfg, CLASSES)(model(images, camid), pid, epoch)
    return total, terms


# --- the contract ----------------------------------------------------------------------------------------------------


def test_branches_and_shapes(tiny_cfg):
    model = build(tiny_cfg("MODEL.HDM", "True", "MODEL.ATM", "True"))
    images, camid, _ = batch()
    for training in (True, False):
        out = model.train(training)(images, camid)
        dims = {"ori": 3 * WIDTH, "moe": 7 * WIDTH, "sdtps": 3 * WIDTH, "both": 13 * WIDTH}
        assert {k: v.shape for k, v in out.features.items()} == {k: (BATCH, d) for k, d in dims.items()}
        assert {k: v.shape for k, v in out.logits.items()} == dict.fromkeys(("ori", "moe", "sdtps"), (BATCH, CLASSES))
        joined = torch.cat([out.features[k] for k in ("ori", "moe", "sdtps")], dim=-1)
        assert torch.equal(out.features["both"], joined)
        assert out.selection.mask["RGB"].shape == (BATCH, PATCHES)


def test_one_branch_has_no_both(tiny_cfg):
    model = build(tiny_cfg("MODEL.USE_SDTPS", "False"))
    out = model(*batch()[:2])
    assert list(out.features) == ["ori"] and list(out.logits) == ["ori"] and out.selection is None
    assert model.branches == ("ori",)


def test_direct_0_has_a_head_per_modality(tiny_cfg):
    cfg = tiny_cfg("MODEL.DIRECT", "0")
    model = build(cfg)
    out = model(*batch()[:2])
    assert list(out.logits) == ["RGB", "NI", "TI", "sdtps"]
    assert torch.equal(out.features["ori"], torch.cat([out.features[m] for m in MODALITIES], dim=-1))
    assert list(loss_of(cfg, model)[1]) == [f"{t}/{h}" for h in ("RGB", "NI", "TI", "sdtps") for t in ("id", "triplet")]
    assert 0 <= float(accuracy(out, batch()[2])) <= 1


@pytest.mark.parametrize("pool", ["attention", "transformer", "cross"])
def test_a_missing_modality_is_a_zero_image_for_ori_and_absent_for_sdtps(tiny_cfg, pool):
    model = build(tiny_cfg("MODEL.SDTPS_POOL", pool)).eval()
    images, camid, _ = batch()
    present = torch.tensor([True, False, True]).expand(BATCH, -1)
    out = model(images, camid, present)
    zeroed = model({**images, "NI": torch.zeros_like(images["NI"])}, camid)
    torch.testing.assert_close(out.features["ori"], zeroed.features["ori"])
    assert (out.selection.tokens["NI"] == 0).all() and (out.features["sdtps"].chunk(3, dim=1)[1] == 0).all()
    nan = {**images, "NI": torch.full_like(images["NI"], float("nan"))}  # whatever lies in the place of a missing image
    assert torch.equal(model(nan, camid, present).features["both"], out.features["both"])


def test_without_cameras_the_mean_embedding_is_used(tiny_cfg):
    model = build(tiny_cfg("MODEL.SIE_COE", "3.0")).eval()
    images, camid, _ = batch()
    by_camera = [model(images, torch.full((BATCH,), c)).features["ori"] for c in range(CAMERAS)]
    assert not torch.allclose(by_camera[0], by_camera[1])
    without = model(images).features["ori"]
    with torch.no_grad():
        model.backbone.cam_embed.copy_(model.backbone.cam_embed.mean(0, keepdim=True).expand(CAMERAS, -1))
    torch.testing.assert_close(model(images, camid).features["ori"], without)


@pytest.mark.parametrize(
    "opts",
    [
        (),
        ("MODEL.HDM", "True", "MODEL.ATM", "True"),
        ("MODEL.DIRECT", "0"),
        ("MODEL.SDTPS_ONLY", "True"),
        ("MODEL.SDTPS_ONLY", "True", "MODEL.SDTPS_GLOBAL", "reduced"),
        ("MODEL.USE_SDTPS", "False"),
        ("MODEL.SDTPS_SIMILARITY", "attention", "MODEL.SDTPS_POOL", "transformer"),
        ("MODEL.SDTPS_POOL", "reduce"),
        ("MODEL.SDTPS_POOL", "cross"),
        ("MODEL.SDTPS_POOL", "cross", "MODEL.SDTPS_AUX_HEAD", "True"),
    ],
)
def test_every_parameter_receives_a_gradient(tiny_cfg, opts):
    cfg = tiny_cfg(*opts)
    model = build(cfg)
    loss_of(cfg, model)[0].backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, f"no gradient at {without}"


# --- the keys --------------------------------------------------------------------------------------------------------


def outputs(cfg, training=False):
    model = build(cfg).train(training)
    torch.manual_seed(3)  # the same dropped paths
    return model(*batch()[:2])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.SDTPS_BETA", "0.1"),
        ("MODEL.SDTPS_TEMPERATURE", "1.0"),
        ("MODEL.SDTPS_GLOBAL", "reduced"),
        ("MODEL.SDTPS_SIMILARITY", "attention"),
        ("MODEL.SDTPS_POOL", "gem"),
        ("MODEL.SDTPS_SPARSE_RATIO", "0.8"),
        ("MODEL.SDTPS_AGGR_RATIO", "0.8"),
    ],
)
def test_keys_of_the_forward_pass_change_sdtps_and_leave_ori(tiny_cfg, key, value):
    plain, changed = outputs(tiny_cfg()), outputs(tiny_cfg(key, value))
    assert torch.equal(plain.features["ori"], changed.features["ori"])
    assert not torch.allclose(plain.features["sdtps"], changed.features["sdtps"])


@pytest.mark.parametrize(("sparse", "aggr", "kept", "tokens"), [(0.5, 0.5, 4, 3), (0.75, 1.0, 6, 7), (1.0, 0.5, 8, 4)])
def test_ratios_set_the_counts(tiny_cfg, sparse, aggr, kept, tokens):
    selection = outputs(tiny_cfg("MODEL.SDTPS_SPARSE_RATIO", sparse, "MODEL.SDTPS_AGGR_RATIO", aggr)).selection
    assert selection.mask["TI"].sum(-1).tolist() == [kept] * BATCH
    assert selection.tokens["TI"].shape == (BATCH, tokens, WIDTH)


def test_gumbel_keys_act_in_training_only(tiny_cfg):
    gumbel = ("MODEL.SDTPS_USE_GUMBEL", "True", "MODEL.SDTPS_GUMBEL_TAU", "5.0")
    plain = ("MODEL.DROP_PATH", "0.0")
    masks = {
        (name, training): outputs(tiny_cfg(*plain, *opts), training).selection.mask["RGB"]
        for name, opts in (("off", ()), ("on", gumbel))
        for training in (True, False)
    }
    assert torch.equal(masks["on", False], masks["off", False])
    assert not torch.equal(masks["on", True], masks["off", True])
    cold = (
        *plain,
        "MODEL.SDTPS_USE_GUMBEL",
        "True",
        "MODEL.SDTPS_GUMBEL_TAU",
        "1e-6",
    )  # noise is nothing beside s / tau
    assert torch.equal(outputs(tiny_cfg(*cold), True).selection.mask["RGB"], masks["off", True])


def test_score_grad_decides_what_reaches_backbone_and_predictor(tiny_cfg):
    features, backbone, predictor = {}, {}, {}
    for mode in ("all", "predictor", "none"):
        model = build(tiny_cfg("MODEL.DROP_PATH", "0.0", "MODEL.SDTPS_SCORE_GRAD", mode))
        features[mode] = model(*batch()[:2]).features["sdtps"]
        features[mode].square().mean().backward()
        backbone[mode] = model.backbone.cam_embed.grad
        predictor[mode] = model.sdtps.predictor["RGB"][0].weight.grad
    assert torch.equal(features["all"], features["none"]) and torch.equal(features["all"], features["predictor"])
    assert not torch.allclose(backbone["all"], backbone["predictor"])
    assert not torch.allclose(backbone["predictor"], backbone["none"])
    assert predictor["none"] is None and predictor["all"].norm() > 0 and predictor["predictor"].norm() > 0


def test_switching_a_branch_leaves_the_initial_weights_of_the_others(tiny_cfg):
    """So that runs with one seed and without a branch are a pair."""
    plain = build(tiny_cfg("MODEL.USE_SDTPS", "False")).state_dict()
    rich = build(tiny_cfg("MODEL.HDM", "True", "MODEL.ATM", "True", "MODEL.SDTPS_POOL", "transformer")).state_dict()
    assert all(torch.equal(plain[name], rich[name]) for name in plain) and len(rich) > len(plain)


def test_loss_weight_scales_the_branch(tiny_cfg):
    totals = {}
    for weight in ("0", "1", "3"):
        cfg = tiny_cfg("MODEL.SDTPS_LOSS_WEIGHT", weight, "MODEL.DROP_PATH", "0.0")
        totals[weight], terms = loss_of(cfg, build(cfg))
    branch = 0.25 * terms["id/sdtps"] + terms["triplet/sdtps"]
    torch.testing.assert_close(totals["1"] - totals["0"], branch)
    torch.testing.assert_close(totals["3"] - totals["0"], 3 * branch)


def test_the_auxiliary_head_trains_the_scores_and_is_no_branch(tiny_cfg):
    cfg = tiny_cfg("MODEL.SDTPS_POOL", "cross", "MODEL.SDTPS_AUX_HEAD", "True", "MODEL.SDTPS_LOSS_WEIGHT", "0.5")
    plain, model = build(tiny_cfg("MODEL.SDTPS_POOL", "cross")), build(cfg)
    assert model.branches == plain.branches == ("ori", "sdtps")
    expected, found = (m.eval()(*batch()[:2]) for m in (plain, model))
    assert {k: v.shape for k, v in expected.logits.items()} == {k: v.shape for k, v in found.logits.items()}
    assert all(torch.equal(expected.features[k], found.features[k]) for k in ("ori", "sdtps", "both"))

    total, terms = loss_of(cfg, model.train())
    heads, weight = ("ori", "sdtps", "sdtps_aux"), cfg.MODEL.ID_LOSS_WEIGHT
    parts = {head: weight * terms[f"id/{head}"] + terms[f"triplet/{head}"] for head in heads}
    torch.testing.assert_close(total, parts["ori"] + 0.5 * (parts["sdtps"] + parts["sdtps_aux"]))
    model(*batch()[:2]).logits["sdtps_aux"].square().sum().backward()
    assert model.sdtps.predictor["TI"][0].weight.grad.norm() > 0

    images, camid, _ = batch()
    absent = torch.tensor([True, True, False]).expand(BATCH, -1)
    assert (model(images, camid, absent).features["sdtps_aux"].chunk(3, dim=1)[2] == 0).all()


def test_sdtps_only(tiny_cfg):
    cfg = tiny_cfg("MODEL.SDTPS_ONLY", "True")
    model = build(cfg)
    out = model(*batch()[:2])
    assert list(out.features) == ["sdtps"] and list(out.logits) == ["sdtps"] and model.branches == ("sdtps",)
    assert set(loss_of(cfg, model)[1]) == {"id/sdtps", "triplet/sdtps"}
    expected = (out.logits["sdtps"].argmax(-1) == batch()[2]).float().mean()
    assert accuracy(out, batch()[2]) == expected


def test_warm_up_leaves_sdtps_alone_then_rises(tiny_cfg):
    cfg = tiny_cfg("MODEL.SDTPS_WARMUP_EPOCHS", "2", "SOLVER.MAX_EPOCHS", "6", "SOLVER.WEIGHT_DECAY", "0.5")
    model = build(cfg)
    optimizer = make_optimizer(cfg, model)
    ours = [n for n, _ in model.named_parameters() if n.startswith(("sdtps.", "pool.", "heads.sdtps."))]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for epoch, weight in ((1, 0.0), (2, 0.0), (3, 0.5), (4, 1.0), (5, 1.0)):
        optimizer.zero_grad()
        total, terms = loss_of(cfg, model, epoch)
        others = 0.25 * terms["id/ori"] + terms["triplet/ori"]
        branch = 0.25 * terms["id/sdtps"] + terms["triplet/sdtps"]
        torch.testing.assert_close(total.detach(), others + weight * branch)
        total.backward()
        optimizer.step()
        moved = [n for n, p in model.named_parameters() if n in ours and not torch.equal(p, before[n])]
        if weight == 0:
            assert not moved and all(p.grad is None for n, p in model.named_parameters() if n in ours)
    assert len(moved) > len(ours) / 2
    assert not torch.equal(model.heads["ori"].classifier.weight, before["heads.ori.classifier.weight"])


def test_lr_factor_sets_the_rate_of_sdtps(tiny_cfg):
    cfg = tiny_cfg("SOLVER.SDTPS_LR_FACTOR", "10")
    model = build(cfg)
    groups = {g["name"]: g for g in make_optimizer(cfg, model).param_groups}
    assert groups["sdtps"]["lr"] == pytest.approx(10 * groups["heads"]["lr"])
    inside = {id(p) for g in ("sdtps", "sdtps.bias") for p in groups[g]["params"]}
    assert inside == {id(p) for n, p in model.named_parameters() if n.startswith(("sdtps.", "pool."))}


def test_neck_feat_and_branch_norm(tiny_cfg):
    before, after = outputs(tiny_cfg()), outputs(tiny_cfg("TEST.NECK_FEAT", "after"))
    scale = (1 + 1e-5) ** -0.5  # batch norm with its initial statistics
    torch.testing.assert_close(after.features["ori"], before.features["ori"] * scale)
    joined = outputs(tiny_cfg("TEST.BRANCH_NORM", "True")).features["both"]
    torch.testing.assert_close(joined[:, : 3 * WIDTH].norm(dim=-1), torch.ones(BATCH))
    torch.testing.assert_close(joined[:, 3 * WIDTH :].norm(dim=-1), torch.ones(BATCH))


def test_frozen_backbone_gets_no_gradient(tiny_cfg):
    cfg = tiny_cfg("MODEL.FROZEN", "True")
    model = build(cfg)
    loss_of(cfg, model)[0].backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert model.training and not model.backbone.training  # no dropped paths
    images, camid, _ = batch()
    assert torch.equal(model(images, camid).features["ori"], model(images, (camid + 1) % CAMERAS).features["ori"])
    assert model.sdtps.predictor["RGB"][0].weight.grad is not None
    assert {g["name"] for g in make_optimizer(cfg, model).param_groups} == {
        "heads",
        "heads.bias",
        "sdtps",
        "sdtps.bias",
    }


def test_gradient_checkpointing_changes_nothing(tiny_cfg):
    gradients = []
    for value in ("False", "True"):
        cfg = tiny_cfg("SOLVER.GRAD_CHECKPOINT", value)
        model = build(cfg)
        torch.manual_seed(4)
        loss_of(cfg, model)[0].backward()
        gradients.append(model.backbone.cam_embed.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("name", "patches"), [("dinov2", 162), ("dinov3", 128)])
def test_the_dino_configs_build_and_train_a_step(name, patches):
    """Random weights, one block: every parameter that needs one receives a gradient."""
    cfg = load_cfg(f"configs/RGBNT201/DeMo_SDTPS_{name}.yml", ["MODEL.DEPTH", "1"])
    model = make_model(cfg, num_classes=5, num_cameras=4, pretrained=False)
    assert model.backbone.num_patches == patches and model.backbone.embed_dim == 768
    images = {m: torch.randn(4, 3, *cfg.INPUT.SIZE_TRAIN) for m in MODALITIES}
    pid = torch.tensor([0, 0, 1, 1])
    loss, _ = make_loss(cfg, 5)(model(images, pid), pid, epoch=1)
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    with torch.no_grad():
        features = model.eval()(images).features
    assert features["both"].shape == (4, 6 * 768) and features["both"].isfinite().all()


def test_images_that_lie_one_behind_the_other_are_not_copied():
    together = torch.randn(4, 2, 3, 4, 4)
    for slices in (list(together[1:]), list(together.view(8, 3, 4, 4).view(together.shape)[:3])):
        found = _stack(slices)
        assert torch.equal(found, torch.stack(slices)) and found.data_ptr() == slices[0].data_ptr()
    slices = list(together)
    for others in (slices[::-1], [s.clone() for s in slices], slices[::2], [slices[0]] * 3, list(together.mT)):
        found = _stack(others)
        assert torch.equal(found, torch.stack(others)) and found.data_ptr() not in [s.data_ptr() for s in others]
