"""The training loop, from the first batch to the last table, read top to bottom."""

import logging
import time
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm
from yacs.config import CfgNode

from data import Batch, ReidData, tell_lost_workers
from engine.background import CheckpointWriter
from engine.checkpoint import Start, TrainState
from engine.device import autocast_dtype, describe
from engine.diagnosis import DiagnosingWriter, Diagnosis
from engine.evaluator import EvalResult, evaluate, format_table, write_metrics
from engine.guard import FiniteGuard
from engine.interrupt import StopRequest
from engine.meters import Meters
from engine.monitor import PartNorms, score_gradient_probe, selection_statistics
from engine.output import LAST, METRICS_FILE, open_output_dir
from modeling import ReIDModel, ReIDOutput
from solver.make_loss import ReIDLoss
from solver.scheduler import CosineSchedule, DemoSchedule
from utils.errors import Interrupted
from utils.logging import MetricsWriter, setup_logging
from utils.modalities import MODALITIES

log = logging.getLogger(__name__)

PICTURES = 4
"""Test images on which every evaluation draws the selected patches."""
PROBE_SAMPLES = 16
"""Samples of an epoch's first batch on which the gradient probe runs."""


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
    epoch_meters, window_meters = Meters(), Meters()
    state = TrainState(cfg, model, optimizer, scaler, ema, data.identities, meters=epoch_meters)
    account = state.restore(start) if start else ""  # refuses what does not fit before the folder is touched
    open_output_dir(cfg, start.path if start else None, state.epoch, trains=state.epoch < s.MAX_EPOCHS)
    setup_logging(out)
    log.info("training on %s", describe(device, dtype))
    if start:
        log.info(account)
        state.keep_copies(start, out)
    guard = FiniteGuard(model, optimizer, scaler)
    part_norms = PartNorms(guard.names, device)
    writer = DiagnosingWriter(out, Diagnosis(cfg, loss_fn), resume_step=state.global_step + 1 if start else None)

    def evaluate_now(epoch: int) -> dict:
        result = evaluate(cfg, ema.module if ema else model, data.val, pictures=PICTURES)
        _record_evaluation(result, writer, epoch, state.global_step)
        return result.metrics | {"epoch": epoch}

    results: dict[str, dict] = {}

    def keep_results() -> None:
        sections = {"before": results.get("before"), "last": results.get("last"), "best": state.best}
        known = {name: metrics for name, metrics in sections.items() if metrics}
        writer.attempt("metrics.json", write_metrics, out / METRICS_FILE, **known)

    if start is None:
        knowing_nothing = loss_fn.uninformed(model.heads.keys(), 2 * cfg.MODEL.SDTPS_WARMUP_EPOCHS + 1)
        log.info("a network that knows nothing has a loss of %.2f", knowing_nothing)
        results["before"] = evaluate_now(0)
        keep_results()
    model.train()

    with StopRequest() as stop, CheckpointWriter() as files:
        for epoch in range(state.epoch + 1, s.MAX_EPOCHS + 1):
            train_loader.set_epoch(epoch, state.step)
            steps = len(train_loader)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            batches = train_loader.batches(device)
            bar = tqdm(batches, desc=f"epoch {epoch}", initial=state.step, total=steps, leave=False, disable=None)
            clock, clock_step = time.perf_counter(), state.step

            for step, batch in enumerate(bar, state.step + 1):
                # one step: forward and backward over the micro-batches, then a guarded update
                if step == 1:
                    head = _slice(batch, 0, PROBE_SAMPLES)
                    probe = score_gradient_probe(model, head, loss_fn, epoch, dtype)
                    writer.scalars(state.global_step, epoch, probe, kind="probe")
                scheduler.step(epoch - 1 + (step - 1) / steps)
                optimizer.zero_grad(set_to_none=True)
                guard.before_forward()
                values: dict[str, Tensor] = {}
                for part in _micro_batches(batch, s.ACCUMULATION):
                    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                        output = model(part.images, part.camid)
                        loss, terms = loss_fn(output, part.pid, epoch)
                    scaler.scale(loss / s.ACCUMULATION).backward()
                    for name, value in {"loss": loss, **terms, "acc": _accuracy(output, part.pid)}.items():
                        values[name] = values.get(name, 0) + value.detach() / s.ACCUMULATION
                scaler.unscale_(optimizer)
                norms = guard.gradient_norms()
                if s.GRAD_CLIP > 0:
                    total_norm = torch.linalg.vector_norm(norms)
                    nn.utils.clip_grads_with_norm_(guard.parameters, s.GRAD_CLIP, total_norm)
                state.epoch, state.step, state.global_step = epoch - 1, step, state.global_step + 1
                guard.step(state.global_step, {k: v for k, v in values.items() if k != "acc"}, norms)
                if ema:
                    ema.update(model, step=state.global_step)
                values |= part_norms(norms)
                epoch_meters.update(values)
                window_meters.update(values)

                # every LOG_PERIOD steps: read back and tell
                if step % s.LOG_PERIOD == 0 or step == steps:
                    guard.raise_if_bad()
                    scalars = window_meters.read() | {f"lr/{name}": lr for name, lr in scheduler.rates().items()}
                    if output.selection is not None:
                        scalars |= {k: float(v.detach()) for k, v in selection_statistics(output.selection).items()}
                    seconds = time.perf_counter() - clock
                    scalars["samples_per_second"] = (step - clock_step) * s.IMS_PER_BATCH / seconds
                    clock, clock_step = time.perf_counter(), step
                    if device.type == "cuda":
                        scalars["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
                    if scaler.is_enabled():
                        scalars |= {"scale": scaler.get_scale(), "skipped_steps": float(guard.skipped)}
                    writer.scalars(state.global_step, epoch, scalars, kind="train")
                    mean = epoch_meters.read()
                    log.info(
                        f"Epoch[{epoch}] Iteration[{step}/{steps}] Loss: {mean['loss']:.3f}, "
                        f"Acc: {mean['acc']:.3f}, Base Lr: {scheduler.rates()['heads']:.2e}"
                    )
                    window_meters.reset()
                if stop.requested is not None:
                    guard.raise_if_bad()
                    state.save(files, out / LAST)
                    files.finish()
                    raise Interrupted(
                        f"Stopped after step {step} of epoch {epoch}; the state is in {out / LAST}. To go on, give "
                        f"the same command with TEST.WEIGHT {out / LAST}",
                        stop.requested,
                    )

            # the epoch is over: evaluate, save
            mean = epoch_meters.read()
            log.info(f"Epoch {epoch} done. Loss: {mean['loss']:.3f}, Acc: {mean['acc']:.3f}")
            writer.scalars(state.global_step, epoch, mean, kind="epoch")
            epoch_meters.reset()
            state.epoch, state.step = epoch, 0
            copies = [out / f"{cfg.MODEL.NAME}_{epoch}.pth"] if epoch % s.CHECKPOINT_PERIOD == 0 else []
            if epoch % s.EVAL_PERIOD == 0 or epoch == s.MAX_EPOCHS:
                results["last"] = evaluate_now(epoch)
                if state.best is None or _score(results["last"]) > _score(state.best):
                    state.best = results["last"]
                    copies.append(out / f"{cfg.MODEL.NAME}best.pth")
                keep_results()
            state.save(files, out / LAST, *copies)
        files.finish()
        if "last" in results:
            keep_results()  # the disk may have been full when it was tried before

    if "last" not in results:
        log.info("MAX_EPOCHS %d is reached: nothing left to train", s.MAX_EPOCHS)
        results["last"] = evaluate_now(state.epoch)
    results["best"] = state.best or results["last"]
    writer.close()
    log.info("the end\n%s", _final_table(results))
    return results


def _micro_batches(batch: Batch, parts: int) -> list[Batch]:
    """Cuts a batch into equal parts; identities lie side by side in it, so none is split."""
    size = len(batch.pid) // parts
    return [batch] if parts == 1 else [_slice(batch, i * size, (i + 1) * size) for i in range(parts)]


def _slice(batch: Batch, first: int, last: int) -> Batch:
    part = slice(first, last)
    images = {m: x[part] for m, x in batch.images.items()}
    ids = (batch.pid[part], batch.camid[part], batch.sceneid[part], batch.index[part])
    return Batch(images, *ids, batch.path[part])


def _accuracy(output: ReIDOutput, pid: Tensor) -> Tensor:
    """Share of the batch that the classifier names rightly: `ori`'s, or `sdtps`'s where that is the only branch.

    Where each modality has its own head, their logits are summed.
    """
    if "RGB" in output.logits:
        logits = torch.stack([output.logits[m] for m in MODALITIES]).sum(0)
    else:
        logits = output.logits["ori" if "ori" in output.logits else "sdtps"]
    return (logits.argmax(dim=-1) == pid).float().mean()


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
