"""The whole model on published DeMo checkpoints gives the published code's features."""

import numpy as np
import pytest
import torch
from reference import REFERENCE, reference_images, reference_state, relative_error

from configs import load_cfg
from modeling import make_model
from utils.checkpoint import load_weights

COMMON = ("MODEL.DEVICE", "cpu", "MODEL.TRANSFORMER_TYPE", "ViT-B-16", "MODEL.GLOBAL_LOCAL", "True")
FUSION = ("MODEL.HDM", "True", "MODEL.ATM", "True")
FILES = {
    "demo_rgbnt201": ((256, 128), 171, 4, (*FUSION, "MODEL.HEAD", "4")),
    "demo_rgbnt100": ((128, 256), 50, 8, (*FUSION, "MODEL.HEAD", "8", "MODEL.DIRECT", "0")),
    "baseline_rgbnt201": ((256, 128), 171, 4, ()),
}


@pytest.mark.parametrize("name", FILES)
def test_features_of_published_checkpoints(name, tmp_path):
    size, classes, cameras, opts = FILES[name]
    cfg = load_cfg(None, [*COMMON, *opts, "INPUT.SIZE_TRAIN", str(list(size)), "INPUT.SIZE_TEST", str(list(size))])
    model = make_model(cfg, num_classes=classes, num_cameras=cameras, pretrained=False).eval()
    torch.save({f"module.{k}": v for k, v in reference_state(name).items()}, tmp_path / "DeMobest.pth")
    load_weights(model, tmp_path / "DeMobest.pth")

    with np.load(REFERENCE / f"{name}.npz") as file, torch.no_grad():
        images, camid = reference_images(int(file["seed"]), size), torch.as_tensor(file["cam"])
        features = model(images, camid).features
        for branch in features.keys() & {"ori", "moe", "both"}:
            assert relative_error(features[branch], file[branch]) <= 1e-4, branch
        assert ("moe" in features) == bool(opts)
        if name != "baseline_rgbnt201":  # one modality left: the others are zero images
            present = torch.tensor([[True, False, False]] * 3)
            missing = model(images, camid, present).features["ori"]
            assert relative_error(missing, file["ori_miss_nt"]) <= 1e-4
