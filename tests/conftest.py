"""Small data sets and configs that several tests share."""

import logging
import os
import signal
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: kernels run on the CPU

import numpy as np
import pytest
import torch
from PIL import Image

from configs import load_cfg
from utils.logging import OWN_LOGGERS
from utils.modalities import MODALITIES


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Two test processes on two cores: more threads would only get in each other's way."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _interruptible():
    """A shell's background jobs ignore Ctrl-C, and so would the programs that tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _restore_logging():
    """The scripts set up logging for the whole process; the next test finds it as it was."""
    root = logging.getLogger()
    before = root.level, list(root.handlers), {name: logging.getLogger(name).level for name in OWN_LOGGERS}
    yield
    for handler in [h for h in root.handlers if h not in before[1]]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(before[0])
    logging.captureWarnings(False)
    for name, level in before[2].items():
        logging.getLogger(name).setLevel(level)


def write_rgbnt201(root: Path, identities: int = 6, frames: int = 4, test_identities: int = 3, seed: int = 0) -> Path:
    """Writes small images in RGBNT201's layout: every identity has its own colours, every image its own noise."""
    rng = np.random.default_rng(seed)
    for split, first, count in (("train_171", 0, identities), ("test", 500, test_identities)):
        for pid in range(first, first + count):
            colours = rng.integers(40, 215, size=(len(MODALITIES), 4, 1, 3))  # four bands a modality
            for frame in range(frames):
                camera = frame % 2 + 1
                for modality, bands in zip(MODALITIES, colours, strict=True):
                    pixels = np.repeat(np.repeat(bands, 16, axis=0), 32, axis=1) + rng.normal(0, 12, (64, 32, 3))
                    path = root / "RGBNT201" / split / modality / f"{pid:06d}_cam{camera}_1_{frame:02d}.jpg"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=95)
    return root


TINY = """
MODEL:
  TRANSFORMER_TYPE: vit_tiny_patch16_224
  DEPTH: 2
  PRETRAINED: False
  DEVICE: cpu
  USE_SDTPS: True
  GLOBAL_LOCAL: True
  ID_LOSS_WEIGHT: 0.25
INPUT: {SIZE_TRAIN: [64, 32], SIZE_TEST: [64, 32], PADDING: 2}
DATALOADER: {NUM_WORKERS: 0, NUM_INSTANCE: 2}
SOLVER:
  IMS_PER_BATCH: 8
  MAX_EPOCHS: 2
  WARMUP_ITERS: 1
  BASE_LR: 1.0e-3
  BACKBONE_LR: 1.0e-3
  LOG_PERIOD: 2
TEST: {IMS_PER_BATCH: 8}
"""


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory) -> Path:
    """Root of a data set of 6 + 3 identities with 4 triples each, 64 x 32 pixels."""
    return write_rgbnt201(tmp_path_factory.mktemp("data"))


@pytest.fixture
def tiny_yaml(tmp_path, tiny_dataset) -> Path:
    """A config file for that data set: a ViT-Tiny of two blocks, random weights, 2 epochs of 3 steps."""
    path = tmp_path / "tiny.yml"
    path.write_text(f"{TINY}DATASETS: {{NAMES: RGBNT201, ROOT_DIR: {tiny_dataset}}}\nOUTPUT_DIR: {tmp_path / 'run'}\n")
    return path


@pytest.fixture
def tiny_cfg(tiny_yaml):
    """`tiny_cfg(KEY, VALUE, …)` -> the tiny config with those keys changed."""
    return lambda *opts: load_cfg(tiny_yaml, opts)
