"""SDTPS inside the backbone (MODEL.SDTPS_AFTER_BLOCK): patches that leave it on the way."""

import pytest
import torch
import torch.nn.functional as F

from modeling import make_model
from modeling.backbone import Backbone, group_size
from utils.errors import UserError
from utils.modalities import MODALITIES

INSIDE = ("MODEL.SDTPS_AFTER_BLOCK", "1", "MODEL.DROP_PATH", "0.0")
CLASSES, CAMERAS, BATCH = 5, 3, 6


def build(cfg):
    torch.manual_seed(0)
    return make_model(cfg, num_classes=CLASSES, num_cameras=CAMERAS, pretrained=False)


def batch():
    generator = torch.Generator().manual_seed(1)
    images = {m: torch.randn(BATCH, 3, 64, 32, generator=generator) for m in MODALITIES}
    return images, torch.arange(BATCH) % CAMERAS


def test_against_a_naive_loop(tiny_cfg):
    """Every image by itself: first block, choice, second block on what is left, in an order of its own."""
    model = build(tiny_cfg(*INSIDE, "MODEL.GLOBAL_LOCAL", "False")).eval()
    images, camid = batch()
    output = model(images, camid)
    vit, sdtps = model.backbone.vit, model.sdtps
    for i in range(BATCH):
        middle, normed = {}, {}
        for m in MODALITIES:
            x = torch.cat([vit.cls_token, vit.patch_embed(images[m][i : i + 1])], dim=1) + vit.pos_embed
            x[:, 0] += model.backbone.cam_embed[camid[i]]
            middle[m] = vit.blocks[0](vit.norm_pre(x))
            normed[m] = vit.norm(middle[m])
        chosen = sdtps({m: x[:, 1:] for m, x in normed.items()}, {m: x[:, 0] for m, x in normed.items()})
        for k, m in enumerate(MODALITIES):
            kept = [middle[m][0, 1 + j] for j in sorted(chosen.kept[m][0].tolist())]
            left = [j for j in range(sdtps.num_patches) if not chosen.mask[m][0, j]]
            weights = torch.stack([chosen.scores[m][0, j] for j in left]).exp()
            fused = sum(w * middle[m][0, 1 + j] for w, j in zip(weights, left, strict=True)) / weights.sum()
            x = vit.norm(vit.blocks[1](torch.stack([middle[m][0, 0], *kept, fused])[None]))[0]
            torch.testing.assert_close(output.features["ori"].chunk(3, dim=1)[k][i], x[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(output.selection.tokens[m][i, -1], x[-1], rtol=1e-4, atol=1e-4)

            aggregator, ranked = sdtps.aggregator[m], x[1:-1]
            scores = torch.stack([chosen.scores[m][0, j] for j in sorted(chosen.kept[m][0].tolist())])
            logits = aggregator.scale * aggregator.fc2(F.gelu(aggregator.fc1(aggregator.norm(ranked))))
            mixed = (logits + scores[:, None] / sdtps.temperature).softmax(dim=0).T @ ranked
            torch.testing.assert_close(output.selection.tokens[m][i, :-1], mixed, rtol=1e-4, atol=1e-4)


def test_where_nothing_is_dropped_the_globals_are_those_of_the_whole_backbone(tiny_cfg):
    inside = build(tiny_cfg(*INSIDE, "MODEL.SDTPS_SPARSE_RATIO", "1.0")).eval()
    whole = build(tiny_cfg("MODEL.SDTPS_SPARSE_RATIO", "1.0")).eval()
    features = [model(*batch()).features["ori"] for model in (inside, whole)]
    torch.testing.assert_close(*features, rtol=1e-4, atol=1e-5)


def test_ori_teaches_the_scores_through_the_fused_token(tiny_cfg):
    for mode, learns in (("all", True), ("none", False)):
        model = build(tiny_cfg(*INSIDE, "MODEL.SDTPS_SCORE_GRAD", mode))
        model(*batch()).features["ori"].square().sum().backward()
        gradient = model.sdtps.predictor["NI"][0].weight.grad
        assert (gradient is not None and gradient.norm() > 0) == learns


@pytest.mark.parametrize("pattern", [(True, False, True), (False, False, True)])
def test_leaving_out_a_modality_behind_the_first_half_is_the_same_as_before_it(tiny_cfg, pattern):
    model = build(tiny_cfg(*INSIDE)).eval()
    images, camid = batch()
    present = torch.tensor(pattern).expand(BATCH, -1)
    expected = model(images, camid, present).features["both"]
    view = model.leave_out(model.encode(images, camid), present, camid)
    torch.testing.assert_close(model.decode(view).features["both"], expected)
    assert not torch.allclose(expected, model(images, camid).features["both"])


@pytest.mark.parametrize("opts", [(), ("MODEL.HDM", "True", "MODEL.ATM", "True"), ("MODEL.SDTPS_POOL", "cross")])
def test_every_parameter_receives_a_gradient(tiny_cfg, opts):
    model = build(tiny_cfg(*INSIDE, *opts))
    output = model(*batch())
    sum(logits.square().sum() for logits in output.logits.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_gradient_checkpointing_changes_nothing(tiny_cfg):
    losses = []
    for enable in (False, True):
        model = build(tiny_cfg(*INSIDE, "SOLVER.GRAD_CHECKPOINT", str(enable)))
        model(*batch()).features["both"].square().sum().backward()
        losses.append(model.backbone.vit.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("block", [2, 5])
def test_a_block_that_is_not_there_is_told(tiny_cfg, block):
    with pytest.raises(UserError, match=rf"SDTPS_AFTER_BLOCK is {block}.*give 1 to 1, or 0"):
        build(tiny_cfg("MODEL.SDTPS_AFTER_BLOCK", str(block)))


def test_rotary_positions_are_told():
    backbone = Backbone("vit_small_patch16_dinov3", img_size=(64, 32), depth=2)
    with pytest.raises(UserError, match="rotary positions"):
        backbone.split(1)


def test_the_reduced_global_is_refused(tiny_cfg):
    with pytest.raises(UserError, match="SDTPS_AFTER_BLOCK"):
        tiny_cfg("MODEL.SDTPS_AFTER_BLOCK", "1", "MODEL.SDTPS_GLOBAL", "reduced", "MODEL.GLOBAL_LOCAL", "True")


@pytest.mark.parametrize(
    ("after", "depth", "size"), [(0, 12, 4), (0, 6, 3), (6, 12, 3), (4, 12, 4), (5, 12, 1), (3, 6, 3)]
)
def test_groups_are_of_equal_size_on_both_sides(after, depth, size):
    assert group_size(after, depth) == size
