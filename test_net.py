"""Evaluates a checkpoint: mAP and Rank-1, 5, 10 of every branch; see --help."""

import logging
import sys

from utils.cli import parse_args, tell_interrupts

if __name__ == "__main__":
    tell_interrupts()  # before what is slow to load

from configs import load_cfg, print_config
from data import make_dataloader
from engine import do_inference
from engine.checkpoint import config_changes, stored_config
from engine.device import prepare_cuda, select_device
from engine.launch import join_ranks, launch
from modeling.trained import load_trained
from utils.checkpoint import read_file
from utils.errors import UserError
from utils.logging import setup_logging
from utils.seed import seed_everything

log = logging.getLogger(__name__)

EXAMPLES = """examples:
  python test_net.py --config_file configs/RGBNT201/DeMo_SDTPS.yml TEST.WEIGHT runs/RGBNT201/DeMo_SDTPS/DeMobest.pth
  python test_net.py --config_file configs/RGBNT201/DeMo_SDTPS.yml TEST.WEIGHT … TEST.MISS all
  python test_net.py --config_file configs/RGBNT201/DeMo_SDTPS.yml --print_config
"""


def main(config_file: str, opts: list[str]) -> None:
    setup_logging()
    cfg = load_cfg(config_file, opts)
    if not cfg.TEST.WEIGHT:
        raise UserError("TEST.WEIGHT is empty: add TEST.WEIGHT <checkpoint> to the command, see --help.")
    prepare_cuda()
    device = select_device(cfg.MODEL.DEVICE)
    join_ranks(device, cfg.SOLVER.RANK_TIMEOUT)
    seed_everything(cfg.SOLVER.SEED, deterministic=cfg.SOLVER.DETERMINISTIC)
    data = make_dataloader(cfg, train=False)
    stored = read_file(cfg.TEST.WEIGHT)
    if "config" in stored:
        changes = config_changes(stored_config(stored, cfg.TEST.WEIGHT), cfg, ("MODEL.", "INPUT.", "DATASETS.NAMES"))
        log.info(changes or "the config is the one that the checkpoint was trained with")
    model = load_trained(cfg, stored, cfg.TEST.WEIGHT, cameras=int(data.val.camids.max()) + 1)
    setup_logging(cfg.OUTPUT_DIR)
    do_inference(cfg, model.to(device), data)


if __name__ == "__main__":
    args = parse_args(__doc__, EXAMPLES)
    action = print_config if args.print_config else main
    sys.exit(launch(lambda: action(args.config_file, args.opts), args.debug))
