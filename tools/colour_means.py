"""What no learning at all gives: ranks the test images by the 8 x 8 colour means of their three pictures.

python -m tools.colour_means --config_file configs/sample/DeMo_SDTPS.yml
"""

import logging
import sys

import torch
import torch.nn.functional as F
from yacs.config import CfgNode

from configs import load_cfg, print_config
from data import make_dataloader
from engine.evaluator import format_table, rank
from utils.cli import parse_args, run
from utils.logging import setup_logging
from utils.modalities import MODALITIES

log = logging.getLogger("tools.colour_means")

GRID = 8


def colour_means(cfg: CfgNode) -> dict[str, float]:
    """mAP, R1, R5, R10 in percent of the 576 numbers that 8 x 8 means of three channels of three images make."""
    val = make_dataloader(cfg, train=False).val
    features = [
        torch.cat([F.adaptive_avg_pool2d(batch.images[m], GRID).flatten(1) for m in MODALITIES], dim=1) for batch in val
    ]
    return rank(cfg, torch.cat(features), val)


def main(config_file: str, opts: list[str]) -> None:
    setup_logging()
    cfg = load_cfg(config_file, opts)
    log.info("without a network\n%s", format_table({f"{GRID}x{GRID} colour means": colour_means(cfg)}, "features"))


if __name__ == "__main__":
    args = parse_args(__doc__)
    action = print_config if args.print_config else main
    sys.exit(run(lambda: action(args.config_file, args.opts), args.debug))
