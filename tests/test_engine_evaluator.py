"""Evaluation on image files: one pass, every branch, tables and files."""

import json

import pytest
import torch

import engine.evaluator
import test_net
import train_net
from configs import load_cfg
from data import make_dataloader
from engine import evaluate
from engine.evaluator import MISSING_PATTERNS, evaluate_missing, extract_features, format_table, rank
from modeling import make_model
from utils.errors import UserError
from utils.modalities import MODALITIES


@pytest.fixture
def setup(tiny_cfg):
    def build(*opts):
        cfg = tiny_cfg(*opts)
        torch.manual_seed(0)
        data = make_dataloader(cfg)
        return cfg, make_model(cfg, num_classes=data.num_classes, num_cameras=data.num_cameras, pretrained=False), data

    return build


def naive_ap_and_rank1(features, pids, camids):
    """mAP and Rank-1 by loops: every image is query and gallery, same identity and camera left out."""
    features = torch.nn.functional.normalize(features, dim=-1)
    aps, firsts = [], []
    for q in range(len(pids)):
        others = [g for g in range(len(pids)) if (pids[g], camids[g]) != (pids[q], camids[q])]
        others.sort(key=lambda g: float((features[q] - features[g]).square().sum()))
        hits = [pids[g] == pids[q] for g in others]
        firsts.append(hits[0])
        precisions = [sum(hits[: i + 1]) / (i + 1) for i, hit in enumerate(hits) if hit]
        aps.append(sum(precisions) / len(precisions))
    return 100 * sum(aps) / len(aps), 100 * sum(firsts) / len(firsts)


def test_metrics_of_every_branch_against_loops(setup):
    cfg, model, data = setup()
    result = evaluate(cfg, model, data.val, pictures=2)
    features = extract_features(model, data.val)[""].joined()
    assert list(result.metrics) == ["ori", "sdtps", "both"]
    pids, camids = data.val.pids.tolist(), data.val.camids.tolist()
    for branch, row in result.metrics.items():
        mean_ap, rank1 = naive_ap_and_rank1(features[branch], pids, camids)
        assert row["mAP"] == pytest.approx(mean_ap, abs=1e-3) and row["R1"] == pytest.approx(rank1, abs=1e-3)
    assert result.statistics["feature_norm/ori"] == pytest.approx(float(features["ori"].norm(dim=-1).mean()))
    assert 0 <= result.statistics["sdtps/agreement/RGB-TI"] <= 1
    assert result.pictures["selection"].dtype == torch.uint8 and result.pictures["selection"].shape[0] == 3
    assert result.pictures["kept_share"].shape == (3, 4 * 12, 3 * 2 * 12 + 2 * 2)


def test_pictures_that_were_drawn_on_a_card_come_to_the_host(setup, monkeypatch):
    class Drawn:
        def cpu(self):
            return "on the host"

    monkeypatch.setattr(engine.evaluator, "stack_samples", lambda samples: Drawn())
    cfg, model, data = setup()
    assert evaluate(cfg, model, data.val, pictures=2).pictures["selection"] == "on the host"


def test_one_pass_over_distinct_images(setup):
    """RGBNT201's query is its gallery: 12 images, each through the backbone once, whatever the number of branches."""
    cfg, model, data = setup()
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    evaluate(cfg, model, data.val)
    assert sum(seen) == 3 * 12


def test_evaluation_leaves_no_trace(setup):
    cfg, model, data = setup()
    model.train()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    evaluate(cfg, model, data.val)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_no_batch_waits_for_the_one_before(setup, monkeypatch):
    """Between the first batch and the last, nothing is read back from the device and nothing sent there by waiting."""
    cfg, model, data = setup("TEST.IMS_PER_BATCH", "5", "DATALOADER.CACHE", "memory")
    calls = []

    def record(owner, name):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append(name) or original(*args, **kwargs))

    record(type(model), "decode")
    record(torch, "tensor")
    for name in ("cpu", "item", "tolist", "__bool__", "__float__", "__int__"):
        record(torch.Tensor, name)
    assert evaluate(cfg, model, data.val, pictures=4).pictures
    first, last = calls.index("decode"), len(calls) - calls[::-1].index("decode")
    assert calls[first:last] == ["decode"] * 3
    assert "cpu" in calls[last:]


@pytest.mark.parametrize("opts", [(), ("MODEL.SIE_CAMERA", "False")])
def test_missing_modalities_are_zero_images_without_another_pass(setup, opts):
    """Each pattern gives what the model gives with `present`; images pass the backbone once, blank ones beside them."""
    cfg, model, data = setup("MODEL.SDTPS_GLOBAL", "reduced", *opts)
    batches = list(data.val)
    direct = {}
    with torch.no_grad():
        for pattern in ("", "r", "nt"):
            present = torch.tensor([m[0].lower() not in pattern for m in MODALITIES])
            outputs = [model.eval()(b.images, b.camid, present.expand(len(b.pid), -1)).features for b in batches]
            direct[pattern] = {name: torch.cat([o[name] for o in outputs]) for name in outputs[0]}

    seen = []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    found = extract_features(model, data.val, missing=("", "r", "nt"))
    for pattern, features in direct.items():
        for name, expected in features.items():
            torch.testing.assert_close(found[pattern].joined()[name], expected, rtol=1e-4, atol=1e-5)
    cameras = 1 if opts else 2
    assert sum(seen) == 3 * 12 + 2 * len(batches) * cameras
    results = evaluate_missing(cfg, model, data.val, ("", "nt"))
    norm = float(direct["nt"]["ori"].norm(dim=-1).mean())
    assert results["nt"].statistics["feature_norm/ori"] == pytest.approx(norm, rel=1e-5)
    assert results[""].statistics["feature_norm/ori"] != pytest.approx(norm, rel=1e-5)


def test_feat_norm_ranks_by_the_angle(setup):
    cfg, _, data = setup()
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(len(data.val.pids), 5, generator=generator)
    scaled = features * (0.1 + 10 * torch.rand(len(features), 1, generator=generator))
    assert rank(cfg, features, data.val) == pytest.approx(rank(cfg, scaled, data.val))
    plain, _, _ = setup("TEST.FEAT_NORM", "no")
    assert rank(plain, features, data.val) != pytest.approx(rank(plain, scaled, data.val))


def test_scripts_end_to_end(tiny_yaml, tmp_path, caplog):
    """Train, then test the best checkpoint: the same numbers, one table, metrics.json."""
    caplog.set_level("INFO")
    out = tmp_path / "run"
    train_net.main(str(tiny_yaml), ["SOLVER.MAX_EPOCHS", "2"])
    assert "Epoch[1] Iteration[2/" in caplog.text and "Base Lr: " in caplog.text
    assert {"DeMobest.pth", "last.pth", "config.yml", "metrics.json", "metrics.jsonl"} <= {
        p.name for p in out.iterdir()
    }
    best = json.loads((out / "metrics.json").read_text())["best"]
    weight = ("TEST.WEIGHT", str(out / "DeMobest.pth"))
    test_net.main(str(out / "config.yml"), [*weight])
    after = json.loads((out / "metrics.json").read_text())
    assert after["best"] == best  # what training wrote is still there
    for branch in ("ori", "sdtps", "both"):
        assert after["test"]["results"]["nothing"][branch] == pytest.approx(best[branch], abs=1e-4)

    assert "the config is the one that the checkpoint was trained with" in caplog.text
    caplog.clear()
    test_net.main(str(tiny_yaml), [*weight, "TEST.MISS", "all", "TEST.RE_RANKING", "yes", "MODEL.SDTPS_BETA", "0.1"])
    assert "MODEL.SDTPS_BETA: stored 0.25, now 0.1" in caplog.text
    results = json.loads((out / "metrics.json").read_text())["test"]["results"]
    assert list(results) == ["nothing", *MISSING_PATTERNS]
    mean = sum(results[pattern]["both"]["mAP"] for pattern in MISSING_PATTERNS) / 6
    assert f"mean of six  {mean:5.1f}" in caplog.text
    again = ("TEST.RE_RANKING", "yes", "MODEL.SDTPS_BETA", "0.1")
    test_net.main(str(tiny_yaml), [*weight, "TEST.MISS", "r", *again])  # one pattern more takes none away
    assert json.loads((out / "metrics.json").read_text())["test"]["results"] == results
    test_net.main(str(tiny_yaml), [*weight, "TEST.MISS", "r"])  # under other settings the table begins anew
    assert list(json.loads((out / "metrics.json").read_text())["test"]["results"]) == ["r"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    train = next(line for line in lines if line["kind"] == "train")
    wanted = {"loss", "id/ori", "triplet/sdtps", "acc", "grad_norm/backbone", "lr/backbone", "sdtps/kept_range/RGB"}
    assert wanted <= train.keys() and train["samples_per_second"] > 0
    rates = [(line["step"], line["lr/heads"]) for line in lines if line["kind"] == "train"]
    steps = len(make_dataloader(load_cfg(tiny_yaml)).train)
    assert rates[0] == (2, pytest.approx(1e-3 * (0.1 + 0.9 / steps)))  # the second step of the one epoch of warm-up
    assert any(line["kind"] == "probe" and line["backbone_score"] > 0 for line in lines)


def test_testing_needs_a_weight(tiny_yaml):
    with pytest.raises(UserError, match="TEST.WEIGHT is empty"):
        test_net.main(str(tiny_yaml), [])


def test_format_table():
    table = format_table({"ori": {"mAP": 12.345, "R1": 100.0}, "sdtps": {"mAP": 1.0, "R1": 0.0}})
    assert table.splitlines() == ["branch    mAP     R1", "ori      12.3  100.0", "sdtps     1.0    0.0"]
