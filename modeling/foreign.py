"""Names of other projects' checkpoints -> ours: DeMo (AAAI 2025) and its fork with SDTPS.

Each rule is anchored at the start of a name and none matches a name of this project, so that our own checkpoints pass
unchanged and a file needs no declaration of where it comes from.
"""

import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from torch import Tensor

from modeling.pretrained import to_backbone_name
from utils.modalities import MODALITIES

LONG = dict(zip(("rgb", "nir", "tir"), MODALITIES, strict=True))
"""The prefixes with which the other projects name the parts of each modality ..."""
SHORT = dict(zip("rnt", MODALITIES, strict=True))
"""... and the letters behind which they keep its head."""

AGGREGATOR = {"0": "norm", "1": "fc1", "3": "fc2"}
REDUCE = {"0": "norm", "1": "linear"}
HEADS = {"": "ori", "_moe": "moe", "_sdtps": "sdtps", **{f"_{letter}": name for letter, name in SHORT.items()}}

RULES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"(bottleneck|classifier)(_moe|_sdtps|_r|_n|_t)?\.(.+)", lambda m: f"heads.{HEADS[m[2] or '']}.{m[1]}.{m[3]}"),
    (r"(rgb|nir|tir)_reduce\.([01])\.(.+)", lambda m: f"reduce.{LONG[m[1]]}.{REDUCE[m[2]]}.{m[3]}"),
    (r"sdtps\.(rgb|nir|tir)_sparse\.score_predictor\.(.+)", lambda m: f"sdtps.predictor.{LONG[m[1]]}.{m[2]}"),
    (r"sdtps\.(rgb|nir|tir)_aggr\.scale", lambda m: f"sdtps.aggregator.{LONG[m[1]]}.scale"),
    (
        r"sdtps\.(rgb|nir|tir)_aggr\.weight\.([013])\.(.+)",
        lambda m: f"sdtps.aggregator.{LONG[m[1]]}.{AGGREGATOR[m[2]]}.{m[3]}",
    ),
    (r"generalFusion\.([rnt]+)_token", r"fusion.hdm.queries.\1"),
    (r"generalFusion\.([rnt]+)\.(.+)", r"fusion.hdm.attention.\1.\2"),
    (r"generalFusion\.moe\.experts\.(\d+)\.expertHead\.(\d+)\.mlp\.(.+)", r"fusion.moe.experts.\1.\2.\3"),
    (r"generalFusion\.moe\.gating_network\.gate\.linear_re\.(.+)", r"fusion.moe.gate.query.\1"),
    (r"generalFusion\.moe\.gating_network\.gate\.([qk])_\.(.+)", r"fusion.moe.gate.\1.\2"),
]
"""(pattern of the whole foreign name, ours); the backbone has rules of its own in `modeling.pretrained`."""


def translate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames and reshapes the tensors of a whole-model checkpoint to this project's; what it does not know it keeps.

    Args:
        state: by the names of this project, of DeMo or of its fork, each with or without `module.` before it.
    """
    return dict(_translate(name.removeprefix("module."), tensor) for name, tensor in state.items())


def stored_sizes(state: dict[str, Tensor]) -> tuple[int | None, int | None]:
    """How many identities and cameras a whole-model checkpoint was trained on; None for what it does not hold."""
    shapes = {name: tensor.shape for name, tensor in translate(state).items()}
    classes = next((s[0] for name, s in shapes.items() if re.fullmatch(r"heads\.\w+\.classifier\.weight", name)), None)
    return classes, shapes["backbone.cam_embed"][0] if "backbone.cam_embed" in shapes else None


def _translate(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    if name == "BACKBONE.cv_embed":
        return "backbone.cam_embed", tensor.flatten(0, 1)  # (cameras, 1, W)
    if name.startswith("BACKBONE.base."):
        renamed, tensor = to_backbone_name(name.removeprefix("BACKBONE.base."), tensor)
        return f"backbone.{renamed}", tensor
    for pattern, replacement in RULES:
        if match := re.fullmatch(pattern, name):
            ours = match.expand(replacement) if isinstance(replacement, str) else replacement(match)
            if ours.endswith(".scale"):
                return ours, tensor.reshape(())  # (1, 1, 1)
            if ours.startswith("fusion.hdm.queries."):
                return ours, tensor.flatten()  # (1, 1, C)
            return ours, tensor
    return name, tensor


def explain_mismatch(name: str, file_shape: Sequence[int], num_kept: int | None = None) -> str:
    """Why a tensor of a checkpoint does not fit, and what to do; "" where the shapes say it all.

    The fork makes int(N * SPARSE * AGGR) tokens where this project makes floor(ceil(N * SPARSE) * AGGR).

    Args:
        name: of the tensor, as in this project.
        file_shape: the shape that the file has.
        num_kept: patches that the configured SDTPS keeps, K; None without SDTPS.
    """
    if name.endswith(".classifier.weight"):
        return (
            f"the file's classifiers tell {file_shape[0]} identities apart: on another data set they start anew "
            "(SOLVER.REINIT \"['classifier']\")"
        )
    if name == "backbone.cam_embed":
        return (
            f"the file knows {file_shape[0]} cameras, and row i of its embedding belongs to camera i of the data set "
            "that it was trained on: on another one it starts anew (SOLVER.REINIT \"['cam_embed']\")"
        )
    if name == "backbone.vit.pos_embed":
        return (
            f"the file has {file_shape[-2]} positions (patches and class token): it was trained on images of another "
            "size, or with another patch or stride; see INPUT.SIZE_TRAIN, MODEL.TRANSFORMER_TYPE and STRIDE_SIZE"
        )
    tokens = file_shape[0] if re.fullmatch(r"sdtps\.aggregator\.\w+\.fc2\.(weight|bias)", name) else 0
    if num_kept and 0 < tokens <= num_kept:
        return (
            f"the file aggregates {num_kept} kept patches to {tokens} tokens: MODEL.SDTPS_AGGR_RATIO "
            f"{fitting_ratio(tokens, num_kept)} fits it (the fork takes int(N*SPARSE*AGGR), which can be one fewer)"
        )
    return ""


def fitting_ratio(num_aggregated: int, num_kept: int) -> float:
    """The shortest decimal r with floor(num_kept * r) == num_aggregated."""
    for scale in (10**digits for digits in range(1, 10)):
        numerator = math.ceil(Fraction(num_aggregated * scale, num_kept))
        if num_kept * numerator // scale == num_aggregated:
            return numerator / scale
    raise AssertionError("nine digits tell apart any two numbers of patches")
