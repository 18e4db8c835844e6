"""Trains a model from one YAML, or goes on from a checkpoint: see --help."""

import sys

from utils.cli import parse_args, tell_interrupts

if __name__ == "__main__":
    tell_interrupts()  # before what is slow to load

from configs import load_cfg, print_config, warn
from data import make_dataloader
from engine import do_train
from engine.checkpoint import read_start
from engine.device import prepare_cuda, select_device
from engine.launch import join_ranks, launch
from engine.output import check_output_dir
from modeling import make_model
from solver import create_scheduler, make_loss, make_optimizer
from utils.logging import setup_logging
from utils.seed import seed_everything

EXAMPLES = """examples:
  python train_net.py --config_file configs/RGBNT201/DeMo_SDTPS.yml
  python train_net.py --config_file configs/RGBNT201/DeMo_SDTPS.yml MODEL.SDTPS_SPARSE_RATIO 0.7 OUTPUT_DIR runs/r07
  python train_net.py --config_file configs/RGBNT201/DeMo_SDTPS.yml TEST.WEIGHT runs/RGBNT201/DeMo_SDTPS/last.pth
  torchrun --nproc_per_node 2 train_net.py --config_file configs/RGBNT201/DeMo_SDTPS.yml
  python train_net.py --config_file configs/RGBNT201/DeMo_SDTPS.yml --print_config
"""


def main(config_file: str, opts: list[str]) -> None:
    setup_logging()
    cfg = load_cfg(config_file, opts)
    warn(cfg)
    prepare_cuda()
    device = select_device(cfg.MODEL.DEVICE)
    join_ranks(device, cfg.SOLVER.RANK_TIMEOUT)
    start = read_start(cfg.TEST.WEIGHT)
    check_output_dir(cfg, start.path if start else None)
    seed_everything(cfg.SOLVER.SEED, deterministic=cfg.SOLVER.DETERMINISTIC)
    data = make_dataloader(cfg)
    pretrained = start is None or "backbone" in cfg.SOLVER.REINIT
    model = make_model(cfg, num_classes=data.num_classes, num_cameras=data.num_cameras, pretrained=pretrained)
    model.to(device)
    loss_fn = make_loss(cfg, data.num_classes)
    optimizer = make_optimizer(cfg, model)
    do_train(cfg, model, data, loss_fn, optimizer, create_scheduler(cfg, optimizer), start)


if __name__ == "__main__":
    args = parse_args(__doc__, EXAMPLES)
    action = print_config if args.print_config else main
    sys.exit(launch(lambda: action(args.config_file, args.opts), args.debug))
