"""Writes the features of a folder's images, with their identities, cameras and paths, into one file.

RUN_DIR is a folder that train_net.py wrote; its best checkpoint is taken. --data is a folder in the layout of RGBNT201,
RGBNT100 or MSVR310 (or the folder above it), a manifest (.csv), or a folder with images in RGB, NI and TI.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from data.datasets import Sample
from data.folders import load_folder
from data.workers import count_workers
from engine import load_model
from utils.cli import run
from utils.feature_file import FeatureFile, check_suffix
from utils.logging import setup_logging

log = logging.getLogger("tools.extract")

EXAMPLES = """examples:
  python -m tools.extract runs/sample/DeMo_SDTPS --data datasets/sample/RGBNT201 --out features.safetensors
  python -m tools.extract runs/RGBNT201/DeMo_SDTPS --data my/manifest.csv --split gallery --out gallery.npz
  python -m tools.extract runs/RGBNT201/DeMo_SDTPS --data my/images --branch ori --half --out images.safetensors
"""


def extract(
    run_dir: Path,
    data: Path,
    out: Path,
    *,
    splits: Sequence[str] = ("query", "gallery"),
    branch: str | None = None,
    half: bool = False,
    use_camera: bool = True,
    device: str = "auto",
    workers: int = -1,
) -> FeatureFile:
    """The features of the distinct samples of some splits, as written into `out`.

    Args:
        branch: None takes `both`, or the only one.
        half: store float16.
        use_camera: give the model each image's camera, if it knows them all.
        workers: processes that load images; -1 leaves a core free.

    Raises:
        UserError: what `load_model`, `load_folder`, `embed_samples` and `FeatureFile.save` raise.
    """
    check_suffix(out)
    found = load_folder(data, train="train" in splits)
    samples = list(dict.fromkeys(sample for split in splits for sample in getattr(found, split)))
    model = load_model(run_dir, device=device)
    if use_camera and not all(0 <= sample.camid < model.num_cameras for sample in samples):
        log.info("some cameras are unknown to the model: all images take its mean camera embedding")
        use_camera = False
    start = time.perf_counter()
    features = model.embed_samples(samples, branch=branch, use_camera=use_camera, workers=count_workers(workers))
    seconds = time.perf_counter() - start

    root = data.resolve() if data.is_dir() else data.resolve().parent
    info = {
        "root": str(root),
        "run": str(run_dir),
        "weights": model.digest(),
        "branch": branch or model.branches[-1],
        "normalised": str(model.cfg.TEST.FEAT_NORM),
        "camera": str(use_camera),
    }
    file = FeatureFile(
        features.half() if half else features,
        pids=torch.tensor([sample.pid for sample in samples]),
        camids=torch.tensor([sample.camid for sample in samples]),
        sceneids=torch.tensor([sample.sceneid for sample in samples]),
        paths=[_paths(sample, root) for sample in samples],
        info=info,
    )
    file.save(out)
    log.info(
        "%s: %d x %d of branch %s, %.1f MB (%.0f images/s)",
        out, *features.shape, info["branch"], out.stat().st_size / 1e6, len(samples) / seconds,
    )  # fmt: skip
    return file


def _paths(sample: Sample, root: Path) -> list[str]:
    return ["" if image is None else os.path.relpath(Path(image.path).resolve(), root) for image in sample.images]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a run, or one of its checkpoints")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER|CSV")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".safetensors or .npz")
    parser.add_argument(
        "--split", nargs="+", choices=("train", "query", "gallery"), default=["query", "gallery"], dest="splits",
        help="which images; default query and gallery",
    )  # fmt: skip
    parser.add_argument("--branch", help="ori, moe, sdtps or both; default both, or the only one")
    parser.add_argument("--half", action="store_true", help="store float16: half the size")
    parser.add_argument("--no-camera", action="store_true", help="take the mean camera embedding for every image")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu")
    parser.add_argument("--workers", type=int, default=-1, help="processes that load images; default: cores - 1")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = vars(parser.parse_args())
    debug, options["use_camera"] = options.pop("debug"), not options.pop("no_camera")
    setup_logging()
    sys.exit(run(lambda: extract(**options), debug))
