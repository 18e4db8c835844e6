"""Speed and memory of training and evaluation, every figure by one command.

    python -m tools.benchmark                              every row that this machine can measure
    python -m tools.benchmark --rows step evaluation       some of them
    python -m tools.benchmark --rows run ranks "ranks, step" --ranks 2      one card against two
    python -m tools.benchmark --profile                    the kernels of a step, by the time they take

Each row has a process of its own. Steps and the gallery use random data of the config's shapes, evaluation and runs the
config's data set: python -m data.synthetic --out datasets/sample_full --preset full
"""

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

from configs import load_cfg
from data import Batch, make_dataloader
from engine.compile import compile_training, should_compile
from engine.cuda_graph import WARM_UP, WARM_UP_OF_RANKS, recording_stream
from engine.device import autocast_dtype, prepare_cuda, select_device
from engine.evaluator import evaluate
from engine.guard import FiniteGuard
from engine.launch import join_ranks, launch
from engine.parallel import Objective, idle_parameters, parallel
from engine.step import TrainStep
from modeling import fused_vit, make_model
from modeling.regions import compile_regions
from solver import make_loss, make_optimizer
from utils.distributed import is_launched, is_main, rank, world_size
from utils.errors import UserError
from utils.files import save_text
from utils.kernels import can_launch
from utils.logging import read_metrics, setup_logging
from utils.metrics import rank_features
from utils.modalities import MODALITIES
from utils.seed import seed_everything
from utils.version import code_version

log = logging.getLogger("tools.benchmark")

GIB = 2**30
IDS, CAMERAS = 171, 4
STEPS = 20
"""Steps between two looks at the clock."""
AS_WRITTEN = ("SOLVER.FUSED_BLOCKS", "False", "SOLVER.COMPILE", "off", "SOLVER.CUDA_GRAPH", "False")
RANDOM_WEIGHTS = ("MODEL.PRETRAINED", "False", "MODEL.PRETRAIN_PATH_T", "")

Row = dict[str, Any]


class StepBench:
    """A training step on random batches, as `engine.do_train` makes it. Each rank has the config's batch."""

    def __init__(self, cfg: CfgNode):
        self.device = _device(cfg)
        seed_everything(cfg.SOLVER.SEED, deterministic=cfg.SOLVER.DETERMINISTIC)
        self.batch_size, self.instances = cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_INSTANCE
        self.model = make_model(cfg, num_classes=IDS, num_cameras=CAMERAS, pretrained=False).to(self.device)
        self.loss_fn = make_loss(cfg, IDS)
        dtype = autocast_dtype(cfg.SOLVER.AMP, self.device)
        scaler = torch.amp.GradScaler(self.device.type, enabled=dtype is torch.float16)
        guard = FiniteGuard(self.model, make_optimizer(cfg, self.model), scaler)
        start = time.perf_counter()
        parts = self.batch_size // cfg.SOLVER.ACCUMULATION
        idle = idle_parameters(self.model, self.loss_fn, 1) if world_size() > 1 else []
        stream = recording_stream(cfg, self.model, idle)
        self.compiled = compile_training(cfg, self.model, self.loss_fn, dtype, parts, replayed=stream is not None)
        self.compile_seconds = time.perf_counter() - start
        objective = parallel(Objective(self.model, self.loss_fn), idle, stream)
        self.step = TrainStep(cfg, objective, guard, stream=stream)
        self.model.train()
        self.generator = torch.Generator(self.device).manual_seed(rank())
        self.prototypes = self._noise(IDS)

    def batch(self) -> Batch:
        """Identities that differ by a picture of their own under noise, so that there is something to learn."""
        size, device = self.batch_size, self.device
        drawn = torch.randperm(IDS, device=device, generator=self.generator)[: size // self.instances]
        pid = drawn.repeat_interleave(self.instances)
        pixels = 0.3 * self.prototypes[pid] + self._noise(size)
        images = {m: pixels[:, i].contiguous() for i, m in enumerate(MODALITIES)}
        camid = torch.arange(size, device=device) % CAMERAS
        return Batch(images, pid, camid, torch.full_like(pid, -1), pid, [""] * size)

    def _noise(self, count: int) -> torch.Tensor:
        shape = (count, len(MODALITIES), 3, *self.model.backbone.img_size)
        return torch.randn(shape, device=self.device, generator=self.generator)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _device(cfg: CfgNode) -> torch.device:
    """The device, set up as train_net.py does. Rows that start train_net.py in a process leave it to that process."""
    prepare_cuda()
    return select_device(cfg.MODEL.DEVICE)


def time_steps(cfg: CfgNode, repeats: int) -> Row:
    """Samples a second of the training step, and its peak memory."""
    bench = StepBench(cfg)
    batches = [bench.batch() for _ in range(4)]
    bench.prototypes = bench.prototypes[:0]
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # not later: memory within a CUDA graph is counted while it is recorded
    for i in range(3 + (WARM_UP if world_size() == 1 else WARM_UP_OF_RANKS)):  # until steps are replayed
        bench.step(batches[i % 4], 1, i)
    bench.synchronize()
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        for i in range(STEPS):
            bench.step(batches[i % 4], 1, i)
        bench.synchronize()
        rates.append(STEPS * bench.batch_size * world_size() / (time.perf_counter() - start))
    row = {"compiled": bench.compiled, "compile_s": round(bench.compile_seconds, 1)}
    if bench.device.type == "cuda":
        row["waits"] = _count_waits(lambda: bench.step(batches[0], 1, STEPS))
    bench.step.close()
    return _spread(rates, "samples/s") | _peak(bench.device) | row


def _count_waits(action: Callable[[], object]) -> int:
    """How often the host waits for the device."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        action()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in told)


def compare_losses(cfg: CfgNode, repeats: int) -> Row:
    """Mean loss of 50 steps, float32 as written against the config's own precision compiled, on identical images."""
    losses = {}
    for name, opts in (("float32", [*AS_WRITTEN, "SOLVER.AMP", "float32"]), ("fast", [])):
        own = cfg.clone()
        own.defrost()
        own.merge_from_list(["MODEL.DROP_PATH", 0.0, "MODEL.SDTPS_USE_GUMBEL", False, *opts])
        bench = StepBench(own)
        losses[name] = torch.stack([bench.step(bench.batch(), 1, i)[0]["loss"] for i in range(50)]).tolist()
    means = {name: statistics.fmean(values) for name, values in losses.items()}
    difference = abs(means["fast"] - means["float32"]) / means["float32"]
    ends = {f"{name} first, last": (round(v[0], 3), round(v[-1], 3)) for name, v in losses.items()}
    return {"value": 100 * difference, "unit": "% of the mean loss of 50 steps", "means": means, **ends}


def check_kernels(cfg: CfgNode, repeats: int) -> Row:
    """The largest relative error of output and gradients of fused blocks of the config's kind against timm's in
    float32, beside the error of timm's under autocast."""
    device = _device(cfg)
    backbone = make_model(cfg, num_classes=IDS, num_cameras=CAMERAS, pretrained=False).backbone
    kind, dtype = fused_vit.kind_of(backbone.vit.blocks[0]), autocast_dtype(cfg.SOLVER.AMP, device)
    if kind is None or dtype is None or not can_launch(device):
        raise UserError("kernels: there are none for this ViT, this device or this SOLVER.AMP.")
    tokens = backbone.vit.num_prefix_tokens + backbone.num_patches
    found, of_timm = zip(*fused_vit.relative_errors(kind, tokens, dtype, device, images=35).values(), strict=True)
    told = {"median": statistics.median(found), "timm's": max(of_timm), "timm's median": statistics.median(of_timm)}
    return {"value": max(found), "unit": "relative error", **told}


def time_evaluation(cfg: CfgNode, repeats: int) -> Row:
    """Triples a second from decoded images to the metrics of all branches."""
    device = _device(cfg)
    data = make_dataloader(cfg, train=False)
    model = make_model(cfg, num_classes=IDS, num_cameras=data.num_cameras, pretrained=False).to(device).eval()
    replayed = recording_stream(cfg, model) is not None  # as in training, which decides
    if should_compile(cfg, model, autocast_dtype(cfg.SOLVER.AMP, device), replayed):
        compile_regions(model)
    rates = []
    for i in range(repeats + 2):
        start = time.perf_counter()
        evaluate(cfg, model, data.val)
        if i >= 2:
            rates.append(len(data.val.pids) / (time.perf_counter() - start))
    return _spread(rates, "triples/s") | _peak(device) | {"triples": len(data.val.pids)}


def rank_gallery(cfg: CfgNode, repeats: int) -> Row:
    """Ranking 1,000 queries against a gallery of 100,000 with the features of both branches."""
    device = _device(cfg)
    width = 2 * 3 * 512
    query, gallery = torch.randn(1000, width, device=device), torch.randn(100_000, width, device=device)
    labels = [torch.arange(n) % 1500 for n in (1000, 100_000)] + [torch.arange(n) % 8 for n in (1000, 100_000)]
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        rank_features(query, gallery, *labels)
        seconds.append(time.perf_counter() - start)
    return _spread(seconds, "s") | _peak(device)


def time_run(cfg: CfgNode, repeats: int, command: list[str] | None = None, opts: tuple[str, ...] = ()) -> Row:
    """A whole run of train_net.py from files: start to the first step, then epochs with evaluation and checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yml"
        config.write_text(cfg.dump())
        out = Path(folder) / "run"
        arguments = ["--config_file", str(config), "OUTPUT_DIR", str(out), "SOLVER.MAX_EPOCHS", str(repeats + 1)]
        start = time.perf_counter()
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/compiled", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [*(command or [sys.executable]), "train_net.py", *arguments, *opts],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        first, told = 0.0, []
        assert process.stdout is not None
        for line in process.stdout:
            told.append(line)
            if not first and "Iteration[" in line:
                first = time.perf_counter() - start
        if process.wait():
            raise UserError("train_net.py failed:\n" + "".join(told[-15:]))
        lines = read_metrics(out / "metrics.jsonl")
    epochs = [line for line in lines if line["kind"] == "seconds"][1:]
    parts = {part: statistics.median(e[part] for e in epochs) for part in ("train", "evaluation", "save")}
    whole = [sum(e[part] for part in parts) for e in epochs]
    steps = epochs[-1]["step"] - epochs[-2]["step"]
    samples = steps * cfg.SOLVER.IMS_PER_BATCH
    if opts:
        samples = steps * int(opts[opts.index("SOLVER.IMS_PER_BATCH") + 1])
    rates = [samples / e["train"] for e in epochs]
    logged = [line for line in lines if "peak_memory_gib" in line]
    kinds = ("peak", "reserved") if logged else ()
    peaks = {f"{kind}_gib": max(line[f"{kind}_memory_gib"] for line in logged) for kind in kinds}
    return _spread(whole, "s an epoch") | {
        **peaks,
        "first_step_s": round(first, 1),
        "samples/s": statistics.median(rates),
        "samples": samples,
        **{f"{name}_s": value for name, value in parts.items()},
    }


def time_ranks(cfg: CfgNode, repeats: int, ranks: int) -> Row:
    """`time_run` on several cards, each with the config's batch."""
    batch = ("SOLVER.IMS_PER_BATCH", str(ranks * cfg.SOLVER.IMS_PER_BATCH))
    return time_run(cfg, repeats, _by_ranks(ranks), batch) | {"ranks": ranks}


def time_steps_of_ranks(cfg: CfgNode, repeats: int, ranks: int) -> Row:
    """`time_steps` on several cards, each with the config's batch."""
    with tempfile.TemporaryDirectory() as folder:
        config, result = Path(folder) / "config.yml", Path(folder) / "row.json"
        config.write_text(cfg.dump())
        options = ["--config_file", str(config), "--repeats", str(repeats), "--row", "step", "--json", str(result)]
        command = [*_by_ranks(ranks), "-m", "tools.benchmark", *options]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            raise UserError(f"the ranks failed:\n{process.stderr.strip()[-1500:]}")
        return json.loads(result.read_text()) | {"ranks": ranks}


def _by_ranks(ranks: int) -> list[str]:
    """The command that starts something in that many processes."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]


def profile_step(cfg: CfgNode, lines: int = 40) -> str:
    """The kernels of a step by the time that they take on the device, in milliseconds."""
    bench = StepBench(cfg)
    batch = bench.batch()
    for i in range(5):
        bench.step(batch, 1, i)
    bench.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for i in range(5):
            bench.step(batch, 1, i)
        bench.synchronize()
    kernels = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in kernels) / 5000
    rows = [f"{e.self_device_time_total / 5000:8.3f} ms {e.count / 5:6.1f}x  {e.key[:110]}" for e in kernels[:lines]]
    return "\n".join([f"{total:8.3f} ms on the device in all", *rows])


FUSION = ("MODEL.HDM", "True", "MODEL.ATM", "True", "MODEL.GLOBAL_LOCAL", "True")
ROWS: dict[str, tuple[Callable[..., Row], tuple[str, ...]]] = {
    "step": (time_steps, ()),
    "step, no SDTPS": (time_steps, ("MODEL.USE_SDTPS", "False")),
    "step, SDTPS_AFTER_BLOCK 6": (time_steps, ("MODEL.SDTPS_AFTER_BLOCK", "6")),
    "step, SDTPS_POOL attention": (time_steps, ("MODEL.SDTPS_POOL", "attention")),
    "step, SDTPS_AUX_HEAD": (time_steps, ("MODEL.SDTPS_AUX_HEAD", "True")),
    "step, SDTPS_SCORE_GRAD none": (time_steps, ("MODEL.SDTPS_SCORE_GRAD", "none")),
    "step, GRAD_CHECKPOINT": (time_steps, ("SOLVER.GRAD_CHECKPOINT", "True")),
    "step, HDM and ATMoE": (time_steps, FUSION),
    "step, CUDA_GRAPH off": (time_steps, ("SOLVER.CUDA_GRAPH", "False")),
    "step, COMPILE on": (time_steps, ("SOLVER.COMPILE", "on")),
    "step, FUSED_BLOCKS off": (time_steps, ("SOLVER.FUSED_BLOCKS", "False")),
    "step, as written": (time_steps, AS_WRITTEN),
    "kernels": (check_kernels, ()),
    "parity": (compare_losses, ("SOLVER.BACKBONE_LR", "1e-4", "SOLVER.WARMUP_ITERS", "0")),
    "evaluation": (time_evaluation, ("DATALOADER.CACHE", "memory")),
    "gallery": (rank_gallery, ()),
    "run": (time_run, ()),
    "ranks": (time_ranks, ()),
    "ranks, step": (time_steps_of_ranks, ()),
}
"""Name -> what measures it, and how its config differs."""


def main(args: argparse.Namespace) -> None:
    setup_logging(level=logging.WARNING)
    if args.profile:
        log.warning("%s", profile_step(load_cfg(args.config_file, [*RANDOM_WEIGHTS, *args.opts])))
        return
    if args.row:  # the process of one row
        measure, opts = ROWS[args.row]
        cfg = load_cfg(args.config_file, [*RANDOM_WEIGHTS, *opts, *args.opts])
        if is_launched():
            join_ranks(_device(cfg), cfg.SOLVER.RANK_TIMEOUT)
        extra = {"ranks": args.ranks} if args.row.startswith("ranks") else {}
        found = measure(cfg, args.repeats, **extra)
        if is_main():
            save_text(json.dumps(found), Path(args.json))
        return
    names = args.rows or [name for name in ROWS if not name.startswith("ranks") or args.ranks > 1]
    if unknown := [name for name in names if name not in ROWS]:
        raise UserError(f"--rows: there is no {unknown[0]!r}; there are {', '.join(map(repr, ROWS))}.")
    report = {"machine": machine(), "config": args.config_file, "opts": args.opts, "rows": {}}
    for name in names:
        report["rows"][name] = _in_own_process(name, args)
        log.warning("%s", table({name: report["rows"][name]}))
    if args.json:
        save_text(json.dumps(report, indent=2) + "\n", Path(args.json))
    log.warning("\n%s\n%s", json.dumps(report["machine"]), table(report["rows"]))


def _in_own_process(name: str, args: argparse.Namespace) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "row.json"
        options = ["--config_file", args.config_file, "--repeats", str(args.repeats), "--ranks", str(args.ranks)]
        command = [sys.executable, "-m", "tools.benchmark", *options, "--row", name, "--json", str(result), *args.opts]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            return {"failed": (process.stderr or process.stdout).strip()[-600:]}
        return json.loads(result.read_text())


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "device": ", ".join(cards) or platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": code_version(),
    }


def table(rows: dict[str, Row]) -> str:
    """One line a row: median, spread, peak memory, and what else was found."""
    lines = []
    for name, row in rows.items():
        if "failed" in row:
            lines.append(f"{name:28} failed: {row['failed']}")
            continue
        spread = f"[{row['min']:.4g} to {row['max']:.4g}]" if "min" in row else ""
        memory = f"{row['peak_gib']:.2f} GiB" if "peak_gib" in row else ""
        known = ("value", "unit", "min", "max", "peak_gib")
        rest = ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k not in known
        )
        lines.append(f"{name:28} {row['value']:8.4g} {row['unit']:10} {spread:22} {memory:10} {rest}")
    return "\n".join(lines)


def _spread(values: list[float], unit: str) -> Row:
    return {"value": statistics.median(values), "unit": unit, "min": min(values), "max": max(values)}


def _peak(device: torch.device) -> Row:
    if device.type != "cuda":
        return {}
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return {"peak_gib": allocated / GIB, "reserved_gib": reserved / GIB}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_file", default="configs/sample/vit_b_finetune.yml", metavar="FILE")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=f"some of: {', '.join(map(repr, ROWS))}")
    parser.add_argument("--repeats", type=int, default=7, help="rounds, of which the median is told; epochs of a run")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count(), help="processes of the rows `ranks`")
    parser.add_argument("--json", default="", metavar="FILE", help="write everything there")
    parser.add_argument("--profile", action="store_true", help="the kernels of a step, nothing else")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="override keys of the config")
    arguments = parser.parse_intermixed_args()
    sys.exit(launch(lambda: main(arguments), arguments.debug))
