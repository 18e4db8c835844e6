"""Takes the backbone out of a run's checkpoint: a file of weights that MODEL.PRETRAIN_PATH_T of another run can name.

python -m tools.extract_backbone runs/pretrain/last.pth weights/vit.safetensors --half
"""

import argparse
import logging
import sys
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file

from modeling.backbone import patch_grid
from modeling.pretrained import GRID
from utils.checkpoint import read_file, state_dict_in
from utils.cli import run
from utils.errors import UserError
from utils.logging import setup_logging

log = logging.getLogger("tools.extract_backbone")

PREFIX = "backbone."
NOT_TAKEN = ("backbone.cam_embed",)
"""Belongs to the cameras of one data set."""


def extract(checkpoint: Path, out: Path, half: bool = False) -> int:
    """Writes the backbone's tensors, named as in the model, as .safetensors; returns the number of parameters.

    Raises:
        UserError: the checkpoint cannot be read or holds no backbone of this project, or `out` cannot be written.
    """
    stored = read_file(checkpoint)
    state = state_dict_in(stored, checkpoint)
    tensors = {n: t for n, t in state.items() if n.startswith(PREFIX) and n not in NOT_TAKEN}
    if not tensors:
        raise UserError(f"{checkpoint} holds no tensors named {PREFIX}*: give a checkpoint that train_net.py wrote.")
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: the name must end in .safetensors.")
    dtype = torch.float16 if half else torch.float32
    tensors = {n.removeprefix(PREFIX): t.to(dtype).contiguous() for n, t in tensors.items()}
    tensors[GRID] = torch.tensor(_stored_grid(stored, tensors, checkpoint))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot be written: {error}.") from error
    count = sum(t.numel() for n, t in tensors.items() if n != GRID)
    log.info("%s: %d parameters, %.1f MB", out, count, out.stat().st_size / 1e6)
    return count


def _stored_grid(stored: dict, tensors: dict[str, torch.Tensor], checkpoint: Path) -> tuple[int, int]:
    """Rows and columns of the patches in the images that the run was trained on."""
    if "config" not in stored:
        raise UserError(f"{checkpoint} does not say what it was trained on: give a checkpoint that train_net.py wrote.")
    cfg = yaml.safe_load(stored["config"])
    height, width = tensors["vit.patch_embed.proj.weight"].shape[2:]
    return patch_grid(tuple(cfg["INPUT"]["SIZE_TRAIN"]), (height, width), tuple(cfg["MODEL"]["STRIDE_SIZE"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--half", action="store_true", help="store float16: half the size, enough to finetune from")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    setup_logging()
    sys.exit(run(lambda: extract(args.checkpoint, args.out, args.half), args.debug))
