"""One seed for every source of randomness."""

import os
import random

import numpy as np
import torch


def rank_seed(seed: int, step: int, rank: int) -> int:
    """A seed of a rank's own: its dropout and dropped paths differ from those of the others."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seeds Python, NumPy and torch; `deterministic` also asks CUDA for kernels that give the same bits every time."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        if os.environ.get("CUBLAS_WORKSPACE_CONFIG") != ":16:8":
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # with any other, products may differ from run to run
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
