import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from configs.defaults import get_cfg
from solver import create_scheduler, make_optimizer

REFERENCE = json.loads((Path(__file__).parent / "data/reference/demo_rgbnt201.lr.json").read_text())


def build(**solver):
    cfg = get_cfg()
    cfg.SOLVER.merge_from_list([x for item in solver.items() for x in item])
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "heads": nn.Linear(2, 2), "sdtps": nn.Linear(2, 2)})
    optimizer = make_optimizer(cfg, model)
    return create_scheduler(cfg, optimizer), optimizer


def test_cosine_by_hand():
    scheduler, optimizer = build(
        MAX_EPOCHS=30, WARMUP_ITERS=10, WARMUP_FACTOR=0.1, MIN_LR_FACTOR=0.01, BASE_LR=1.0, BACKBONE_LR=0.25,
        BIAS_LR_FACTOR=2.0, SDTPS_LR_FACTOR=10.0,
    )  # fmt: skip
    base = {"backbone": 0.25, "backbone.bias": 0.25, "heads": 1, "heads.bias": 2, "sdtps": 10, "sdtps.bias": 20}
    assert scheduler.rates() == pytest.approx({name: 0.1 * rate for name, rate in base.items()})  # before any step
    for epoch, share in [
        (0.0, 0.1),
        (2.5, 0.1 + 0.9 / 4),
        (10.0, 1.0),
        (15.0, 0.01 + 0.99 * (2 + math.sqrt(2)) / 4),
        (20.0, 0.505),
        (30.0, 0.01),
        (31.0, 0.01),
        (5.0, 0.55),  # backwards: it remembers nothing
    ]:
        scheduler.step(epoch)
        assert scheduler.rates() == pytest.approx({name: share * rate for name, rate in base.items()}), epoch
        assert [group["lr"] for group in optimizer.param_groups] == list(scheduler.rates().values())


def test_cosine_has_no_jump():
    scheduler, _ = build(MAX_EPOCHS=20, WARMUP_ITERS=5)
    shares = torch.tensor([scheduler.share(step / 100) for step in range(2001)])
    assert shares.diff().abs().max() < 0.9 / 500 * 1.01
    assert shares.argmax() == 500


@pytest.mark.parametrize("warmup, shares", [(0, [1.0, 0.5005, 0.001]), (4, [0.1, 0.55, 1.0]), (8, [0.1, 0.325, 0.55])])
def test_cosine_without_or_with_nothing_but_warm_up(warmup, shares):
    scheduler, _ = build(MAX_EPOCHS=4, WARMUP_ITERS=warmup, WARMUP_FACTOR=0.1, MIN_LR_FACTOR=0.001)
    assert [scheduler.share(epoch) for epoch in (0.0, 2.0, 4.0)] == pytest.approx(shares)


def test_demo_is_the_reference():
    scheduler, _ = build(
        SCHEDULE="demo", MAX_EPOCHS=50, WARMUP_ITERS=10, WARMUP_FACTOR=0.1, MIN_LR_FACTOR=0.001, BASE_LR=3.5e-4,
        BACKBONE_LR=5e-6, BIAS_LR_FACTOR=2.0,
    )  # fmt: skip
    groups = {
        "backbone": "backbone_weight",
        "backbone.bias": "backbone_bias",
        "heads": "head_weight",
        "heads.bias": "head_bias",
    }
    for epoch in range(1, 51):
        for progress in (epoch - 1, epoch - 0.5, epoch - 1e-9):  # beginning, middle and end of the epoch
            scheduler.step(progress)
            rates = scheduler.rates()
            for group, key in groups.items():
                assert rates[group] == pytest.approx(REFERENCE[key][epoch], rel=1e-6), (group, progress)
    scheduler.step(50.0)
    assert scheduler.rates()["heads"] == pytest.approx(REFERENCE["head_weight"][50], rel=1e-6)


def test_demo_stands_at_the_first_epoch_before_any_step():
    scheduler, _ = build(SCHEDULE="demo", MAX_EPOCHS=50, WARMUP_ITERS=10, BASE_LR=3.5e-4, WARMUP_FACTOR=0.1)
    assert scheduler.rates()["heads"] == pytest.approx(REFERENCE["head_weight"][1], rel=1e-6)
