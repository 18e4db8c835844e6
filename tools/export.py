"""Writes a run's model as one file that needs none of this code: torch.export (.pt2) or ONNX (.onnx).

Inputs are RGB, NI and TI, each uint8 (B, 3, H, W) of the run's own size, and present, bool (B, 3): which of the three
each sample has. Normalisation is inside; resizing is not (bilinear, as in evaluation). The output, `features`, is
(B, D) float32 of the branch asked for, of length 1 under TEST.FEAT_NORM. B is free. All images take the mean camera
embedding.

What was written is loaded again and compared with the model on random images, one modality missing here and there: for
.onnx by onnxruntime. Its size and its time for one sample on the CPU are printed. ONNX needs requirements-export.txt.
"""

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.device_transforms import DeviceNormalize
from engine import Embedder, load_model
from utils.cli import run
from utils.errors import UserError
from utils.logging import setup_logging
from utils.modalities import MODALITIES

log = logging.getLogger("tools.export")

EXAMPLES = """examples:
  python -m tools.export runs/sample/DeMo_SDTPS --out model.onnx
  python -m tools.export runs/sample/DeMo_SDTPS --out model.pt2 --branch sdtps
"""

INPUTS = (*MODALITIES, "present")
TOLERANCE = 1e-4
"""Largest relative error of a feature against the model in PyTorch."""
OPSET = 18


class ImagesToFeatures(nn.Module):
    """Pixels of the three modalities and what is present -> features."""

    def __init__(self, embedder: Embedder, branch: str):
        super().__init__()
        self.model, self.branch = embedder.model, branch
        self.unit_length = embedder.cfg.TEST.FEAT_NORM
        self.normalize = DeviceNormalize(embedder.transform.mean, embedder.transform.std)

    def forward(self, RGB: Tensor, NI: Tensor, TI: Tensor, present: Tensor) -> Tensor:
        """Images uint8 (B, 3, H, W), present bool (B, 3) -> (B, D) float32."""
        images = {m: self.normalize.as_written(x) for m, x in zip(MODALITIES, (RGB, NI, TI), strict=True)}
        feature = self.model(images, None, present).features[self.branch]
        return F.normalize(feature, dim=-1) if self.unit_length else feature


@dataclass
class Exported:
    """What came of an export: largest relative error, bytes, and seconds for one sample on the CPU."""

    error: float
    size: int
    latency: float


def export(run_dir: Path, out: Path, branch: str | None = None) -> Exported:
    """Writes and checks the file.

    Raises:
        UserError: the suffix is neither .pt2 nor .onnx, what the latter needs is not installed, or what was written
            does not compute the same.
    """
    write = {".pt2": _write_pt2, ".onnx": _write_onnx}.get(out.suffix)
    if write is None:
        raise UserError(f"{out}: the name must end in .pt2 or .onnx.")
    if out.suffix == ".onnx":
        _import_onnxruntime()
    embedder = load_model(run_dir, device="cpu")
    branch = embedder.branches[-1] if branch is None else branch
    if branch not in embedder.branches:
        raise UserError(f"--branch: there is no {branch!r}; this model has {', '.join(embedder.branches)}.")
    model = ImagesToFeatures(embedder, branch).eval()
    out.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        program = torch.export.export(model, _example(embedder, 2), dynamic_shapes=_dynamic_shapes())
        call = write(program, out)
        error = max(_relative_error(call, model, _example(embedder, size)) for size in (1, 3, 4))
    if not error <= TOLERANCE:
        raise UserError(
            f"{out}: features differ from the model's by {error:.1e}, more than {TOLERANCE:.0e}: not to be used."
        )
    result = Exported(error, _size(out), _latency(call, _example(embedder, 1)))
    log.info(
        "%s: branch %s, %.1f MB, relative error %.1e, %.0f ms a sample on the CPU (%d threads)",
        out, branch, result.size / 1e6, error, 1000 * result.latency, torch.get_num_threads(),
    )  # fmt: skip
    return result


def _dynamic_shapes() -> tuple[dict, ...]:
    batch = torch.export.Dim("batch", min=1, max=4096)
    return tuple({0: batch} for _ in INPUTS)


def _example(embedder: Embedder, size: int) -> tuple[Tensor, ...]:
    """Random images; the first sample has all modalities, the others lack one each."""
    generator = torch.Generator().manual_seed(size)
    shape = (size, 3, *embedder.transform.size)
    images = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in MODALITIES]
    present = torch.ones(size, len(MODALITIES), dtype=torch.bool)
    for i in range(1, size):
        present[i, i % len(MODALITIES)] = False
    return (*images, present)


def _write_pt2(program: torch.export.ExportedProgram, out: Path) -> Callable[..., Tensor]:
    torch.export.save(program, out)
    return torch.export.load(out).module()


def _write_onnx(program: torch.export.ExportedProgram, out: Path) -> Callable[..., Tensor]:
    runtime = _import_onnxruntime()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own innards
        written = torch.onnx.export(
            program,
            dynamo=True,
            input_names=INPUTS,
            output_names=["features"],
            opset_version=OPSET,
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
            verbose=False,
        )
    written.save(out)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(out, options, providers=["CPUExecutionProvider"])

    def call(*inputs: Tensor) -> Tensor:
        values = dict(zip(INPUTS, (x.numpy() for x in inputs), strict=True))
        return torch.from_numpy(session.run(["features"], values)[0])

    return call


def _stable_sort(x: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """torch.sort in ONNX, whose TopK puts the lower index first where values are equal."""
    from onnxscript import opset18 as op

    length = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
    return op.TopK(x, length, axis=dim, largest=int(descending), sorted=1)


def _import_onnxruntime() -> ModuleType:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install -r requirements-export.txt") from None
    return onnxruntime


def _relative_error(call: Callable[..., Tensor], model: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """Largest |a - b| / |b| over the samples, by length of the features."""
    found, expected = call(*inputs), model(*inputs)
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


def _latency(call: Callable[..., Tensor], inputs: tuple[Tensor, ...], repeats: int = 5) -> float:
    """Seconds of the fastest of some calls."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call(*inputs)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _size(out: Path) -> int:
    """Bytes of the file, and of the weights beside it where the format keeps them apart."""
    return sum(path.stat().st_size for path in (out, out.with_name(f"{out.name}.data")) if path.exists())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a run, or one of its checkpoints")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".onnx or .pt2")
    parser.add_argument("--branch", help="ori, moe, sdtps or both; default both, or the only one")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    setup_logging()
    sys.exit(run(lambda: export(args.run_dir, args.out, args.branch), args.debug))
