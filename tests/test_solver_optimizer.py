import pytest
import torch
from torch import nn

from configs.defaults import get_cfg
from solver import create_scheduler, make_optimizer
from utils.errors import UserError


class Toy(nn.Module):
    """The parameter names of the real model, in its order."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.vit = nn.Linear(2, 2)
        self.backbone.cam_embed = nn.Parameter(torch.zeros(4, 2))
        self.backbone.proj = nn.Linear(2, 2, bias=False)
        self.reduce = nn.ModuleDict({"RGB": nn.Linear(2, 2)})
        self.sdtps = nn.Linear(2, 2)
        self.pool = nn.Linear(2, 1)
        self.heads = nn.ModuleDict({name: nn.Module() for name in ("ori", "sdtps")})
        for head in self.heads.values():
            head.bottleneck = nn.BatchNorm1d(2)
            head.bottleneck.bias.requires_grad_(False)
            head.classifier = nn.Linear(2, 3, bias=False)

    def forward(self, x):
        x = self.backbone.proj(self.backbone.vit(x) + self.backbone.cam_embed[0])
        x = self.sdtps(self.reduce["RGB"](x)) * self.pool(x)
        return sum(head.classifier(head.bottleneck(x)) for head in self.heads.values())


EXPECTED = {  # group: (rate, decay, members)
    "backbone": (1e-5, 0.1, ["backbone.vit.weight", "backbone.proj.weight"]),
    "backbone.bias": (1e-5, 0.2, ["backbone.vit.bias"]),
    "heads": (
        1e-3,
        0.1,
        ["backbone.cam_embed", "reduce.RGB.weight"]
        + [f"heads.{head}.{part}.weight" for head in ("ori", "sdtps") for part in ("bottleneck", "classifier")],
    ),
    "heads.bias": (3e-3, 0.2, ["reduce.RGB.bias"]),
    "sdtps": (5e-3, 0.1, ["sdtps.weight", "pool.weight"]),
    "sdtps.bias": (15e-3, 0.2, ["sdtps.bias", "pool.bias"]),
}


def config(**solver):
    cfg = get_cfg()
    cfg.SOLVER.merge_from_list(
        [
            x
            for item in {
                "BASE_LR": 1e-3,
                "BACKBONE_LR": 1e-5,
                "BIAS_LR_FACTOR": 3.0,
                "SDTPS_LR_FACTOR": 5.0,
                "WEIGHT_DECAY": 0.1,
                "WEIGHT_DECAY_BIAS": 0.2,
                **solver,
            }.items()
            for x in item
        ]
    )
    return cfg


def trained(cfg, steps=3):
    torch.manual_seed(0)
    model = Toy()
    optimizer = make_optimizer(cfg, model)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 2)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_groups_by_hand():
    model = Toy()
    optimizer = make_optimizer(config(), model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        group["name"]: (group["lr"], group["weight_decay"], [names[id(p)] for p in group["params"]])
        for group in optimizer.param_groups
    }
    assert list(found) == list(EXPECTED)
    for name, (rate, decay, members) in EXPECTED.items():
        assert found[name] == (pytest.approx(rate), decay, members)
    assert all(group["initial_lr"] == group["lr"] for group in optimizer.param_groups)


def test_frozen_parameters_and_empty_groups_are_left_out():
    model = Toy()
    model.backbone.vit.requires_grad_(False)
    model.backbone.proj.requires_grad_(False)
    optimizer = make_optimizer(config(), model)
    assert [group["name"] for group in optimizer.param_groups] == list(EXPECTED)[2:]
    with pytest.raises(UserError, match="no trainable parameter"):
        make_optimizer(config(), Toy().requires_grad_(False))


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_the_optimizer_that_the_config_names(name):
    optimizer = make_optimizer(config(OPTIMIZER_NAME=name, MOMENTUM=0.8), Toy())
    assert type(optimizer) is getattr(torch.optim, name)
    assert optimizer.param_groups[0].get("momentum") == (0.8 if name == "SGD" else None)


def test_the_scheduler_takes_rates_from_the_config_even_after_a_plain_load():
    model, optimizer = trained(config())
    fresh = make_optimizer(config(BASE_LR=0.5), model)
    fresh.load_state_dict(optimizer.state_dict())
    scheduler = create_scheduler(config(BASE_LR=0.5, WARMUP_ITERS=0), fresh)
    assert scheduler.rates()["heads"] == 0.5
