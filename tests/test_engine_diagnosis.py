"""Sick runs are told by name in their first epoch, healthy ones are left in peace."""

import logging
import math
import sys
from dataclasses import replace

import pytest
import torch
from conftest import write_rgbnt201

from data import make_dataloader
from engine import diagnosis
from engine.diagnosis import Diagnosis
from engine.processor import do_train
from modeling import make_model
from modeling.sdtps import SDTPS, mix_tokens
from solver import create_scheduler, make_loss, make_optimizer
from utils.logging import read_metrics
from utils.modalities import MODALITIES

NAN = float("nan")


@pytest.fixture(scope="session")
def eight_identities(tmp_path_factory):
    return write_rgbnt201(tmp_path_factory.mktemp("eight"), identities=8, frames=8, test_identities=4)


@pytest.fixture
def train(tiny_cfg, eight_identities, tmp_path, caplog, monkeypatch):
    """`train(KEY, VALUE, …)` -> rule -> epochs in which a real run of 4 steps an epoch told it.

    `change` may spoil the model before. So small a network learns faster than the steps that the rules allow for.
    """
    monkeypatch.setattr(diagnosis, "LEARNING_STEPS", 20)

    def run(*opts, change=lambda model: None):
        caplog.set_level("INFO")
        eight = ("DATASETS.ROOT_DIR", str(eight_identities), "SOLVER.IMS_PER_BATCH", "16")
        cfg = tiny_cfg(*eight, "SOLVER.EVAL_PERIOD", "50", "SOLVER.WARMUP_ITERS", "0", *opts)
        torch.manual_seed(0)
        data = make_dataloader(cfg)
        model = make_model(cfg, num_classes=data.num_classes, num_cameras=data.num_cameras)
        change(model)
        optimizer = make_optimizer(cfg, model)
        do_train(cfg, model, data, make_loss(cfg, data.num_classes), optimizer, create_scheduler(cfg, optimizer))
        told = {}
        for line in read_metrics(tmp_path / "run" / "metrics.jsonl"):
            if line["kind"] == "diagnosis":
                (rule,) = line.keys() - {"kind", "step", "epoch"}
                told.setdefault(rule, []).append(line["epoch"])
        return told

    return run


def messages(caplog, rule, level=logging.WARNING):
    return [r.getMessage() for r in caplog.records if f"diagnosis {rule}:" in r.getMessage() and r.levelno == level]


# Real runs


def test_a_healthy_run_is_left_in_peace(train, caplog):
    assert train("SOLVER.MAX_EPOCHS", "6", "SOLVER.WARMUP_ITERS", "1") == {}
    assert not [r for r in caplog.records if "diagnosis" in r.getMessage()]


class MaskedSDTPS(SDTPS):
    """Keeps patches by a straight-through mask D, used as -(1 - D) * 1e10 in the logits: its gradient is unbounded."""

    def aggregate(self, v, choice, present=None):
        hard = torch.zeros_like(choice.scores).scatter(-1, choice.kept, 1.0)
        soft = choice.scores.softmax(-1)
        mask = hard + soft - soft.detach()
        tokens = mix_tokens(self.aggregator.values(), v, -(1 - mask) * 1e10)
        return replace(super().aggregate(v, choice, present), tokens=dict(zip(MODALITIES, tokens, strict=True)))


def test_an_unbounded_mask_gradient_is_told_in_the_first_epoch(train, monkeypatch, caplog):
    monkeypatch.setattr(sys.modules["modeling.make_model"], "FusedSDTPS", MaskedSDTPS)
    told = train("SOLVER.MAX_EPOCHS", "1")
    assert told["score_gradient_explodes"] == [1]
    assert "MODEL.SDTPS_TEMPERATURE" in messages(caplog, "score_gradient_explodes")[0]


def test_two_identities_in_a_batch(train, caplog):
    told = train("SOLVER.IMS_PER_BATCH", "8", "DATALOADER.NUM_INSTANCE", "4", "SOLVER.MAX_EPOCHS", "1")
    assert told == {"few_identities": [1]}
    (message,) = messages(caplog, "few_identities")
    assert "2 identities in each micro-batch of 8" in message and "SOLVER.IMS_PER_BATCH up (8 now)" in message


@pytest.mark.parametrize(
    ("key", "value"), [("MODEL.SDTPS_SCORE_GRAD", "none"), ("MODEL.SDTPS_TEMPERATURE", "0")], ids=["none", "tau 0"]
)
def test_scores_that_do_not_learn_on_purpose_are_mentioned(train, caplog, key, value):
    assert train(key, value, "SOLVER.MAX_EPOCHS", "1") == {"score_gradient_off": [1]}
    (message,) = messages(caplog, "score_gradient_off", logging.INFO)
    assert f"{key} {value}" in message


def test_a_starved_score_path_and_flat_importance(train, caplog):
    """All patches are kept, so that the scores act through s / tau alone, and tau takes their weight."""
    told = train("MODEL.SDTPS_TEMPERATURE", "1000", "MODEL.SDTPS_SPARSE_RATIO", "1.0", "SOLVER.MAX_EPOCHS", "1")
    assert told == {"score_gradient_starves": [1], "importance_flat": [1]}
    assert "MODEL.SDTPS_TEMPERATURE down (1000 now" in messages(caplog, "importance_flat")[0]


def test_a_saturated_predictor(train, caplog):
    def saturate(model):
        for predictor in model.sdtps.predictor.values():
            torch.nn.init.constant_(predictor[-1].bias, 10.0)

    assert train("SOLVER.MAX_EPOCHS", "1", change=saturate) == {"predictor_saturated": [1]}
    assert "SOLVER.SDTPS_LR_FACTOR" in messages(caplog, "predictor_saturated")[0]


def test_a_backbone_without_gradient(train, caplog):
    def cut(model):
        for parameter in model.backbone.parameters():
            parameter.register_hook(lambda gradient: 1e-6 * gradient)

    assert train("SOLVER.MAX_EPOCHS", "1", change=cut) == {"backbone_gradient_vanishes": [1]}


def test_a_run_that_learns_nothing(train, caplog):
    """Features that have all but collapsed, and rates that do not bring them apart."""

    def collapse(model):
        torch.nn.init.constant_(model.backbone.vit.norm.weight, 1e-3)

    rates = ("SOLVER.BASE_LR", "1e-9", "SOLVER.BACKBONE_LR", "1e-9")
    told = train("SOLVER.MAX_EPOCHS", "6", *rates, change=collapse)
    assert told["accuracy_at_chance"][0] == told["loss_uninformed"][0] == 5  # after 20 steps
    assert "SOLVER.BACKBONE_LR (1e-09 now" in messages(caplog, "loss_uninformed")[0]


def test_a_choice_by_place(train, caplog):
    def same_places(model):
        def choose(scores):
            order = torch.arange(scores.shape[-1]).expand_as(scores)
            return order[..., : model.sdtps.num_kept], order[..., model.sdtps.num_kept :]

        model.sdtps.choose = choose

    told = train("SOLVER.MAX_EPOCHS", "1", change=same_places)
    assert told == {"choices_agree": [1], "choice_ignores_image": [1]}


# Records made by hand


@pytest.fixture
def diagnose(tiny_cfg):
    """`diagnose(KEY, VALUE, …, step=…)` -> a Diagnosis of a run with 100 identities and pretrained weights."""

    def make(*opts, step=0):
        cfg = tiny_cfg("MODEL.PRETRAINED", "True", "SOLVER.IMS_PER_BATCH", "16", *opts)
        return Diagnosis(cfg, make_loss(cfg, 100), step)

    return make


def rules(findings):
    return [finding.rule for finding in findings]


@pytest.mark.parametrize(
    ("kind", "values", "rule"),
    [
        ("probe", {"backbone_score": 99.0, "backbone_value": 1.0}, None),
        ("probe", {"backbone_score": 101.0, "backbone_value": 1.0}, "score_gradient_explodes"),
        ("probe", {"backbone_score": 0.01, "backbone_value": 1.0}, None),
        ("probe", {"backbone_score": 0.002, "backbone_value": 1.0}, "score_gradient_starves"),
        ("probe", {}, None),
        ("train", {"grad_norm/backbone": 0.1, "grad_norm/heads": 2.0}, None),
        ("train", {"grad_norm/backbone": 1e-4, "grad_norm/heads": 2.0}, "backbone_gradient_vanishes"),
        ("train", {"grad_norm/heads": 2.0}, None),  # a frozen backbone
        ("train", {"sdtps/predicted_spread/NI": 0.001, "sdtps/predicted_mean/NI": 0.5}, None),
        ("train", {"sdtps/predicted_spread/NI": 0.001, "sdtps/predicted_mean/NI": 0.99}, "predictor_saturated"),
        ("train", {"sdtps/predicted_spread/NI": 0.001, "sdtps/predicted_mean/NI": 0.01}, "predictor_saturated"),
        ("train", {"sdtps/kept_range/RGB": 0.5, "sdtps/kept_range/TI": 0.02}, "importance_flat"),
        ("train", {"sdtps/kept_range/RGB": 0.5, "sdtps/kept_range/TI": 0.04}, None),
        ("train", {"loss": NAN, "acc": 0.1}, "non_finite"),
        ("memory", {"gib": 2.0, "acc": 0.0}, None),
        ("eval", {"feature_norm/ori": 2.0, "feature_norm/sdtps": 18.0, "feature_norm/both": 18.1}, None),
        (
            "eval",
            {"feature_norm/ori": 1.0, "feature_norm/sdtps": 18.0, "feature_norm/both": 18.1},
            "branch_norms_differ",
        ),
        ("eval", {"feature_norm/ori": 1.0}, None),
        ("eval", {"sdtps/agreement/RGB-NI": 0.4, "sdtps/agreement/NI-TI": 0.97}, "choices_agree"),
        ("eval", {"sdtps/cell_spread/RGB": 0.4, "sdtps/cell_spread/TI": 0.49}, "choice_ignores_image"),
        ("eval", {"sdtps/cell_spread/RGB": 0.4, "sdtps/agreement/RGB-NI": 0.6}, None),
    ],
)
def test_a_record(diagnose, kind, values, rule):
    doctor = diagnose()
    found = doctor(kind, 5, 1, values)
    assert rules(found) == ([] if rule is None else [rule])
    assert not doctor(kind, 6, 1, values), "told twice in an epoch"
    assert rules(doctor(kind, 7, 2, values)) == rules(found)


@pytest.mark.parametrize(
    ("opts", "kind", "values"),
    [
        (("TEST.BRANCH_NORM", "True"), "eval", {"feature_norm/ori": 1.0, "feature_norm/sdtps": 100.0}),
        (("MODEL.SDTPS_SPARSE_RATIO", "1.0"), "eval", {"sdtps/agreement/RGB-NI": 1.0, "sdtps/cell_spread/RGB": 0.0}),
        (("MODEL.SDTPS_TEMPERATURE", "0"), "train", {"sdtps/kept_range/RGB": 0.0}),
        (("MODEL.SDTPS_BETA", "0.5"), "train", {"sdtps/predicted_spread/NI": 0.0, "sdtps/predicted_mean/NI": 1.0}),
    ],
)
def test_what_a_key_makes_harmless(diagnose, opts, kind, values):
    assert diagnose(*opts)(kind, 5, 1, values) == []


def test_before_training_no_choice_and_no_norm_is_sick(diagnose):
    values = {"feature_norm/ori": 1.0, "feature_norm/sdtps": 100.0, "sdtps/cell_spread/RGB": 0.5}
    assert diagnose()("eval", 0, 0, values) == []


def test_random_tokens_may_be_alike_until_the_warm_up_is_over(diagnose):
    patient = ("MODEL.PRETRAINED", "False", "SOLVER.WARMUP_ITERS", "5", "SOLVER.MAX_EPOCHS", "9")
    flat = {"sdtps/kept_range/RGB": 0.001}
    assert diagnose(*patient)("train", 5, 4, flat) == []
    assert rules(diagnose(*patient)("train", 5, 5, flat)) == ["importance_flat"]


def test_identities_are_counted_by_micro_batch(diagnose):
    opts = ("DATALOADER.NUM_INSTANCE", "2", "SOLVER.ACCUMULATION", "2", "SOLVER.IMS_PER_BATCH", "32")
    assert diagnose(*opts)("train", 1, 1, {}) == []
    (finding,) = diagnose(*opts[:-1], "16")("train", 1, 1, {})
    assert (finding.rule, finding.value) == ("few_identities", 4)


def test_what_a_key_settles_is_told_once_a_run(diagnose):
    doctor = diagnose("MODEL.SDTPS_SCORE_GRAD", "none", "SOLVER.IMS_PER_BATCH", "8")
    probe = {"backbone_score": 0.0, "backbone_value": 1.0}
    found = [[f.rule for kind, s in (("probe", probe), ("train", {})) for f in doctor(kind, 1, e, s)] for e in (1, 2)]
    assert found == [["score_gradient_off", "few_identities"], []]


def test_figures_against_their_start(diagnose):
    doctor = diagnose()
    first = {"grad_norm/backbone": 2.0, "grad_norm/heads": 1.0, "sdtps/predicted_spread/RGB": 0.02}
    assert doctor("train", 10, 1, first) == []
    assert doctor("train", 20, 1, first | {"grad_norm/backbone": 59.0, "sdtps/predicted_spread/RGB": 0.005}) == []
    found = doctor("train", 30, 1, first | {"grad_norm/backbone": 61.0, "sdtps/predicted_spread/RGB": 0.003})
    assert rules(found) == ["backbone_gradient_grows", "predictor_collapses"]
    assert "61, at the beginning it was 2" in found[0].message


def test_skipped_steps_beyond_the_search_for_a_scale(diagnose):
    """20 of 62 steps, of which a run may spend 16 to find its scale: 4 is more than one in 20; later, none is free."""
    doctor = diagnose()
    assert doctor("train", 62, 1, {"skipped_steps": 19.0, "scale": 1.0}) == []
    (finding,) = doctor("train", 62, 1, {"skipped_steps": 20.0, "scale": 1.0})
    assert finding.rule == "skipped_steps" and finding.message.startswith("20 of the 62 steps")
    assert doctor("train", 72, 2, {"skipped_steps": 20.0, "scale": 1.0}) == []
    assert doctor("train", 122, 2, {"skipped_steps": 23.0, "scale": 1.0}) == []
    (finding,) = doctor("train", 122, 2, {"skipped_steps": 24.0, "scale": 1.0})
    assert finding.message.startswith("4 of the 60 steps")


def test_a_resumed_run_counts_from_where_it_goes_on(diagnose):
    doctor = diagnose(step=1000)
    assert doctor("train", 1010, 17, {"skipped_steps": 10.0, "scale": 1.0}) == []  # it may search for a scale anew
    (finding,) = doctor("train", 1020, 17, {"skipped_steps": 18.0, "scale": 1.0})
    assert finding.message.startswith("18 of the 20 steps")


def epoch_of(ori=1.0, sdtps=1.0, acc=0.5, triplet=0.7):
    """An epoch's means; the identity terms in shares of ln(100)."""
    values = {"id/ori": ori * math.log(100), "triplet/ori": triplet, "acc": acc}
    return values | {"id/sdtps": sdtps * math.log(100), "triplet/sdtps": triplet}


def test_learning_is_judged_when_there_was_time_for_it(diagnose):
    nothing = epoch_of(acc=0.01)
    assert diagnose()("epoch", 49, 3, nothing) == []  # too few steps
    assert rules(diagnose()("epoch", 60, 1, nothing)) == ["accuracy_at_chance"]
    assert rules(diagnose()("epoch", 60, 2, nothing)) == ["accuracy_at_chance", "loss_uninformed"]
    patient = ("MODEL.PRETRAINED", "False", "SOLVER.WARMUP_ITERS", "5", "SOLVER.MAX_EPOCHS", "9")
    assert diagnose(*patient)("epoch", 60, 4, nothing) == []
    assert rules(diagnose(*patient)("epoch", 60, 6, nothing)) == ["accuracy_at_chance", "loss_uninformed"]


def test_a_loss_is_judged_head_by_head(diagnose):
    (finding,) = diagnose()("epoch", 60, 2, epoch_of(ori=0.5, acc=0.9))
    assert finding.rule == "loss_uninformed" and finding.message.startswith("the loss of sdtps in epoch 2")
    assert finding.value == pytest.approx(1, abs=0.01)
    assert diagnose()("epoch", 60, 2, epoch_of(ori=0.9, sdtps=0.9, acc=0.9, triplet=1.2)) == []  # far, but told apart
    found = diagnose()("epoch", 60, 2, epoch_of(ori=0.9, sdtps=0.9, acc=0.05, triplet=1.2))
    assert rules(found) == ["loss_uninformed"]
    for opts in (("MODEL.SDTPS_LOSS_WEIGHT", "0"), ("MODEL.SDTPS_WARMUP_EPOCHS", "1")):
        assert diagnose(*opts)("epoch", 60, 2, epoch_of(ori=0.5, acc=0.9)) == []
