"""Keys of DeMo and of its forks that do nothing here: old YAMLs load, unless they ask for something not offered."""

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ObsoleteKey:
    """Keys whose dotted name matches ``names``; a value that ``accepts`` does not match asks for something missing."""

    names: str
    accepts: str = ".*"
    instead: str = ""


OBSOLETE = (
    ObsoleteKey(r"MODEL\.DEVICE_ID", instead="choose the card by MODEL.DEVICE, such as cuda:1"),
    ObsoleteKey(r"MODEL\.IF_WITH_CENTER", "no", "there is no center loss"),
    ObsoleteKey(r"MODEL\.ID_LOSS_TYPE", "softmax", "the identity loss is softmax cross entropy"),
    ObsoleteKey(r"MODEL\.METRIC_LOSS_TYPE", "triplet", "the metric loss is the batch-hard triplet loss"),
    ObsoleteKey(r"MODEL\.DIST_TRAIN", "no", "training runs in one process on one device"),
    ObsoleteKey(r"MODEL\.(PROMPT|ADAPTER)", "no", "the backbone has neither prompts nor adapters"),
    ObsoleteKey(r"MODEL\.NECK", "bnneck", "every head has a BNNeck"),
    ObsoleteKey(r"MODEL\.SIE_VIEW", "no", "there is no view embedding, only the camera's (MODEL.SIE_CAMERA)"),
    ObsoleteKey(
        r"MODEL\.(DMCG|IADD|EMDAI|C_MIEI)(\.ENABLED)?", "no|", "this module of a fork is not part of this code"
    ),
    ObsoleteKey(r"MODEL\.(DMCG|IADD|EMDAI|C_MIEI)\.\w+"),
    ObsoleteKey(r"MODEL\.USE_(SACR|MULTIMODAL_SACR|LIF|DGAF)", "no", "this module of a fork is not part of this code"),
    ObsoleteKey(r"MODEL\.(SACR|MULTIMODAL_SACR|LIF|DGAF)_\w+"),
    ObsoleteKey(r"MODEL\.SDTPS_CROSS_ATTN_TYPE", "cosine", "set MODEL.SDTPS_SIMILARITY attention"),
    ObsoleteKey(r"MODEL\.SDTPS_CROSS_ATTN_HEADS"),
    ObsoleteKey(r"DATALOADER\.SAMPLER", ".*triplet.*", "batches are always drawn by identity, for the triplet loss"),
    ObsoleteKey(r"SOLVER\.LARGE_FC_LR", "no", "the classifier learns at SOLVER.BASE_LR"),
    ObsoleteKey(r"SOLVER\.LR_SCHEDULER", "cosine", "SOLVER.SCHEDULE chooses between cosine and demo"),
    ObsoleteKey(r"SOLVER\.(CLUSTER_MARGIN|CENTER_LR|CENTER_LOSS_WEIGHT|RANGE_\w+)"),
    ObsoleteKey(r"SOLVER\.(GAMMA|STEPS|WARMUP_METHOD|COSINE_MARGIN|COSINE_SCALE)"),
    ObsoleteKey(r"TEST\.(DIST_MAT|EVAL)"),
)


def find(name: str) -> ObsoleteKey | None:
    """The entry for a dotted key, or None where it is not one of these."""
    return next((entry for entry in OBSOLETE if re.fullmatch(entry.names, name)), None)


def is_section(name: str) -> bool:
    """Whether keys of this kind stand below ``name``, such as ``MODEL.DMCG``."""
    return find(f"{name}.ENABLED") is not None


def asks_for_more(entry: ObsoleteKey, value: Any) -> bool:
    """Whether the value switches on a behaviour that is not offered."""
    text = "" if value is None else re.sub(r"[()'\",\s]", "", str(value)).lower()
    text = {"false": "no", "off": "no", "true": "yes", "on": "yes"}.get(text, text)
    return re.fullmatch(entry.accepts, text, re.DOTALL) is None
