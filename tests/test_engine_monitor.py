"""The monitors against numbers that can be worked out by hand."""

from dataclasses import replace

import pytest
import torch

from data import Batch
from engine.meters import Meters
from engine.monitor import PartNorms, SelectionMonitor, probe_is_sparing, score_gradient_probe, selection_statistics
from modeling import make_model
from modeling.sdtps import Selection
from solver import make_loss
from utils.modalities import MODALITIES


def selection_of(kept, scores=None, num_patches=4):
    """A selection of one sample from the kept indices of each modality."""
    kept = {m: torch.tensor([k]) for m, k in zip(MODALITIES, kept, strict=True)}
    mask = {m: torch.zeros(1, num_patches, dtype=torch.bool).scatter(1, k, True) for m, k in kept.items()}
    scores = {m: torch.tensor([scores or [0.1] * num_patches]) for m in MODALITIES}
    return Selection(tokens={}, mask=mask, scores=scores, predicted=scores, kept=kept)


def test_selection_statistics():
    values = selection_statistics(selection_of([[0, 1], [0, 2], [2, 3]], scores=[0.9, 0.5, 0.3, 0.1]))
    assert float(values["sdtps/kept_range/RGB"]) == pytest.approx(0.4)
    assert float(values["sdtps/kept_range/NI"]) == pytest.approx(0.6)
    assert float(values["sdtps/kept_range/TI"]) == pytest.approx(0.2)
    assert float(values["sdtps/predicted_spread/RGB"]) == pytest.approx(0.2958, abs=1e-4)
    assert float(values["sdtps/predicted_mean/TI"]) == pytest.approx(0.45)


def test_selection_monitor_over_batches():
    monitor = SelectionMonitor()
    monitor.update(selection_of([[0, 1], [0, 2], [2, 3]]))
    monitor.update(selection_of([[0, 1], [0, 1], [0, 1]]))
    values = monitor.read()
    assert values["sdtps/agreement/RGB-NI"] == pytest.approx((1 / 3 + 1) / 2)  # |{0}| / |{0, 1, 2}|, then all
    assert values["sdtps/agreement/RGB-TI"] == pytest.approx((0 + 1) / 2)
    assert monitor.cell_share()["RGB"].tolist() == [1, 1, 0, 0]
    assert monitor.cell_share()["TI"].tolist() == [0.5, 0.5, 0.5, 0.5]
    assert values["sdtps/cell_spread/RGB"] == pytest.approx(0.5)
    assert values["sdtps/cell_spread/TI"] == 0


def test_norms_by_part():
    names = ("backbone.vit.a", "sdtps.b", "pool.RGB.query", "heads.ori.classifier.weight", "reduce.RGB.norm.bias")
    norms = PartNorms(names, torch.device("cpu"))(torch.tensor([3.0, 1.0, 2.0, 2.0, 1.0]))
    expected = {"backbone": 3.0, "sdtps": 5**0.5, "heads": 5**0.5, "total": 19**0.5}
    assert {k.removeprefix("grad_norm/"): float(v) for k, v in norms.items()} == pytest.approx(expected)


def test_meters_leave_out_what_is_not_finite():
    meters = Meters()
    for value in (1.0, float("nan"), 3.0, float("inf")):
        meters.update({"a": torch.tensor(value), "b": torch.tensor(2.0)})
    assert meters.read() == {"a": 2.0, "b": 2.0}
    other = Meters()
    other.load_state_dict(meters.state_dict(), torch.device("cpu"))
    for m in (meters, other):
        m.update({"a": torch.tensor(5.0), "b": torch.tensor(2.0)})
    assert other.read() == meters.read() == {"a": 3.0, "b": 2.0}
    meters.update({"c": torch.tensor(7.0)})  # another set of branches after a resume
    assert meters.read() == {"c": 7.0}


@pytest.fixture
def probe_inputs(tiny_cfg):
    def build(*opts):
        cfg = tiny_cfg("MODEL.DROP_PATH", "0.5", *opts)
        torch.manual_seed(0)
        model = make_model(cfg, num_classes=4, num_cameras=2, pretrained=False)
        ids = torch.arange(8)
        images = {m: torch.randn(8, 3, 64, 32, generator=torch.Generator().manual_seed(1)) for m in MODALITIES}
        return model, Batch(images, ids // 2, ids % 2, ids, ids, [""] * 8), make_loss(cfg, 4)

    return build


def test_probe_tells_the_score_path_from_the_value_path(probe_inputs):
    values = {}
    for mode in ("all", "predictor", "none"):
        model, batch, loss_fn = probe_inputs("MODEL.SDTPS_SCORE_GRAD", mode)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        state = torch.get_rng_state()
        values[mode] = {k: v.item() for k, v in score_gradient_probe(model, batch, loss_fn, epoch=1).items()}
        assert model.training and model.sdtps.score_grad == mode and not model.backbone.grad_checkpointing
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
    value = [v["backbone_value"] for v in values.values()]
    assert value[0] > 0 and value == pytest.approx([value[0]] * 3)
    score = [values[mode]["backbone_score"] for mode in ("all", "predictor", "none")]
    assert score[0] > score[1] > score[2] == 0
    total = values["all"]["backbone_total"]
    assert abs(total - value[0]) <= score[0] * (1 + 1e-5)  # the triangle inequality


@pytest.mark.parametrize("opts", [(), ("MODEL.SDTPS_AFTER_BLOCK", "1")], ids=["", "after block 1"])
@pytest.mark.parametrize("sparing", [True, False])
def test_probe_tells_what_two_passes_from_the_images_on_would(probe_inputs, opts, sparing):
    model, batch, loss_fn = probe_inputs(*opts)
    checkpointed, encode = [], model.encode
    model.encode = lambda *args: checkpointed.append(model.backbone.grad_checkpointing) or encode(*args)
    found = score_gradient_probe(model, batch, loss_fn, epoch=1, sparing=sparing)
    assert checkpointed == [sparing]
    model.eval()
    gradients = {}
    for mode in ("all", "none"):
        model.sdtps.score_grad = mode
        output = model(batch.images, batch.camid, batch.present)
        alone = replace(output, features={"sdtps": output.features["sdtps"]}, logits={"sdtps": output.logits["sdtps"]})
        grads = torch.autograd.grad(loss_fn(alone, batch.pid, 1)[0], model.backbone.parameters(), allow_unused=True)
        gradients[mode] = torch.cat([g.flatten() for g in grads if g is not None]).double()
    assert found["backbone_total"].item() == pytest.approx(gradients["all"].norm().item(), rel=1e-5)
    assert found["backbone_value"].item() == pytest.approx(gradients["none"].norm().item(), rel=1e-5)
    score = (gradients["all"] - gradients["none"]).norm().item()
    assert score > 0 and found["backbone_score"].item() == pytest.approx(score, rel=1e-3)


def test_probe_of_a_run_in_fp16_is_in_float32(probe_inputs):
    model, batch, loss_fn = probe_inputs()
    found = score_gradient_probe(model, batch, loss_fn, 1, torch.float16)
    assert found == score_gradient_probe(model, batch, loss_fn, 1)


def test_probe_spares_memory_beside_small_steps_and_where_it_has_wider_numbers_than_they():
    dtypes = (torch.bfloat16, None, torch.float16)
    assert [[probe_is_sparing(n, dtype) for dtype in dtypes] for n in (63, 64)] == [[True] * 3, [False, False, True]]


def test_probe_is_silent_where_the_branch_does_not_train(probe_inputs):
    model, batch, loss_fn = probe_inputs("MODEL.SDTPS_WARMUP_EPOCHS", "1")
    assert score_gradient_probe(model, batch, loss_fn, epoch=1) == {}
    assert score_gradient_probe(model, batch, loss_fn, epoch=2) != {}
    model, batch, loss_fn = probe_inputs("MODEL.FROZEN", "True")
    assert score_gradient_probe(model, batch, loss_fn, epoch=1) == {}


def test_person_recall_and_precision_by_hand():
    person = torch.tensor([[True, True, True, False], [False] * 4, [True, False, True, False]])
    monitor = SelectionMonitor(person)
    monitor.update(selection_of([[0, 1], [0, 3], [2, 3]]), torch.tensor([0]))
    monitor.update(selection_of([[0, 1], [1, 2], [3, 2]]), torch.tensor([2]))
    values = monitor.read()
    recall = {m: values[f"sdtps/person_recall/{m}"] for m in MODALITIES}
    precision = {m: values[f"sdtps/person_precision/{m}"] for m in MODALITIES}
    assert recall == {"RGB": 3 / 5, "NI": 2 / 5, "TI": 2 / 5}  # of 3 + 2 person patches
    assert precision == {"RGB": 3 / 4, "NI": 2 / 4, "TI": 2 / 4}  # of 2 + 2 kept ones
    assert values["sdtps/person_recall/chance"] == 4 / 8 and values["sdtps/person_precision/chance"] == 5 / 8
    assert not any("person" in name for name in SelectionMonitor().read())
