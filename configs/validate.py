"""Checks that look at more than one key, and values that deserve a warning."""

import logging
import re
from collections.abc import Collection, Iterator

from yacs.config import CfgNode

from configs.defaults import FLAT_KEYS
from utils.errors import UserError

logger = logging.getLogger(__name__)

MIN_IDENTITIES = 8
"""Identities in a micro-batch below which batch-hard triplets and BNNeck statistics starve."""


def patch_size(transformer_type: str) -> int:
    """Side of a patch in pixels as the ViT's name tells it (``…_patch14_…``, ``ViT-L-14``); 16 where it does not."""
    found = re.search(r"patch(\d+)|^ViT-\w+-(\d+)", transformer_type)
    return int(found.group(1) or found.group(2)) if found else 16


def flatten(cfg: dict) -> dict[str, object]:
    """Dotted name -> value, of a CfgNode or of nested dicts."""
    flat: dict[str, object] = {}
    for name, value in cfg.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{rest}": leaf for rest, leaf in flatten(value).items()}
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


def validate(cfg: CfgNode) -> None:
    """Check all values and their combinations.

    Raises:
        UserError: listing every fault, one a line.
    """
    values = flatten(cfg)
    faults = [f"{name}: unknown key" for name in values if name not in FLAT_KEYS]
    faulty = set()
    for name, key in FLAT_KEYS.items():
        try:
            if name not in values or key.parse(values[name]) != values[name]:
                raise ValueError
        except ValueError:
            faults.append(f"{name} = {values.get(name)!r}: expected {key.expected()}")
            faulty.add(name)
    for names, text in contradictions(cfg, faulty):
        faults.append(f"{', '.join(f'{name} = {values[name]!r}' for name in names)}: {text}")
    if faults:
        raise UserError("\n  ".join([f"{count(faults)} in the configuration", *faults]))


def count(faults: list[str]) -> str:
    """``1 fault`` or ``n faults``."""
    return f"{len(faults)} fault{'s' * (len(faults) != 1)}"


def contradictions(cfg: CfgNode, faulty: Collection[str] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Combinations that cannot work, as (keys, what is wrong and what to do).

    Args:
        faulty: keys whose own value is already known to be wrong; combinations with them are passed over.
    """
    for check in (_images, _batches, _sdtps, _branches, _epochs):
        for names, text in check(cfg):
            if not set(names) & set(faulty):
                yield names, text


def warn(cfg: CfgNode) -> None:
    """Logs what can be trained, but seldom is what was meant."""
    for text in _doubts(cfg):
        logger.warning(text)


def _doubts(cfg: CfgNode) -> Iterator[str]:
    identities = cfg.SOLVER.IMS_PER_BATCH // (cfg.SOLVER.ACCUMULATION * cfg.DATALOADER.NUM_INSTANCE)
    if identities < MIN_IDENTITIES:
        yield (
            f"{identities} identities in a micro-batch (SOLVER.IMS_PER_BATCH / SOLVER.ACCUMULATION / "
            f"DATALOADER.NUM_INSTANCE): with fewer than {MIN_IDENTITIES}, batch-hard triplets find few hard negatives "
            "and the BNNeck's statistics are noise; training may not get off the ground. Use larger micro-batches or "
            "a smaller NUM_INSTANCE."
        )
    if cfg.DATALOADER.NUM_INSTANCE == 1 and cfg.MODEL.TRIPLET_LOSS_WEIGHT > 0:
        yield "DATALOADER.NUM_INSTANCE = 1: the triplet loss has no positive but the image itself; use 2 or more."
    if not cfg.MODEL.PRETRAINED and cfg.MODEL.PRETRAIN_PATH_T:
        yield "MODEL.PRETRAINED is off: the backbone starts from random weights, MODEL.PRETRAIN_PATH_T is not read."
    if not cfg.MODEL.USE_SDTPS:
        return
    if 0 < cfg.MODEL.SDTPS_TEMPERATURE <= 0.1:
        yield (
            f"MODEL.SDTPS_TEMPERATURE = {cfg.MODEL.SDTPS_TEMPERATURE}: at 0.1 and below a few patches take all of the "
            "weight and gradients through the scores grow large; 0.3 is the value to start from."
        )
    if cfg.MODEL.SDTPS_LOSS_WEIGHT == 0:
        yield "MODEL.SDTPS_LOSS_WEIGHT = 0: the branch sdtps is never trained, yet `both` contains it."


def _images(cfg: CfgNode) -> Iterator[tuple[tuple[str, ...], str]]:
    patch = patch_size(cfg.MODEL.TRANSFORMER_TYPE)
    name = "MODEL.TRANSFORMER_TYPE"
    small = [size for size in ("SIZE_TRAIN", "SIZE_TEST") if min(cfg.INPUT[size]) < patch]
    for size in small:
        yield (
            (f"INPUT.{size}", name),
            f"the image is smaller than one patch of {patch} x {patch} pixels; the grid has "
            f"floor((size - {patch}) / stride) + 1 patches a side. Make both sides at least {patch}.",
        )
    if not small and cfg.INPUT.SIZE_TRAIN != cfg.INPUT.SIZE_TEST:
        yield (
            ("INPUT.SIZE_TRAIN", "INPUT.SIZE_TEST"),
            "the model is built for one image size. Set both to the same.",
        )
    if max(cfg.MODEL.STRIDE_SIZE) > patch:
        yield (
            ("MODEL.STRIDE_SIZE", name),
            f"a stride above the patch size would leave pixels out between patches. "
            f"Use [{patch}, {patch}], or less for patches that overlap.",
        )


def _batches(cfg: CfgNode) -> Iterator[tuple[tuple[str, ...], str]]:
    batch, instances, parts = cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_INSTANCE, cfg.SOLVER.ACCUMULATION
    names: tuple[str, ...] = ("SOLVER.IMS_PER_BATCH", "DATALOADER.NUM_INSTANCE")
    what = f"a batch is made of identities with {instances} triples each"
    if parts > 1:
        names += ("SOLVER.ACCUMULATION",)
        what = f"a batch is {parts} micro-batches, each made of identities with {instances} triples"
    unit = instances * parts
    if batch % unit:
        fits = " or ".join(str(n * unit) for n in sorted({max(2, batch // unit), max(2, batch // unit + 1)}))
        yield names, f"{what}, so it must be divisible by {unit}. Set SOLVER.IMS_PER_BATCH to {fits}."
    elif batch == unit and cfg.MODEL.TRIPLET_LOSS_WEIGHT > 0:
        yield (
            names,
            "a single identity is in each micro-batch, so that the triplet loss has no negatives. "
            f"Set SOLVER.IMS_PER_BATCH to {MIN_IDENTITIES * unit} ({MIN_IDENTITIES} identities) or more.",
        )


def _sdtps(cfg: CfgNode) -> Iterator[tuple[tuple[str, ...], str]]:
    model = cfg.MODEL
    only = "MODEL.SDTPS_ONLY"
    if model.SDTPS_ONLY and not model.USE_SDTPS:
        yield (
            (only, "MODEL.USE_SDTPS"),
            "the branch that should train alone is switched off. Set MODEL.USE_SDTPS True, or MODEL.SDTPS_ONLY False.",
        )
    if model.SDTPS_ONLY and (model.HDM or model.ATM):
        yield (
            (only, "MODEL.HDM", "MODEL.ATM"),
            "with the branch sdtps alone there is no branch moe. Set MODEL.HDM and MODEL.ATM False, "
            "or MODEL.SDTPS_ONLY False.",
        )
    if model.SDTPS_ONLY and model.SDTPS_WARMUP_EPOCHS > 0:
        yield (
            (only, "MODEL.SDTPS_WARMUP_EPOCHS"),
            "the warm-up trains the branch ori alone, and there is none. Set MODEL.SDTPS_WARMUP_EPOCHS 0.",
        )
    if model.SDTPS_ONLY and model.SDTPS_LOSS_WEIGHT == 0:
        yield (
            (only, "MODEL.SDTPS_LOSS_WEIGHT"),
            "the only branch would have no loss. Set MODEL.SDTPS_LOSS_WEIGHT above 0, such as 1.0.",
        )
    if model.USE_SDTPS and model.SDTPS_GLOBAL == "reduced" and not model.GLOBAL_LOCAL:
        yield (
            ("MODEL.SDTPS_GLOBAL", "MODEL.GLOBAL_LOCAL"),
            "the reduced global is made by GLOBAL_LOCAL. Set MODEL.GLOBAL_LOCAL True, or MODEL.SDTPS_GLOBAL class.",
        )
    if model.USE_SDTPS and model.SDTPS_GLOBAL == "reduced" and model.SDTPS_AFTER_BLOCK > 0:
        yield (
            ("MODEL.SDTPS_GLOBAL", "MODEL.SDTPS_AFTER_BLOCK"),
            "the reduced global is made behind the backbone, the selection would come before it. "
            "Set MODEL.SDTPS_GLOBAL class, or MODEL.SDTPS_AFTER_BLOCK 0.",
        )
    if model.USE_SDTPS and model.SDTPS_USE_GUMBEL and model.SDTPS_CHOICE == "random":
        yield (
            ("MODEL.SDTPS_USE_GUMBEL", "MODEL.SDTPS_CHOICE"),
            "Gumbel sampling draws by score, a random choice does not look at it. "
            "Set MODEL.SDTPS_USE_GUMBEL False, or MODEL.SDTPS_CHOICE best.",
        )
    if model.USE_SDTPS and 2 * model.SDTPS_WARMUP_EPOCHS > cfg.SOLVER.MAX_EPOCHS:
        yield (
            ("MODEL.SDTPS_WARMUP_EPOCHS", "SOLVER.MAX_EPOCHS"),
            "the branch sdtps waits n epochs and then rises over n more, so that it would never reach its full weight. "
            f"Set MODEL.SDTPS_WARMUP_EPOCHS to {cfg.SOLVER.MAX_EPOCHS // 2} or less.",
        )


def _branches(cfg: CfgNode) -> Iterator[tuple[tuple[str, ...], str]]:
    model = cfg.MODEL
    if model.HDM != model.ATM:
        yield (
            ("MODEL.HDM", "MODEL.ATM"),
            "HDM makes the features of the subsets of modalities and ATMoE alone brings them to the loss, so that "
            "neither is defined without the other. Set both True (DeMo), or both False.",
        )
    if model.ID_LOSS_WEIGHT == 0 and model.TRIPLET_LOSS_WEIGHT == 0:
        yield (
            ("MODEL.ID_LOSS_WEIGHT", "MODEL.TRIPLET_LOSS_WEIGHT"),
            "without a loss nothing trains. Set at least one above 0 (DeMo: 0.25 and 1).",
        )


def _epochs(cfg: CfgNode) -> Iterator[tuple[tuple[str, ...], str]]:
    warmup, epochs = cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.MAX_EPOCHS
    if warmup >= epochs:
        yield (
            ("SOLVER.WARMUP_ITERS", "SOLVER.MAX_EPOCHS"),
            "the warm-up is counted in epochs and would not end before training does. "
            f"Set SOLVER.WARMUP_ITERS to {f'{epochs - 1} or less' if epochs > 1 else '0'}, or train longer.",
        )
