"""Which device runs the model, and in which precision."""

import logging
import os
import shutil
import subprocess
import warnings

import torch

from utils.distributed import is_launched, local_rank, local_world_size, world_size
from utils.errors import UserError

log = logging.getLogger(__name__)


def select_device(name: str = "auto") -> torch.device:
    """The device that MODEL.DEVICE names; "auto" takes CUDA, then MPS, then the CPU. A rank has a card of its own.

    Raises:
        UserError: the device is not there, or the machine has an NVIDIA card that this build of torch cannot use. Such
            a card is never left silently for the CPU.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif card := _nvidia_card():
            raise UserError(
                f"This machine has an NVIDIA card ({card}), but torch {torch.__version__} cannot use it. Install a "
                "build of torch for your driver (pytorch.org, 'Get started'), or set MODEL.DEVICE cpu to go on "
                "without it."
            )
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if local_world_size() > 1 and (device.index is not None or name == "mps"):
        raise UserError(
            f"MODEL.DEVICE is {name!r}, one device for {local_world_size()} ranks. Set it to auto or cuda, and each "
            "takes a card of its own; CUDA_VISIBLE_DEVICES chooses among the cards."
        )
    if is_launched() and name == "cuda":
        device = torch.device("cuda", local_rank())
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                f"MODEL.DEVICE is {name!r}, but torch {torch.__version__} sees no CUDA device. Set MODEL.DEVICE auto "
                "or cpu, or install a build of torch for your driver."
            )
        if is_launched() and torch.cuda.device_count() < local_world_size():
            raise UserError(
                f"{local_world_size()} ranks on this machine, and {torch.cuda.device_count()} CUDA devices: start at "
                "most as many processes (torchrun --nproc_per_node) as there are cards, or set MODEL.DEVICE cpu."
            )
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise UserError(f"MODEL.DEVICE is {name!r}, but there are {torch.cuda.device_count()} CUDA devices.")
        try:
            if device.index is not None:
                torch.cuda.set_device(device)
            _try_memory(device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(
                f"torch {torch.__version__} cannot use {torch.cuda.get_device_name(device)}: {error}. Install a build "
                "that supports this card, or set MODEL.DEVICE cpu to go on without it."
            ) from error
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("MODEL.DEVICE is 'mps', but torch sees no Apple GPU. Set MODEL.DEVICE auto or cpu.")
    return device


EXTENDABLE = "expandable_segments:True"
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Variables of torch's allocator. The first is read by every version, though some, such as 2.9.1, call it deprecated:
that one reads no other for this (pytorch#183387)."""
_REGISTER = "NCCL_GRAPH_REGISTER"


def prepare_cuda() -> None:
    """Sets CUDA's libraries up for the whole process, wherever the environment does not say otherwise; to be called
    before CUDA is used.

    - cuBLAS does without a workspace, which it would have cleared before each product that wants one: a step is 0.8 %
      faster (one H100, torch 2.11).
    - torch's allocator extends its blocks in place of adding new ones, so that a run keeps two thirds of the memory. Of
      several ranks NCCL must then not register what it sends while a step is recorded: over such blocks it would hang
      (pytorch#158029). Where it is told to, the blocks stay as they are.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    warnings.filterwarnings("ignore", "Requested unified CUBLASLT workspace")  # it then does without one as well
    several = is_launched() and int(os.environ["WORLD_SIZE"]) > 1
    registers = several and os.environ.get(_REGISTER, "0") != "0"
    if not registers and not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = EXTENDABLE
    if several and any(EXTENDABLE in os.environ.get(name, "").replace(" ", "") for name in _ALLOCATOR):
        os.environ.setdefault(_REGISTER, "0")


TRIED = 2**24
"""Values, 64 MiB: large tensors lie in blocks of another kind than small ones."""


def _try_memory(device: torch.device) -> None:
    """Uses some memory of a card. Where blocks that extend fail, as with some drivers of WSL2 and on Jetson, the
    allocator does without from then on.

    Raises:
        RuntimeError: the card cannot be used; torch.OutOfMemoryError: it is full.
    """

    def use() -> None:
        torch.zeros(TRIED, device=device).add_(1).sum().item()

    try:
        use()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if os.environ.get(_ALLOCATOR[0]) != EXTENDABLE:
            raise
        told = str(error).strip().splitlines() or [""]
        log.warning("blocks of memory cannot be extended, so a run keeps more of the card: %s", told[0])
        os.environ[_ALLOCATOR[0]] = without = "expandable_segments:False"
        since_2_10 = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
        (since_2_10 or torch.cuda.memory._set_allocator_settings)(without)
        use()


def _nvidia_card() -> str | None:
    """Name of an NVIDIA card as its driver reports it, whether or not torch can use it."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        report = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = report.stdout.strip().splitlines()
    return lines[0] if report.returncode == 0 and lines else None


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """Type of mixed precision for SOLVER.AMP, None for plain float32.

    "auto" means bf16 on CUDA from Ampere on, fp16 (with a gradient scaler) on older CUDA, float32 elsewhere.

    Raises:
        UserError: fp16 was asked for on a device that has no gradient scaler.
    """
    if amp == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if amp == "fp16" and device.type != "cuda":
        raise UserError(
            f"SOLVER.AMP is 'fp16', which needs a CUDA device; this run uses {device.type}. Set it to auto."
        )
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": None}[amp]


def describe(device: torch.device, dtype: torch.dtype | None) -> str:
    """One line for the log: device, precision, version."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    precision = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    ranks = f"{world_size()} ranks, each on " if world_size() > 1 else ""
    return f"{ranks}{device.type} ({card}), {precision}, torch {torch.__version__}"
