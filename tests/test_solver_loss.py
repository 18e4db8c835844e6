import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from configs.defaults import get_cfg
from solver import ReIDLoss, make_loss, triplet_loss
from utils.errors import UserError

REFERENCE = np.load(Path(__file__).parent / "data/reference/losses.npz")


def naive_triplet(features, pid, margin):
    features = features.double().numpy()
    losses = []
    for i, anchor in enumerate(features):
        distances = [math.sqrt(((anchor - other) ** 2).sum()) for other in features]
        positives = [d for j, d in enumerate(distances) if pid[j] == pid[i]]
        negatives = [d for j, d in enumerate(distances) if pid[j] != pid[i]]
        if negatives:
            gap = max(positives) - min(negatives)
            losses.append(math.log1p(math.exp(gap)) if margin is None else max(0.0, gap + margin))
    return sum(losses) / len(losses) if losses else 0.0


def batch(heads=("ori", "sdtps"), size=8, classes=5, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator).requires_grad_()  # noqa: E731
    output = SimpleNamespace(
        features={head: draw(size, width) for head in heads}, logits={head: draw(size, classes) for head in heads}
    )
    return output, torch.arange(size) // 2


def test_reference():
    score, features, target = (torch.tensor(REFERENCE[name]) for name in ("score", "feat", "target"))
    output = SimpleNamespace(features={"ori": features}, logits={"ori": score})
    for margin, name in ((None, "soft_triplet"), (0.3, "margin_triplet")):
        total, terms = ReIDLoss(score.shape[1], margin=margin)(output, target, epoch=1)
        identity, triplet = float(REFERENCE["label_smooth_ce"]), float(REFERENCE[name])
        assert terms["id/ori"].item() == pytest.approx(identity, rel=1e-6)
        assert terms["triplet/ori"].item() == pytest.approx(triplet, rel=1e-6)
        assert total.item() == pytest.approx(identity + triplet, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [None, 0.0, 0.7])
@pytest.mark.parametrize("pid", [[0, 0, 1, 1, 2, 2], [3, 1, 1, 1, 1, 1], [0, 1, 2, 3, 4, 5]])
def test_triplet_is_the_naive_loop(dtype, margin, pid):
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    loss = triplet_loss(features, torch.tensor(pid), margin)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(naive_triplet(features, pid, margin), rel=1e-6, abs=1e-7)


def test_triplet_ignores_autocast():
    features, pid = torch.randn(32, 64, generator=torch.Generator().manual_seed(2)), torch.arange(32) // 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = triplet_loss(features, pid)
    assert torch.equal(loss, triplet_loss(features, pid))


@pytest.mark.parametrize("margin", [None, 5.0])
def test_triplet_gradient_is_the_finite_difference(margin):
    features = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: triplet_loss(x, torch.arange(8) // 2, margin), features)


def test_equal_features_give_a_finite_gradient():
    features = torch.zeros(6, 4)
    features[4:] = 1.0
    features.requires_grad_()
    loss = triplet_loss(features, torch.tensor([0, 0, 0, 1, 1, 1]))
    loss.backward()
    assert loss.isfinite() and features.grad.isfinite().all()


@pytest.mark.parametrize("size", [1, 4])
def test_a_batch_of_one_identity_has_zero_loss_and_zero_gradient(size):
    features = torch.randn(size, 3).requires_grad_()
    loss = triplet_loss(features, torch.zeros(size, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and torch.equal(features.grad, torch.zeros(size, 3))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_triplet_does_not_hide_what_is_not_finite(bad):
    features = torch.randn(4, 3)
    features[1, 2] = bad
    assert not triplet_loss(features, torch.tensor([0, 0, 1, 1])).isfinite()


def test_total_is_the_weighted_sum_over_the_heads():
    output, pid = batch(heads=("RGB", "NI", "TI"))
    total, terms = ReIDLoss(5, id_weight=0.25, triplet_weight=2.0)(output, pid, epoch=1)
    assert list(terms) == [f"{name}/{head}" for head in ("RGB", "NI", "TI") for name in ("id", "triplet")]
    expected = sum((0.25 if name.startswith("id") else 2.0) * term for name, term in terms.items())
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert total.requires_grad and not any(term.requires_grad for term in terms.values())


def test_make_loss_reads_the_config():
    output, pid = batch()
    pid = pid.clamp_max(3)
    cfg = get_cfg()
    reference = make_loss(cfg, 5)(output, pid, 1)[1]
    for section, key, value, changed in [
        ("MODEL", "IF_LABELSMOOTH", "off", {"id/ori", "id/sdtps"}),
        ("MODEL", "NO_MARGIN", False, {"triplet/ori", "triplet/sdtps"}),
    ]:
        other = get_cfg()
        other[section][key] = value
        terms = make_loss(other, 5)(output, pid, 1)[1]
        assert {name for name in terms if terms[name] != reference[name]} == changed
    total = {}
    for key, value in [("ID_LOSS_WEIGHT", 0.5), ("TRIPLET_LOSS_WEIGHT", 0.5), ("SDTPS_LOSS_WEIGHT", 0.5)]:
        other = get_cfg()
        other.MODEL.ID_LOSS_WEIGHT = other.MODEL.TRIPLET_LOSS_WEIGHT = other.MODEL.SDTPS_LOSS_WEIGHT = 1.0
        other.MODEL[key] = value
        total[key] = make_loss(other, 5)(output, pid, 1)[0].item()
    identity = (reference["id/ori"] + reference["id/sdtps"]).item()
    triplet = (reference["triplet/ori"] + reference["triplet/sdtps"]).item()
    sdtps = (reference["id/sdtps"] + reference["triplet/sdtps"]).item()
    assert total == pytest.approx({
        "ID_LOSS_WEIGHT": 0.5 * identity + triplet,
        "TRIPLET_LOSS_WEIGHT": identity + 0.5 * triplet,
        "SDTPS_LOSS_WEIGHT": identity + triplet - 0.5 * sdtps,
    })  # fmt: skip
    other = get_cfg()
    other.MODEL.NO_MARGIN, other.SOLVER.MARGIN = False, 9.0
    terms = make_loss(other, 5)(output, pid, 1)[1]
    expected = naive_triplet(output.features["ori"].detach(), pid, 9.0)
    assert terms["triplet/ori"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "warmup, expected", [(0, [2.0, 2.0, 2.0]), (1, [0, 2.0, 2.0]), (4, [0, 0, 0, 0, 0.5, 1.0, 1.5, 2.0, 2.0])]
)
def test_warm_up_of_the_sdtps_head(warmup, expected):
    loss = ReIDLoss(5, sdtps_weight=2.0, sdtps_warmup_epochs=warmup)
    epochs = range(1, len(expected) + 1)
    assert [loss.branch_weight("sdtps", epoch) for epoch in epochs] == pytest.approx(expected)
    assert {loss.branch_weight(head, epoch) for head in ("ori", "moe", "RGB") for epoch in epochs} == {1.0}


def test_a_head_of_weight_zero_keeps_its_gradients_at_none():
    output, pid = batch()
    output.logits["sdtps"].data[0, 0] = math.nan  # cannot reach the total either
    loss = ReIDLoss(5, sdtps_warmup_epochs=1)
    total, terms = loss(output, pid, epoch=1)
    total.backward()
    assert total.isfinite() and {"id/sdtps", "triplet/sdtps"} < terms.keys()
    assert output.logits["sdtps"].grad is None and output.features["sdtps"].grad is None
    assert output.logits["ori"].grad is not None and output.features["ori"].grad is not None
    output, pid = batch()
    loss(output, pid, epoch=2)[0].backward()
    assert output.logits["sdtps"].grad.abs().sum() > 0 and output.features["sdtps"].grad.abs().sum() > 0


def test_a_term_of_weight_zero_keeps_its_gradients_at_none():
    output, pid = batch(heads=("ori",))
    ReIDLoss(5, id_weight=0.0)(output, pid, epoch=1)[0].backward()
    assert output.logits["ori"].grad is None and output.features["ori"].grad is not None


def test_nothing_to_learn_is_refused():
    output, pid = batch(heads=("sdtps",))
    with pytest.raises(UserError, match="epoch 1: every loss of id/sdtps, triplet/sdtps has weight 0"):
        ReIDLoss(5, sdtps_warmup_epochs=1)(output, pid, epoch=1)


def test_without_gradient_for_validation():
    output, pid = batch()
    with torch.no_grad():
        total, _ = ReIDLoss(5)(output, pid, epoch=1)
    assert not total.requires_grad


def test_uninformed_is_what_equal_logits_and_equal_distances_give():
    # four orthogonal features: every distance is the same
    output = SimpleNamespace(
        features={head: torch.eye(4) for head in ("ori", "sdtps")},
        logits={head: torch.zeros(4, 171) for head in ("ori", "sdtps")},
    )
    pid = torch.tensor([0, 0, 1, 1])
    loss = ReIDLoss(171, id_weight=0.25)
    assert loss.uninformed(["ori", "sdtps"], epoch=1) == pytest.approx(3.957, abs=1e-3)
    for each in (loss, ReIDLoss(171, margin=0.3, sdtps_weight=0.5, sdtps_warmup_epochs=2)):
        for epoch in (1, 3):
            assert each.uninformed(output.logits, epoch) == pytest.approx(each(output, pid, epoch)[0].item(), rel=1e-5)


def test_losses_of_heads_of_one_shape_and_of_several_are_those_of_each_head():
    torch.manual_seed(0)
    pid, loss_fn = torch.arange(8) // 2, ReIDLoss(5, smoothing=0.1)
    logits = {"ori": torch.randn(8, 5), "moe": torch.randn(8, 5), "sdtps": torch.randn(8, 5)}
    features = {"ori": torch.randn(8, 6), "moe": torch.randn(8, 9), "sdtps": torch.randn(8, 6)}
    total, terms = loss_fn(SimpleNamespace(logits=logits, features=features), pid, 1)
    assert list(terms) == [f"{name}/{head}" for head in logits for name in ("id", "triplet")]
    for head in logits:
        torch.testing.assert_close(terms[f"id/{head}"], F.cross_entropy(logits[head], pid, label_smoothing=0.1))
        torch.testing.assert_close(terms[f"triplet/{head}"], triplet_loss(features[head], pid))
    torch.testing.assert_close(total, sum(terms.values()))


def test_the_gradient_of_distances_is_exact_for_features_that_lie_close():
    torch.manual_seed(0)
    near = (torch.full((8, 16), 40.0) + 1e-3 * torch.randn(8, 16)).requires_grad_()
    pid = torch.arange(8) // 2
    (found,) = torch.autograd.grad(triplet_loss(near, pid), near)
    exact = near.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(triplet_loss(exact, pid), exact)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
