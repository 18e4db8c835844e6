"""Keys against each other: what is refused, what is warned about, and what passes."""

import logging

import pytest

import test_net
import train_net
from configs import get_cfg, load_cfg, validate, warn
from configs.validate import patch_size
from utils.errors import UserError

SDTPS = ("MODEL.USE_SDTPS", "True")
ONLY = (*SDTPS, "MODEL.SDTPS_ONLY", "True")


@pytest.mark.parametrize(
    ("opts", "names", "remedy"),
    [
        (("INPUT.SIZE_TEST", "[8, 128]"), ("INPUT.SIZE_TEST", "MODEL.TRANSFORMER_TYPE"), "at least 16"),
        (("INPUT.SIZE_TRAIN", "[128, 64]"), ("INPUT.SIZE_TRAIN", "INPUT.SIZE_TEST"), "to the same"),
        (("MODEL.STRIDE_SIZE", "[17, 16]"), ("MODEL.STRIDE_SIZE",), "[16, 16]"),
        (
            ("MODEL.STRIDE_SIZE", "[16, 16]", "MODEL.TRANSFORMER_TYPE", "vit_small_patch14_dinov2"),
            ("MODEL.STRIDE_SIZE", "MODEL.TRANSFORMER_TYPE"),
            "[14, 14]",
        ),
        (("SOLVER.IMS_PER_BATCH", "60"), ("SOLVER.IMS_PER_BATCH", "DATALOADER.NUM_INSTANCE"), "56 or 64"),
        (("SOLVER.IMS_PER_BATCH", "4"), ("SOLVER.IMS_PER_BATCH",), "to 16."),
        (("SOLVER.IMS_PER_BATCH", "8"), ("SOLVER.IMS_PER_BATCH",), "no negatives"),
        (("SOLVER.ACCUMULATION", "3"), ("SOLVER.ACCUMULATION",), "48 or 72"),
        (("SOLVER.ACCUMULATION", "8"), ("SOLVER.ACCUMULATION",), "no negatives"),
        (("SOLVER.MAX_EPOCHS", "10"), ("SOLVER.WARMUP_ITERS", "SOLVER.MAX_EPOCHS"), "9 or less"),
        (("MODEL.HDM", "True"), ("MODEL.HDM", "MODEL.ATM"), "both True (DeMo), or both False"),
        (("MODEL.ATM", "True"), ("MODEL.HDM", "MODEL.ATM"), "both True (DeMo), or both False"),
        (("MODEL.ID_LOSS_WEIGHT", "0", "MODEL.TRIPLET_LOSS_WEIGHT", "0"), ("MODEL.ID_LOSS_WEIGHT",), "above 0"),
        (("MODEL.SDTPS_ONLY", "True"), ("MODEL.SDTPS_ONLY", "MODEL.USE_SDTPS"), "USE_SDTPS True"),
        (
            (*SDTPS, "MODEL.SDTPS_CHOICE", "random", "MODEL.SDTPS_USE_GUMBEL", "True"),
            ("MODEL.SDTPS_USE_GUMBEL", "MODEL.SDTPS_CHOICE"),
            "SDTPS_CHOICE best",
        ),
        ((*ONLY, "MODEL.HDM", "yes", "MODEL.ATM", "yes"), ("MODEL.SDTPS_ONLY", "MODEL.HDM"), "False"),
        ((*ONLY, "MODEL.SDTPS_WARMUP_EPOCHS", "3"), ("MODEL.SDTPS_WARMUP_EPOCHS",), "SDTPS_WARMUP_EPOCHS 0"),
        ((*ONLY, "MODEL.SDTPS_LOSS_WEIGHT", "0"), ("MODEL.SDTPS_LOSS_WEIGHT",), "above 0"),
        ((*SDTPS, "MODEL.SDTPS_GLOBAL", "reduced"), ("MODEL.SDTPS_GLOBAL", "MODEL.GLOBAL_LOCAL"), "GLOBAL_LOCAL True"),
        ((*SDTPS, "MODEL.SDTPS_WARMUP_EPOCHS", "26"), ("MODEL.SDTPS_WARMUP_EPOCHS", "SOLVER.MAX_EPOCHS"), "25 or less"),
    ],
)
def test_contradiction_names_its_keys_and_the_way_out(opts, names, remedy):
    with pytest.raises(UserError) as caught:
        load_cfg(None, opts)
    _, line = str(caught.value).splitlines()  # one fault, told once
    assert all(f"{name} = " in line for name in names)
    assert remedy in line


@pytest.mark.parametrize(
    "opts",
    [
        ("SOLVER.ACCUMULATION", "4", "DATALOADER.NUM_INSTANCE", "2"),
        ("INPUT.SIZE_TRAIN", "[16, 16]", "INPUT.SIZE_TEST", "[16, 16]"),
        ("MODEL.STRIDE_SIZE", "[12, 12]"),
        ("SOLVER.MAX_EPOCHS", "11"),
        ("MODEL.HDM", "True", "MODEL.ATM", "True"),
        (*SDTPS, "MODEL.SDTPS_WARMUP_EPOCHS", "25"),
        ("MODEL.SDTPS_GLOBAL", "reduced"),  # nothing to contradict while SDTPS is off
        (*SDTPS, "MODEL.SDTPS_GLOBAL", "reduced", "MODEL.GLOBAL_LOCAL", "True"),
        (*ONLY, "MODEL.SDTPS_TEMPERATURE", "0"),
    ],
)
def test_what_fits_passes_without_a_word(opts, caplog):
    warn(load_cfg(None, opts))
    assert not caplog.records


@pytest.mark.parametrize(
    ("opts", "text"),
    [
        (("SOLVER.IMS_PER_BATCH", "56"), "7 identities"),
        (("SOLVER.ACCUMULATION", "2"), "4 identities"),
        ((*SDTPS, "MODEL.SDTPS_TEMPERATURE", "0.1"), "SDTPS_TEMPERATURE"),
        ((*SDTPS, "MODEL.SDTPS_LOSS_WEIGHT", "0"), "never trained"),
        (("DATALOADER.NUM_INSTANCE", "1"), "no positive"),
        (("MODEL.PRETRAINED", "no", "MODEL.PRETRAIN_PATH_T", "x.pt"), "random weights"),
    ],
)
def test_doubtful_values_are_warned_about_once(opts, text, caplog):
    warn(load_cfg(None, opts))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert text in record.getMessage()


@pytest.mark.parametrize(("script", "times"), [(train_net, 1), (test_net, 0)])
def test_training_alone_warns(script, times, tiny_yaml, caplog):
    with pytest.raises(UserError, match="none.pth"):
        script.main(str(tiny_yaml), ["TEST.WEIGHT", "none.pth"])
    assert caplog.text.count("4 identities in a micro-batch") == times


@pytest.mark.parametrize(
    ("name", "patch"),
    [
        ("ViT-B-16", 16),
        ("ViT-L-14", 14),
        ("vit_base_patch16_224", 16),
        ("vit_small_patch14_dinov2.lvd142m", 14),
        ("x", 16),
    ],
)
def test_patch_size_is_told_by_the_name(name, patch):
    assert patch_size(name) == patch


def test_validate_checks_a_config_built_in_code():
    cfg = get_cfg()
    validate(cfg)
    cfg.MODEL.SDTPS_AGGR_RATIO = 2.0
    cfg.MODEL.HDM = True
    cfg.TEST.RE_RANKING = "no"  # a true value, were it used as it is
    with pytest.raises(UserError) as caught:
        validate(cfg)
    assert all(name in str(caught.value) for name in ("3 faults", "SDTPS_AGGR_RATIO", "MODEL.ATM", "RE_RANKING"))
