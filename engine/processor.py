"""The training loop, from the first batch to the last table, read top to bottom."""

import logging
import time
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from tqdm import tqdm
from yacs.config import CfgNode

from data import ReidData, tell_lost_workers
from engine.background import CheckpointWriter
from engine.checkpoint import Start, TrainState
from engine.compile import compile_training, pays_in_evaluation
from engine.cuda_graph import recording_stream
from engine.device import autocast_dtype, describe
from engine.diagnosis import DiagnosingWriter, Diagnosis
from engine.evaluator import EvalResult, evaluate, format_table, write_metrics
from engine.guard import FiniteGuard
from engine.interrupt import StopRequest
from engine.monitor import PROBE_SAMPLES, probe_is_sparing, score_gradient_probe
from engine.output import LAST, METRICS_FILE, open_output_dir
from engine.parallel import Objective, idle_parameters, parallel
from engine.progress import Progress
from engine.step import TrainStep
from modeling import ReIDModel
from modeling.regions import compile_regions, uncompiled
from solver.make_loss import ReIDLoss
from solver.scheduler import CosineSchedule, DemoSchedule
from utils.distributed import barrier, from_main, is_main, rank, world_size
from utils.errors import Interrupted
from utils.logging import MetricsWriter, setup_logging
from utils.seed import rank_seed, seed_everything
from utils.version import code_version

log = logging.getLogger(__name__)

PICTURES = 4
"""Test images on which every evaluation draws the selected patches."""
PROBE_STEP = 10
"""The gradient probe runs once an epoch, before this step or the last, on some samples of its batch: launched kernel by
kernel, for which the host has time while the device is busy with the steps before. With a log line every tenth step, it
first waits for the device behind the eleventh."""


@tell_lost_workers()
def do_train(
    cfg: CfgNode,
    model: ReIDModel,
    data: ReidData,
    loss_fn: ReIDLoss,
    optimizer: torch.optim.Optimizer,
    scheduler: CosineSchedule | DemoSchedule,
    start: Start | None = None,
) -> dict[str, dict]:
    """Trains a model, evaluates it on the way, and keeps checkpoints, metrics and pictures in OUTPUT_DIR.

    Args:
        cfg: the resolved config.
        model: on its device.
        data: loaders of `data.make_dataloader`.
        loss_fn: `(output, pid, epoch) -> total, terms`.
        optimizer, scheduler: from `solver`; `scheduler.step(epoch)` sets the rates for a moment, in epochs.
        start: a checkpoint to go on from.

    Returns:
        Metrics of the "last" and the "best" evaluation, and of the one "before" training; each a dict of branch ->
        mAP, R1, R5, R10 in percent, and "epoch".

    Raises:
        NonFiniteError: a loss or a gradient was not finite; it never reached the weights, and nothing was saved since.
        Interrupted: SIGINT or SIGTERM; the state is saved.
        UserError: the checkpoint does not fit, a data worker died, or an evaluation met a NaN or an infinity.
    """
    assert data.train is not None, "make_dataloader(cfg, train=False) gives nothing to train on"
    s, train_loader = cfg.SOLVER, data.train
    out = Path(cfg.OUTPUT_DIR)
    device = next(model.parameters()).device
    dtype = autocast_dtype(s.AMP, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    ema = ModelEmaV3(model, decay=s.EMA_DECAY) if s.EMA_DECAY > 0 else None
    state = TrainState(cfg, model, optimizer, scaler, ema, data.identities)
    if rank() > 0:
        seed_everything(rank_seed(s.SEED, 0, rank()))
    account = state.restore(start) if start else ""  # refuses what does not fit before the folder is touched
    open_output_dir(cfg, start.path if start else None, state.epoch, trains=state.epoch < s.MAX_EPOCHS)
    setup_logging(out)
    log.info("training on %s; commit %s", describe(device, dtype), code_version())
    if start:
        log.info(account)
        state.best = from_main(lambda: state.keep_copies(start, out))
    guard = FiniteGuard(model, optimizer, scaler)
    diagnosis = Diagnosis(cfg, loss_fn, state.global_step)
    writer = DiagnosingWriter(out, diagnosis, resume_step=state.global_step + 1 if start else None)
    progress = Progress(cfg, scheduler, guard, writer, state.meters, device)

    def evaluate_now(epoch: int) -> dict:
        network = ema.module if ema else model
        with nullcontext() if pays_in_evaluation(cfg, len(data.val.indices)) else uncompiled(network):
            result = evaluate(cfg, network, data.val, pictures=PICTURES)
        _record_evaluation(result, writer, epoch, state.global_step)
        return result.metrics | {"epoch": epoch}

    results: dict[str, dict] = {}

    def keep_results() -> None:
        sections = {"before": results.get("before"), "last": results.get("last"), "best": state.best}
        known = {name: metrics for name, metrics in sections.items() if metrics}
        writer.later("metrics.json", write_metrics, out / METRICS_FILE, **known)

    idle = idle_parameters(model, loss_fn, state.epoch + 1) if world_size() > 1 else []
    stream = recording_stream(cfg, model, idle)
    at_once = s.IMS_PER_BATCH // s.ACCUMULATION // world_size()
    compiled = compile_training(cfg, model, loss_fn, dtype, at_once, replayed=stream is not None)
    if ema:
        compile_regions(ema.module, enable=compiled)
    if start is None:
        knowing_nothing = loss_fn.uninformed(model.heads.keys(), 2 * cfg.MODEL.SDTPS_WARMUP_EPOCHS + 1)
        log.info("a network that knows nothing has a loss of %.2f", knowing_nothing)
        results["before"] = evaluate_now(0)
        keep_results()
    model.train()
    barrier()
    train_step = TrainStep(cfg, parallel(Objective(model, loss_fn), idle, stream), guard, ema, stream)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # not later: a CUDA graph's memory is counted while it is recorded

    with (
        StopRequest(s.RANK_TIMEOUT) as stop,
        closing(train_step),
        closing(writer),
        progress,
        CheckpointWriter() as files,
    ):
        for epoch in range(state.epoch + 1, s.MAX_EPOCHS + 1):
            train_loader.set_epoch(epoch, state.step)
            steps = len(train_loader)
            batches, quiet = train_loader.batches(device), None if is_main() else True
            bar = tqdm(batches, desc=f"epoch {epoch}", initial=state.step, total=steps, leave=False, disable=quiet)
            begin = time.perf_counter()
            progress.begin(epoch, steps, state.step)

            for step, batch in enumerate(bar, state.step + 1):
                if step == min(PROBE_STEP, steps):
                    part, sparing = batch.part(0, PROBE_SAMPLES), probe_is_sparing(at_once, dtype)
                    progress.probe = score_gradient_probe(model, part, loss_fn, epoch, dtype, sparing)
                scheduler.step(epoch - 1 + (step - 1) / steps)
                state.epoch, state.step, state.global_step = epoch - 1, step, state.global_step + 1
                values, output = train_step(batch, epoch, state.global_step)
                progress.update(step, state.global_step, values, output)
                if (stop_signal := stop.agreed()) is not None:
                    guard.raise_if_bad()
                    progress.leave(state.global_step)
                    state.save(files, out / LAST)
                    files.finish()
                    raise Interrupted(
                        f"Stopped after step {step} of epoch {epoch}; the state is in {out / LAST}. To go on, give "
                        f"the same command with TEST.WEIGHT {out / LAST}",
                        stop_signal,
                    )

            # the epoch is over: evaluate, save
            progress.end(state.global_step)
            trained = time.perf_counter()
            state.epoch, state.step = epoch, 0
            copies = [out / f"{cfg.MODEL.NAME}_{epoch}.pth"] if epoch % s.CHECKPOINT_PERIOD == 0 else []
            if epoch % s.EVAL_PERIOD == 0 or epoch == s.MAX_EPOCHS:
                results["last"] = evaluate_now(epoch)
                if state.best is None or _score(results["last"]) > _score(state.best):
                    state.best = results["last"]
                    copies.append(out / f"{cfg.MODEL.NAME}best.pth")
                keep_results()
            evaluated = time.perf_counter()
            if copies or epoch == s.MAX_EPOCHS or not from_main(lambda: files.busy):  # training does not wait for LAST
                state.save(files, out / LAST, *copies)
            saved = time.perf_counter()
            spent = {"train": trained - begin, "evaluation": evaluated - trained, "save": saved - evaluated}
            writer.scalars(state.global_step, epoch, spent, kind="seconds")
        files.finish()
        if "last" in results:
            keep_results()  # the disk may have been full when it was tried before
        else:
            log.info("MAX_EPOCHS %d is reached: nothing left to train", s.MAX_EPOCHS)
            results["last"] = evaluate_now(state.epoch)

    results["best"] = state.best or results["last"]
    log.info("the end\n%s", _final_table(results))
    return results


def _score(metrics: dict) -> float:
    """mAP of `both`, or of the only branch."""
    branch = "both" if "both" in metrics else next(k for k in metrics if k != "epoch")
    return metrics[branch]["mAP"]


def _record_evaluation(result: EvalResult, writer: MetricsWriter, epoch: int, global_step: int) -> None:
    scalars = {f"{branch}/{k}": v for branch, row in result.metrics.items() for k, v in row.items()}
    writer.scalars(global_step, epoch, scalars | result.statistics, kind="eval")
    for name, picture in result.pictures.items():
        writer.image(name, picture, global_step, epoch)
    log.info("evaluation after epoch %d\n%s", epoch, format_table(result.metrics))


def _final_table(results: dict[str, dict]) -> str:
    rows: dict[str, dict[str, float]] = {}
    for when in ("before", "last", "best"):
        if when in results:
            metrics = results[when]
            rows |= {f"{when} (epoch {metrics['epoch']}) {b}": m for b, m in metrics.items() if b != "epoch"}
    return format_table(rows, "evaluation")
