"""torch.compile, region by region: when it is used, and what happens where it cannot be."""

import logging
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor
from yacs.config import CfgNode

from engine.cuda_graph import has_fused_blocks
from modeling import ReIDModel
from modeling.regions import compile_regions
from solver.make_loss import ReIDLoss
from utils.modalities import MODALITIES

log = logging.getLogger(__name__)

EVALUATION_PAYS = 100_000
"""Triples to evaluate in a run for which compiling the network's evaluation takes as long as it saves: about 10 s for
its graphs, which are others than those of training, and 0.1 ms a triple (ViT-B/16 on one H200)."""


def compile_training(
    cfg: CfgNode, model: ReIDModel, loss_fn: ReIDLoss, dtype: torch.dtype | None, batch_size: int, replayed: bool
) -> bool:
    """Compiles model and loss for training, as SOLVER.COMPILE says, on a blank batch that leaves no trace.

    Where the compiler fails, for want of a C compiler or on a card that it does not know, training goes on without it
    and the log says why.

    Args:
        model: on its device.
        dtype: autocast type, None for float32.
        batch_size: triples that pass through the model at once.
        replayed: whether steps will be, see `engine.cuda_graph`.

    Returns:
        Whether the regions are compiled.
    """
    if not should_compile(cfg, model, dtype, replayed):
        return False
    start = time.perf_counter()
    # Its entries for graphs of this size overflow the stack of the thread that runs the backward pass (torch 2.11).
    torch._functorch.config.enable_autograd_cache = False
    compile_regions(model, loss_fn)
    try:
        _without_trace(model, lambda: _blank_step(cfg, model, loss_fn, dtype, batch_size))
    except Exception as error:
        compile_regions(model, loss_fn, enable=False)
        told = [
            line.strip() for line in str(error).splitlines() if line.strip()
        ]  # the first may only name the compiler
        log.warning("not compiled, so training is slower: %s: %s", type(error).__name__, " ".join(told[:2]))
        return False
    log.info("compiled for training (%.0f s)", time.perf_counter() - start)
    return True


def should_compile(cfg: CfgNode, model: ReIDModel, dtype: torch.dtype | None, replayed: bool) -> bool:
    """Whether SOLVER.COMPILE asks for compiled regions; the log says why `auto` leaves a GPU without them.

    Args:
        dtype: autocast type, None for float32.
        replayed: whether steps are.
    """
    wanted, device = cfg.SOLVER.COMPILE, next(model.parameters()).device
    if wanted != "auto":
        return wanted == "on"
    if device.type != "cuda":
        return False
    if reason := reason_against(cfg, has_fused_blocks(model, dtype), replayed):
        log.info("not compiled: %s (SOLVER.COMPILE on forces it)", reason)
    return not reason


def reason_against(cfg: CfgNode, fused: bool, replayed: bool) -> str:
    """Why a GPU is left without compiled regions; "" where they pay.

    Where blocks are fused and steps replayed, compiling takes some 30 s at the start and saves 0.02 ms a triple: only
    more than a million of them would pay (ViT-B/16 on one H200).
    """
    if cfg.SOLVER.DETERMINISTIC:
        return "SOLVER.DETERMINISTIC asks for the same numbers in every run"
    return "the fused blocks leave little to gain by it" if fused and replayed else ""


def pays_in_evaluation(cfg: CfgNode, triples: int) -> bool:
    """Whether a run evaluates so much that its evaluations should use the compiled regions.

    The whole run counts, also where it is resumed: all its evaluations compute alike.

    Args:
        triples: of one evaluation, on this rank.
    """
    evaluations = 1 + math.ceil(cfg.SOLVER.MAX_EPOCHS / cfg.SOLVER.EVAL_PERIOD)
    return evaluations * triples > EVALUATION_PAYS


def _blank_step(cfg: CfgNode, model: ReIDModel, loss_fn: ReIDLoss, dtype: torch.dtype | None, batch_size: int) -> None:
    device = next(model.parameters()).device
    blank = torch.zeros(batch_size, 3, *cfg.INPUT.SIZE_TRAIN, device=device)
    pid = torch.arange(batch_size, device=device) // cfg.DATALOADER.NUM_INSTANCE % loss_fn.num_classes
    camid = torch.zeros(batch_size, dtype=torch.long, device=device)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        output = model(dict.fromkeys(MODALITIES, blank), camid)
        loss, _ = loss_fn(output, pid, cfg.SOLVER.MAX_EPOCHS)
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(loss, parameters, allow_unused=True)


def _without_trace(model: ReIDModel, action: Callable[[], None]) -> None:
    """Runs `action` in training mode and puts back the random states, the mode and the batch statistics."""
    device = next(model.parameters()).device
    buffers: list[tuple[Tensor, Tensor]] = [(b, b.clone()) for b in model.buffers()]
    training = model.training
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            model.train()
            action()
        finally:
            model.train(training)
            for buffer, saved in buffers:
                buffer.copy_(saved)
