"""Parameter groups with names: which rate and which decay every parameter gets."""

from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from utils.errors import UserError

OPTIMIZERS = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}


def make_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters, in groups that carry `name`, `lr`, `initial_lr` and `weight_decay`.

    The groups are `backbone`, `heads` (everything else) and `sdtps`, each followed by its `.bias`; empty ones are left
    out. Their order, and that of the parameters in them, is fixed by the model.

    Raises:
        UserError: nothing in the model is trainable.
    """
    parameters: dict[str, list[nn.Parameter]] = {name: [] for name in group_names()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameters[group_of(name)].append(parameter)
    groups: list[dict[str, Any]] = [
        {"name": name, "params": members, **group_settings(cfg, name)}
        for name, members in parameters.items()
        if members
    ]
    if not groups:
        raise UserError("the model has no trainable parameter: set MODEL.FROZEN to False or give it a head to train")
    options: dict[str, Any] = {"momentum": cfg.SOLVER.MOMENTUM} if cfg.SOLVER.OPTIMIZER_NAME == "SGD" else {}
    on_cuda = all(parameter.is_cuda for group in groups for parameter in group["params"])
    if on_cuda and cfg.SOLVER.OPTIMIZER_NAME != "SGD":  # fused SGD cannot begin with a step that is blocked
        options["fused"] = True
    return OPTIMIZERS[cfg.SOLVER.OPTIMIZER_NAME](groups, **options)


def group_names() -> list[str]:
    """The names that groups can have, in order."""
    return [part + kind for part in ("backbone", "heads", "sdtps") for kind in ("", ".bias")]


def group_of(parameter: str) -> str:
    """The group of a parameter, by its name in the model.

    The camera embedding is new to a pretrained backbone and learns with the heads; the SDTPS branch's own head too.
    """
    part = "heads"
    if parameter.startswith("backbone.") and parameter != "backbone.cam_embed":
        part = "backbone"
    elif parameter.startswith(("sdtps.", "pool.", "aux_pool.")):
        part = "sdtps"
    return part + (".bias" if parameter.endswith("bias") else "")


def group_settings(cfg: CfgNode, group: str) -> dict[str, float]:
    """The config's base rate and weight decay of a group: the one place where rates come from, also after a resume."""
    solver = cfg.SOLVER
    part, _, bias = group.partition(".")
    rate = {
        "backbone": solver.BACKBONE_LR,
        "heads": solver.BASE_LR,
        "sdtps": solver.BASE_LR * solver.SDTPS_LR_FACTOR,
    }[part]
    if bias and part != "backbone":
        rate *= solver.BIAS_LR_FACTOR
    return {"lr": rate, "initial_lr": rate, "weight_decay": solver.WEIGHT_DECAY_BIAS if bias else solver.WEIGHT_DECAY}
