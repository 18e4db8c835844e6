"""Learning rates as a function of the progress in epochs: nothing to save, nothing to restore."""

import math

import torch
from timm.scheduler import CosineLRScheduler
from yacs.config import CfgNode

from solver.make_optimizer import group_settings


def create_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> "CosineSchedule | DemoSchedule":
    """The schedule that SOLVER.SCHEDULE names, with base rates from the config, set to its beginning."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = group_settings(cfg, group["name"])["lr"]
    schedule = CosineSchedule if cfg.SOLVER.SCHEDULE == "cosine" else DemoSchedule
    return schedule(cfg, optimizer)


class _Schedule:
    def __init__(self, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.epochs = cfg.SOLVER.MAX_EPOCHS
        self.warmup = cfg.SOLVER.WARMUP_ITERS

    def rates(self) -> dict[str, float]:
        """Group name -> the rate that is applied now."""
        return {group["name"]: group["lr"] for group in self.optimizer.param_groups}


class CosineSchedule(_Schedule):
    """Linear warm-up over the first epochs, then a cosine down to the end; each group moves in shares of its own rate.

    The share rises from WARMUP_FACTOR to 1 in WARMUP_ITERS epochs and falls to MIN_LR_FACTOR at MAX_EPOCHS. It changes
    with every step, not once an epoch.
    """

    def __init__(self, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(cfg, optimizer)
        self.first = cfg.SOLVER.WARMUP_FACTOR
        self.last = cfg.SOLVER.MIN_LR_FACTOR
        self.base = [group["initial_lr"] for group in optimizer.param_groups]
        self.step(0.0)

    def step(self, epoch: float) -> None:
        """Set the rates for a moment: 0.0 before the first step, 1.5 in the middle of the second epoch."""
        share = self.share(epoch)
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = base * share

    def share(self, epoch: float) -> float:
        """The share of its base rate that every group has at this moment."""
        if epoch < self.warmup:
            return self.first + (1 - self.first) * epoch / self.warmup
        progress = min((epoch - self.warmup) / max(self.epochs - self.warmup, 1e-9), 1.0)
        return self.last + (1 - self.last) * (1 + math.cos(math.pi * progress)) / 2


class DemoSchedule(_Schedule):
    """The schedule of the published DeMo, for comparison: constant within an epoch, with noise, not per group.

    Warm-up begins at WARMUP_FACTOR * BASE_LR and the cosine, counted from epoch 0, ends at MIN_LR_FACTOR * BASE_LR for
    every group, whatever its own rate; all epochs but the last are multiplied by noise of up to 67 %.
    """

    def __init__(self, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(cfg, optimizer)
        self.cosine = CosineLRScheduler(
            optimizer,
            t_initial=self.epochs,
            lr_min=cfg.SOLVER.MIN_LR_FACTOR * cfg.SOLVER.BASE_LR,
            warmup_t=self.warmup,
            warmup_lr_init=cfg.SOLVER.WARMUP_FACTOR * cfg.SOLVER.BASE_LR,
            cycle_limit=1,
            noise_range_t=(0, self.epochs),
            noise_pct=0.67,
            noise_std=1.0,
            noise_seed=42,
        )
        self.step(0.0)

    def step(self, epoch: float) -> None:
        """Set the rates of the epoch that this moment lies in: 0.0 is in the first, 1.5 in the second."""
        self.cosine.step(min(math.floor(epoch) + 1, self.epochs))
