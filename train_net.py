"""Trains a model from one YAML, or goes on from a checkpoint: see --help."""

import logging
import sys

from configs import load_cfg
from data import make_dataloader
from engine import do_train
from engine.checkpoint import read_start
from engine.device import select_device
from engine.interrupt import Interrupted
from engine.output import open_output_dir
from modeling import make_model
from solver import create_scheduler, make_loss, make_optimizer
from utils.cli import config_parser, run
from utils.logging import setup_logging
from utils.seed import seed_everything

EXAMPLES = """examples:
  python train_net.py --config_file configs/RGBNT201/DeMo_SDTPS.yml
  python train_net.py --config_file configs/RGBNT201/DeMo_SDTPS.yml MODEL.SDTPS_SPARSE_RATIO 0.7 OUTPUT_DIR runs/r07
  python train_net.py --config_file configs/RGBNT201/DeMo_SDTPS.yml TEST.WEIGHT runs/RGBNT201/DeMo_SDTPS/last.pth
"""


def main(config_file: str, opts: list[str]) -> None:
    setup_logging()
    cfg = load_cfg(config_file, opts)
    device = select_device(cfg.MODEL.DEVICE)
    start = read_start(cfg.TEST.WEIGHT)
    seed_everything(cfg.SOLVER.SEED, deterministic=cfg.SOLVER.DETERMINISTIC)
    data = make_dataloader(cfg)
    model = make_model(cfg, num_classes=data.num_classes, num_cameras=data.num_cameras, pretrained=start is None)
    model.to(device)
    loss_fn = make_loss(cfg, data.num_classes)
    optimizer = make_optimizer(cfg, model)
    scheduler = create_scheduler(cfg, optimizer)
    open_output_dir(cfg, start.path if start else None, start.epoch if start else 0)
    setup_logging(cfg.OUTPUT_DIR)
    do_train(cfg, model, data, loss_fn, optimizer, scheduler, start)


if __name__ == "__main__":
    args = config_parser(__doc__, EXAMPLES).parse_args()
    try:
        sys.exit(run(lambda: main(args.config_file, args.opts), args.debug))
    except Interrupted as interrupted:
        logging.getLogger(__name__).warning("%s", interrupted)
        sys.exit(128 + interrupted.signum)
