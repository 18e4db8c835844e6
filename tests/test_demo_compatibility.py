"""What a user of DeMo brings along: YAMLs, checkpoints, the learning rate. And the YAMLs that this project ships."""

import json
from pathlib import Path

import pytest
import torch
from reference import REFERENCE, reference_weight

from configs import diff, load_cfg, warn
from modeling import foreign, make_model
from solver import create_scheduler, make_optimizer
from utils.checkpoint import load_weights
from utils.errors import UserError
from utils.modalities import MODALITIES

CONFIGS = Path(__file__).parent.parent / "configs"
SHIPPED = sorted(p.relative_to(CONFIGS).as_posix() for p in CONFIGS.glob("*/*.yml") if p.parent.name != "studies")
SHALLOW = ("MODEL.DEPTH", "1", "MODEL.DEVICE", "cpu")


def shallow_model(config: str, *opts: str, num_classes: int = 5, num_cameras: int = 8):
    """The model of a shipped config with one block, random weights."""
    cfg = load_cfg(CONFIGS / config, [*SHALLOW, *opts])
    return make_model(cfg, num_classes=num_classes, num_cameras=num_cameras, pretrained=False)


# The shipped YAMLs


def test_every_data_set_has_its_configs():
    for dataset in ("RGBNT201", "RGBNT100", "MSVR310"):
        assert {f"{dataset}/{name}.yml" for name in ("base", "baseline", "DeMo", "DeMo_SDTPS")} <= set(SHIPPED)


@pytest.mark.parametrize("config", SHIPPED)
def test_a_shipped_config_loads_without_a_warning_and_builds(config, caplog):
    cfg = load_cfg(CONFIGS / config)
    warn(cfg)
    assert not caplog.records
    if not config.endswith("base.yml"):
        assert Path(cfg.OUTPUT_DIR) == Path("runs", config).with_suffix("")  # where `make train` looks for it

    model = shallow_model(config)
    standing = (18, 9) if "dinov2" in config else (16, 8)  # patches of 14 pixels, or of 16
    assert model.backbone.grid == (standing if cfg.DATASETS.NAMES == "RGBNT201" else (8, 16))
    assert model.branches == ("ori",) + ("moe",) * cfg.MODEL.HDM + ("sdtps",) * cfg.MODEL.USE_SDTPS
    assert ("ori" in model.heads) == (cfg.DATASETS.NAMES == "RGBNT201")  # vehicles: a head for each modality


@pytest.mark.parametrize(
    "config, branches", [("DeMo", {"ori", "moe"}), ("baseline", {"ori"}), ("DeMo_SDTPS", {"ori", "sdtps"})]
)
@pytest.mark.parametrize("dataset", ["RGBNT201", "RGBNT100", "MSVR310"])
def test_a_variant_is_named_after_its_branches(dataset, config, branches):
    cfg = load_cfg(CONFIGS / dataset / f"{config}.yml")
    has = {"ori": True, "moe": cfg.MODEL.HDM and cfg.MODEL.ATM, "sdtps": cfg.MODEL.USE_SDTPS}
    assert {name for name, value in has.items() if value} == branches


@pytest.mark.parametrize(
    "config", ["RGBNT201/DeMo.yml", "RGBNT100/DeMo.yml", "MSVR310/DeMo.yml", "sample/RGBNT100.yml"]
)
def test_demo_trains_every_parameter(config):
    model = shallow_model(config).train()
    height, width = 16 * model.backbone.grid[0], 16 * model.backbone.grid[1]
    images = {m: torch.randn(2, 3, height, width) for m in MODALITIES}
    output = model(images, torch.tensor([0, 7]))
    sum(logits.square().sum() for logits in output.logits.values()).backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle


# DeMo's YAMLs

DEMO_YAML = """
MODEL:
  TRANSFORMER_TYPE: 'ViT-B-16'
  PRETRAIN_PATH_T: ''
  STRIDE_SIZE: [ 16, 16 ]
  DEVICE_ID: ('0')
  NECK: 'bnneck'
  IF_WITH_CENTER: 'no'
  METRIC_LOSS_TYPE: 'triplet'
  IF_LABELSMOOTH: 'on'
  PROMPT: False
  ADAPTER: False
  FROZEN: False
  SIE_CAMERA: True
  SIE_VIEW: False
  SIE_COE: 1.0
  DIRECT: {direct}
  ID_LOSS_WEIGHT: 0.25
  TRIPLET_LOSS_WEIGHT: 1.0
  GLOBAL_LOCAL: True
  HDM: True
  ATM: True
  HEAD: {head}
INPUT:
  SIZE_TRAIN: {size}
  SIZE_TEST: {size}
  PROB: 0.5
  RE_PROB: 0.5
  PADDING: 10
DATALOADER:
  SAMPLER: 'softmax_triplet'
  NUM_INSTANCE: {instances}
  NUM_WORKERS: 14
DATASETS:
  NAMES: ('{dataset}')
  ROOT_DIR: '..'
SOLVER:
  OPTIMIZER_NAME: 'Adam'
  BASE_LR: 0.00035
  WARMUP_ITERS: {warmup}
  WARMUP_METHOD: 'linear'
  MAX_EPOCHS: {epochs}
  LARGE_FC_LR: False
  STEPS: (40, 70)
  GAMMA: 0.1
  IMS_PER_BATCH: {batch}
  EVAL_PERIOD: 1
TEST:
  IMS_PER_BATCH: 128
  RE_RANKING: 'no'
  WEIGHT: ''
  NECK_FEAT: 'before'
  FEAT_NORM: 'yes'
  MISS: "None"
OUTPUT_DIR: '..'
"""
OBSOLETE = [
    *("MODEL.DEVICE_ID", "MODEL.NECK", "MODEL.IF_WITH_CENTER", "MODEL.METRIC_LOSS_TYPE", "MODEL.PROMPT"),
    *("MODEL.ADAPTER", "MODEL.SIE_VIEW", "DATALOADER.SAMPLER", "SOLVER.WARMUP_METHOD", "SOLVER.LARGE_FC_LR"),
    *("SOLVER.STEPS", "SOLVER.GAMMA"),
]
SETTINGS = {  # direct, head, size, instances, warmup, epochs, batch
    "RGBNT201": (1, 4, [256, 128], 8, 10, 50, 64),
    "RGBNT100": (0, 8, [128, 256], 16, 5, 30, 128),
    "MSVR310": (0, 8, [128, 256], 4, 10, 50, 64),
}
NAMES = ("direct", "head", "size", "instances", "warmup", "epochs", "batch")


@pytest.mark.parametrize("dataset", SETTINGS)
def test_a_yaml_of_demo_gives_what_the_shipped_one_gives(dataset, tmp_path, caplog):
    path = tmp_path / "theirs.yml"
    path.write_text(DEMO_YAML.format(dataset=dataset, **dict(zip(NAMES, SETTINGS[dataset], strict=True))))
    theirs = load_cfg(path)
    warn(theirs)
    (record,) = caplog.records
    notice = record.getMessage()
    assert "\n" not in notice and all(name in notice for name in OBSOLETE)

    places = {"DATASETS.ROOT_DIR", "OUTPUT_DIR", "DATALOADER.NUM_WORKERS", "TEST.IMS_PER_BATCH"}
    different = {name: values for name, *values in diff(theirs, load_cfg(CONFIGS / dataset / "DeMo.yml"))}
    assert different.keys() - places == {"SOLVER.SCHEDULE"}  # theirs does not name one, and noise has to be asked for
    assert different["SOLVER.SCHEDULE"] == ["cosine", "demo"]
    assert theirs.TEST.RE_RANKING is False and theirs.TEST.FEAT_NORM is True


@pytest.mark.parametrize("key, other", [("MODEL.HDM", "MODEL.ATM"), ("MODEL.ATM", "MODEL.HDM")])
def test_one_of_hdm_and_atm_without_the_other_is_a_fault(key, other):
    config = CONFIGS / "RGBNT201" / "DeMo.yml"
    with pytest.raises(UserError) as error:
        load_cfg(config, [key, "False"])
    assert f"{key} = False (command line)" in str(error.value)
    assert f"{other} = True ({config}:" in str(error.value)
    load_cfg(config, [key, "False", other, "False"])


# The learning rate


def demo_keys(blocks: int = 1) -> dict[str, list[int]]:
    """Name -> shape in a published checkpoint of RGBNT201, of whose backbone the first blocks are kept."""
    shapes = json.loads((REFERENCE / "demo_rgbnt201.keys.json").read_text())
    kept = tuple(f"resblocks.{i}." for i in range(blocks))
    return {name: shape for name, shape in shapes.items() if "resblocks." not in name or any(k in name for k in kept)}


def test_rates_of_every_parameter_are_those_of_demo_in_every_epoch():
    cfg = load_cfg(CONFIGS / "RGBNT201" / "DeMo.yml", SHALLOW)
    model = make_model(cfg, num_classes=171, num_cameras=4, pretrained=False)
    optimizer = make_optimizer(cfg, model)
    scheduler = create_scheduler(cfg, optimizer)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(model.named_parameters())

    kinds: dict[str, list[str]] = {}  # in the published code the name alone decides
    for theirs, shape in demo_keys().items():
        (ours,) = foreign.translate({theirs: torch.empty(shape, device="meta")})
        if ours in parameters and parameters[ours].requires_grad:
            part = "backbone" if "base" in theirs else "head"
            kinds.setdefault(f"{part}_{'bias' if 'bias' in theirs else 'weight'}", []).append(ours)
    assert sum(map(len, kinds.values())) == sum(p.requires_grad for p in parameters.values())

    reference = json.loads((REFERENCE / "demo_rgbnt201.lr.json").read_text())
    assert kinds.keys() == reference.keys() - {"note"}
    for epoch in range(1, 51):
        for progress in (epoch - 1, epoch - 0.01):
            scheduler.step(progress)
            for kind, names in kinds.items():
                (rate,) = {group_of[id(parameters[name])]["lr"] for name in names}
                assert rate == pytest.approx(reference[kind][epoch], rel=1e-6), (epoch, kind)


# Checkpoints of another data set


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A checkpoint of DeMo on RGBNT201, with one block: 171 identities, 4 cameras."""
    path = tmp_path_factory.mktemp("published") / "DeMobest.pth"
    torch.save({name: reference_weight(name, tuple(shape)) for name, shape in demo_keys().items()}, path)
    return path


def test_a_published_checkpoint_fills_the_model_of_the_shipped_config(published):
    model = shallow_model("RGBNT201/DeMo.yml", num_classes=171, num_cameras=4)
    report = load_weights(model, published)
    assert set(report.loaded) == set(model.state_dict()) and not report.skipped


def test_another_number_of_identities_leaves_the_classifiers_out_on_request(published):
    model = shallow_model("RGBNT201/DeMo.yml", num_classes=30, num_cameras=4)
    with pytest.raises(UserError) as error:
        load_weights(model, published)
    for name, width in (("ori", 1536), ("moe", 3584)):
        assert f"heads.{name}.classifier.weight (171, {width}), wanted (30, {width})" in str(error.value)

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_weights(model, published, skip=("classifier",))
    assert set(report.skipped) == {"heads.ori.classifier.weight", "heads.moe.classifier.weight"}
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in report.skipped)
    neck = reference_weight("bottleneck_moe.weight", (3584,))
    assert torch.equal(after["heads.moe.bottleneck.weight"], neck)


@pytest.mark.parametrize("cameras", [2, 8])
def test_another_number_of_cameras_is_refused_unless_the_embedding_is_left_out(cameras, published):
    model = shallow_model("RGBNT201/DeMo.yml", num_classes=171, num_cameras=cameras)
    with pytest.raises(UserError, match=rf"backbone\.cam_embed \(4, 768\), wanted \({cameras}, 768\)"):
        load_weights(model, published)
    assert load_weights(model, published, skip=("cam_embed",)).skipped == ("backbone.cam_embed",)


def test_the_sizes_in_a_checkpoint_make_the_model_that_it_fits(published):
    classes, cameras = foreign.stored_sizes(torch.load(published))
    assert (classes, cameras) == (171, 4)
    model = shallow_model("RGBNT201/DeMo.yml", num_classes=classes, num_cameras=cameras)
    load_weights(model, published)
    features = model.eval()({m: torch.zeros(1, 3, 256, 128) for m in MODALITIES}, torch.tensor([1])).features
    assert features["both"].shape == (1, 1536 + 3584)


def test_a_checkpoint_of_persons_does_not_pass_for_one_of_vehicles(published):
    model = shallow_model("RGBNT100/DeMo.yml", num_classes=171, num_cameras=4)
    with pytest.raises(UserError) as error:
        load_weights(model, published)
    missing, unexpected, reshaped = str(error.value).splitlines()[1:4]
    assert "missing in the file" in missing and "fusion.moe.experts.4.0.0.weight" in missing  # 8 heads, not 4
    assert (
        "unexpected in the file" in unexpected and "heads.ori.classifier.weight" in unexpected
    )  # a head each, not one
    assert "of another shape" in reshaped and "fusion.moe.experts.0.0.0.weight (128, 128), wanted (64, 64)" in reshaped
