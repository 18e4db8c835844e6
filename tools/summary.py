"""What a config costs before a GPU is asked for: parameters, tokens, FLOPs, training memory, checkpoint size.

No weights, no images and no GPU are needed: a training step runs on tensors that have shapes and no content, in a few
seconds. The memory is what the step allocates on the device at most, uncompiled, with batches as the config says; the
system and the CUDA context take some hundred MiB beside it.
"""

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from yacs.config import CfgNode

from configs import load_cfg, print_config
from data.datasets import LAYOUTS
from data.make_dataloader import load_splits
from engine.monitor import PROBE_SAMPLES, probe_is_sparing
from modeling import ReIDModel, make_model
from solver import make_loss, make_optimizer
from utils.cli import parse_args, run
from utils.modalities import MODALITIES

EXAMPLES = """examples:
  python -m tools.summary --config_file configs/RGBNT201/DeMo_SDTPS.yml
  python -m tools.summary --config_file configs/RGBNT201/DeMo_SDTPS.yml SOLVER.GRAD_CHECKPOINT True
  python -m tools.summary --config_file configs/RGBNT201/DeMo_SDTPS_dinov3.yml SOLVER.IMS_PER_BATCH 128
"""

GIB = 2**30


@dataclass
class Summary:
    """Costs of a config.

    Attributes:
        parameters: part -> number of parameters; flops: part -> operations of one triple's forward pass, a multiply and
            an add being two.
        tokens: stage -> tokens of one modality.
        memory: what -> bytes on the device in training; `peak` is the sum that counts.
        checkpoint: bytes of last.pth.
        batch: triples that are on the device at once.
    """

    parameters: dict[str, int]
    flops: dict[str, int]
    tokens: dict[str, int]
    memory: dict[str, int]
    checkpoint: int
    batch: int


class LiveBytes(TorchDispatchMode):
    """Inside, counts the bytes of the tensors that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out


@contextmanager
def mixed_precision(enabled: bool) -> Iterator[None]:
    """bf16 as on CUDA, where layer norms compute in float32, for tensors on the CPU."""
    original = F.layer_norm

    def in_float32(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return original(x.float(), *args, **kwargs)

    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled),
        patch.object(F, "layer_norm", in_float32 if enabled else original),
    ):
        yield


def summarise(cfg: CfgNode) -> Summary:
    """The costs of a config; the identities and cameras are those of the published data set, or of the manifest.

    Raises:
        UserError: the config's model cannot be built, or its manifest cannot be read.
    """
    with shapes_only(cfg) as (model, classes):
        flops = count_flops(cfg, model)
        memory, batch = training_memory(cfg, model, classes)
    copies = 2 if cfg.SOLVER.EMA_DECAY > 0 else 1
    return Summary(
        parameters=count_parameters(model),
        flops=flops,
        tokens=count_tokens(model),
        memory=memory,
        checkpoint=copies * _nbytes(model) + memory["optimizer"],
        batch=batch,
    )


@contextmanager
def shapes_only(cfg: CfgNode) -> Iterator[tuple[ReIDModel, int]]:
    """The config's model and its identities; inside, tensors have shapes and no content, and take no memory."""
    classes, cameras = data_sizes(cfg)
    with torch.device("meta"):
        model = make_model(cfg, num_classes=classes, num_cameras=cameras, pretrained=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield model.to_empty(device="cpu"), classes


def data_sizes(cfg: CfgNode) -> tuple[int, int]:
    """Training identities and cameras of the config's data set."""
    if cfg.DATASETS.NAMES in LAYOUTS:
        identities, _, cameras = LAYOUTS[cfg.DATASETS.NAMES].published[0]
        return identities, cameras
    splits = load_splits(cfg)
    return len(splits.identities), splits.num_cameras


def count_parameters(model: ReIDModel) -> dict[str, int]:
    """Part -> parameters; the parts are the model's own, the camera embedding apart from the backbone."""
    counts = {"backbone": 0}
    for name, parameter in model.named_parameters():
        part = "camera embedding" if name == "backbone.cam_embed" else name.partition(".")[0]
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def count_tokens(model: ReIDModel) -> dict[str, int]:
    """Stage -> tokens of one modality."""
    backbone, sdtps = model.backbone, model.sdtps
    prefix = backbone.vit.num_prefix_tokens
    tokens = {"in the backbone": prefix + backbone.num_patches}
    if sdtps is None:
        return tokens | {"patches": backbone.num_patches}
    extra = sdtps.num_kept < sdtps.num_patches  # the dropped ones, fused
    if backbone.split_after:
        tokens[f"behind its block {backbone.split_after}"] = prefix + extra + sdtps.num_kept
    tokens["patches"] = backbone.num_patches
    return tokens | {"kept by SDTPS": sdtps.num_kept, "out of SDTPS": sdtps.num_aggregated + extra}


def count_flops(cfg: CfgNode, model: ReIDModel) -> dict[str, int]:
    """Part -> FLOPs of one triple's forward pass."""
    model.eval()
    images = _images(cfg, 1)
    encoded = model.encode(images)
    finished, choice = model.finish_backbone(encoded)
    first, second = _flops(lambda: model.encode(images)), _flops(lambda: model.finish_backbone(encoded))
    parts = {"backbone": first + second}
    if (fusion := model.fusion) is not None:
        patches, globals_ = (dict(zip(MODALITIES, x, strict=True)) for x in (finished.patches, finished.class_tokens))
        parts["fusion"] = _flops(lambda: fusion(patches, globals_))
    if (sdtps := model.sdtps) is not None:
        parts["sdtps"] = _flops(lambda: sdtps.select(encoded.patches, encoded.class_tokens))
        if choice is not None:  # inside the backbone, but no part of it
            parts["backbone"] -= _flops(lambda: sdtps.decide(encoded.patches, encoded.class_tokens))
    rest = first + _flops(lambda: model.decode(encoded)) - sum(parts.values())
    return parts | {"pooling and heads": rest}


def _flops(call: Callable[[], object]) -> int:
    # The attention that torch has for some CPUs is not counted; as products it is, on all of them.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def training_memory(cfg: CfgNode, model: ReIDModel, classes: int) -> tuple[dict[str, int], int]:
    """Bytes of a training step, and its micro-batch: the second step, when the optimizer has its state, and before it
    an epoch's probe."""
    s = cfg.SOLVER
    batch, half = s.IMS_PER_BATCH // s.ACCUMULATION, s.AMP != "float32"
    optimizer, loss_fn = make_optimizer(cfg, model), make_loss(cfg, classes)
    live, probe = LiveBytes(), 0
    with live:
        for tensor in [*model.parameters(), *model.buffers()]:
            live.add(tensor)
        if s.EMA_DECAY > 0:
            average = [torch.empty_like(p) for p in [*model.parameters(), *model.buffers()]]  # noqa: F841
        images, pid = _images(cfg, batch), torch.zeros(batch, dtype=torch.long)
        model.train()
        epoch = 2 * cfg.MODEL.SDTPS_WARMUP_EPOCHS + 1  # when every branch trains
        for step in range(2):
            if step == 1 and model.sdtps is not None and not model.frozen:
                live.peak = live.now
                some = {m: x[:PROBE_SAMPLES] for m, x in images.items()}
                fp16 = s.AMP == "fp16"  # the probe is in float32 then
                sparing = probe_is_sparing(batch, torch.float16 if fp16 else None)
                _probe(model, loss_fn, some, pid[:PROBE_SAMPLES], half and not fp16, sparing)
                probe, live.peak = live.peak, live.now
            with mixed_precision(half):
                loss, _ = loss_fn(model(images, pid), pid, epoch)
                loss.backward()  # inside: checkpointing runs the forward pass again
            del loss
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    peak = max(live.peak, probe)
    state = sum(_size(t) for moments in optimizer.state.values() for t in moments.values() if isinstance(t, Tensor))
    trained = sum(_size(p) for p in model.parameters() if p.requires_grad)
    known = {"weights": _nbytes(model) * (2 if s.EMA_DECAY > 0 else 1), "optimizer": state, "gradients": trained}
    return known | {"activations": max(0, peak - sum(known.values())), "peak": peak}, batch


def _probe(
    model: ReIDModel, loss_fn: Callable, images: dict[str, Tensor], pid: Tensor, half: bool, sparing: bool
) -> None:
    """As `engine.monitor.score_gradient_probe`: gradients of the backbone twice, in evaluation mode."""
    parameters = [p for p in model.backbone.parameters() if p.requires_grad]
    checkpointed = model.backbone.grad_checkpointing
    model.eval()
    model.backbone.set_grad_checkpointing(checkpointed or sparing)
    with mixed_precision(half):
        encoded = model.encode(images, pid)
    kept: list[tuple[Tensor, ...]] = []
    for _ in range(2):
        with mixed_precision(half):
            output = model.decode(encoded)
            output.logits = {"sdtps": output.logits["sdtps"]}
            loss, _ = loss_fn(output, pid, 10**6)
            kept.append(torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=not kept))
    model.backbone.set_grad_checkpointing(checkpointed)
    model.train()


def _images(cfg: CfgNode, batch: int) -> dict[str, Tensor]:
    return {m: torch.empty(batch, 3, *cfg.INPUT.SIZE_TRAIN) for m in MODALITIES}


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


COMPILED = 0.57
"""Share of activations that fused or compiled blocks keep; on an H200, ViT-B/16 took 6.9 GiB in place of 11.1."""


def _nbytes(model: nn.Module) -> int:
    return sum(_size(tensor) for tensor in [*model.parameters(), *model.buffers()])


def to_text(cfg: CfgNode, summary: Summary) -> str:
    """The summary as a table for people."""
    rows: list[tuple[str, str]] = []

    def section(title: str, values: dict[str, int], form: Callable[[int], str], total: str = "") -> None:
        rows.append(("", ""))
        rows.append((title, form(sum(values.values())) if total else ""))
        rows.extend((f"  {name}", form(value)) for name, value in values.items())

    height, width = cfg.INPUT.SIZE_TRAIN
    rows.append((f"{cfg.MODEL.TRANSFORMER_TYPE}, images of {height} x {width}, 3 modalities", ""))
    section("parameters", summary.parameters, lambda n: f"{n / 1e6:10.2f} M", "sum")
    section("FLOPs of a triple, forward", summary.flops, lambda n: f"{n / 1e9:10.2f} G", "sum")
    section("tokens a modality", summary.tokens, lambda n: f"{n:10d}")
    parts = {name: value for name, value in summary.memory.items() if name != "peak"}
    precision = "float32" if cfg.SOLVER.AMP == "float32" else "mixed precision"
    title = f"training memory, {summary.batch} triples at once, {precision}"
    section(title, parts, lambda n: f"{n / GIB:10.2f} GiB")
    rows.append(("  at most", f"{summary.memory['peak'] / GIB:10.2f} GiB"))
    if cfg.SOLVER.COMPILE != "off" and precision == "mixed precision" and not cfg.SOLVER.GRAD_CHECKPOINT:
        compiled = summary.memory["peak"] - (1 - COMPILED) * summary.memory["activations"]
        rows.append(("  blocks fused or compiled, as on CUDA by default, about", f"{compiled / GIB:10.2f} GiB"))
    rows += [("", ""), ("checkpoint (last.pth)", f"{summary.checkpoint / 1e6:10.0f} MB")]
    return "\n".join(f"{name:<58}{value}".rstrip() for name, value in rows)


def main(config_file: str, opts: list[str]) -> None:
    cfg = load_cfg(config_file, opts)
    print(to_text(cfg, summarise(cfg)))


if __name__ == "__main__":
    args = parse_args(__doc__, EXAMPLES)
    action = print_config if args.print_config else main
    sys.exit(run(lambda: action(args.config_file, args.opts), args.debug))
