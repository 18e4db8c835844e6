"""Pretrained weights of the backbone, from whatever file they come in: OpenAI's archive, open_clip, timm, our own.

Every format is first brought to the names of `Backbone` ("vit.*" with timm's names, "proj.weight"), then fitted to its
grid of patches, then compared with what it needs: a backbone is filled completely or loading stops.
"""

import logging
import math
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub
import timm
import torch
from torch import Tensor, nn

from modeling.backbone import Backbone, resize_position_grid
from modeling.torchscript import is_torchscript, read_torchscript
from utils.checkpoint import Mismatch, read_file, refuse_not_finite, state_dict_in
from utils.errors import UserError

logger = logging.getLogger(__name__)

OPENAI_NAMES = [
    (r"class_embedding", r"vit.cls_token"),
    (r"positional_embedding", r"vit.pos_embed"),
    (r"conv1\.(.+)", r"vit.patch_embed.proj.\1"),
    (r"ln_pre\.(.+)", r"vit.norm_pre.\1"),
    (r"ln_post\.(.+)", r"vit.norm.\1"),
    (r"proj", r"proj.weight"),
    (r"transformer\.resblocks\.(\d+)\.ln_([12])\.(.+)", r"vit.blocks.\1.norm\2.\3"),
    (r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(.+)", r"vit.blocks.\1.attn.qkv.\2"),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(.+)", r"vit.blocks.\1.attn.proj.\2"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(.+)", r"vit.blocks.\1.mlp.fc1.\2"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(.+)", r"vit.blocks.\1.mlp.fc2.\2"),
]
"""OpenAI's (and open_clip's) names inside the image tower -> those of `Backbone`."""

NOT_NEEDED = re.compile(r"cam_embed|vit\.(head|head_dist|pre_logits|attn_pool|mask_token)\b.*")
"""What a file may hold beside the backbone without a word: classifiers, pooling heads, the cameras of other data."""


GRID = "grid"
"""An entry beside the weights, (rows, columns): on which grid of patches the position embedding lies."""


def load_pretrained(backbone: Backbone, path: str | Path = "") -> None:
    """Fills every tensor of `backbone` but its camera embedding.

    Args:
        backbone: the model to fill, in place.
        path: OpenAI's TorchScript archive, or a .pt, .pth or .safetensors state dict in the names of OpenAI, open_clip,
            timm or this project. Empty: timm fetches its own weights from the hub.

    Raises:
        UserError: the weights cannot be had, hold another architecture, are not finite, or leave a tensor of the
            backbone unfilled.
    """
    state = read_weights(path) if path else fetch_weights(backbone)
    source = str(path or _hub_id(backbone))
    named = to_backbone_names(state, source)
    if not named:
        raise UserError(
            f"{source}: holds no image transformer (no class token), only {_architecture(state)} in tensors such as "
            f"{', '.join(list(state)[:3])}; the backbone is a {_describe(backbone)}.\n{_way_out(backbone)}"
        )
    fit_to_backbone(named, backbone)

    wanted = {name: tensor for name, tensor in backbone.state_dict().items() if name != "cam_embed"}
    mismatch = Mismatch.between(wanted, named)
    extra = [name for name in mismatch.unexpected if not NOT_NEEDED.fullmatch(name)]
    if backbone.depth_limit:
        extra = [name for name in extra if _block(name) < backbone.depth_limit]
    if mismatch.missing or mismatch.reshaped or any(_block(name) >= 0 for name in extra):
        raise UserError(
            f"{source}: does not fit the backbone, a {_describe(backbone)}; the file holds {_architecture(named)}.\n"
            f"{Mismatch(mismatch.missing, extra, mismatch.reshaped)}\n{_way_out(backbone)}"
        )
    refuse_not_finite({name: named[name] for name in wanted}, source)
    if extra:
        logger.warning("%s: %d tensors are not used: %s", source, len(extra), ", ".join(extra))
    backbone.load_state_dict({name: named[name] for name in wanted}, strict=False)
    logger.info("%s: filled the %d tensors of the backbone", source, len(wanted))


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file of any format that `load_pretrained` takes, half precision promoted to float32.

    A TorchScript archive holds a program, which is not run.
    """
    state = read_torchscript(path) if is_torchscript(path) else state_dict_in(read_file(path), path)
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def fetch_weights(backbone: Backbone) -> dict[str, Tensor]:
    """timm's own pretrained weights of this backbone, at the image size they were trained with.

    Raises:
        UserError: the hub cannot be reached or has no such weights; says which file to get and where to name it.
    """
    constants, offline = huggingface_hub.constants, huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = offline or not _hub_has_address(constants.ENDPOINT)  # its client tries for a minute
        return timm.create_model(backbone.timm_name, pretrained=True).state_dict()
    except Exception as error:  # whatever the network, the hub's client or timm raise, the way out is the same
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"The pretrained weights of {backbone.timm_name} could not be fetched from the hub ({reason}).\n"
            f"{_way_out(backbone)}"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = offline


def _hub_has_address(url: str) -> bool:
    """Whether the hub's name can be resolved; behind a proxy that is not this machine's business."""
    try:
        return bool(getproxies() or socket.getaddrinfo(urlsplit(url).hostname, None))
    except OSError:
        return False


def to_backbone_names(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Picks the image tower out of a state dict read from `source` and renames it to the names of `Backbone`.

    The class token shows where the tower stands ("visual.", "model.visual.trunk.", "backbone.vit.", nothing), so that
    prefixes need no list. Returns an empty dict where there is none.

    Raises:
        UserError: there are several towers.
    """
    tokens = [re.fullmatch(r"(.*?)(class_embedding|cls_token)", name) for name in state]
    towers = [match[1] for match in tokens if match]
    if len(towers) > 1:
        raise UserError(f"{source}: holds several transformers, at {', '.join(towers)}; save one of them alone.")
    if not towers:
        return {}
    prefix = towers[0]
    around = re.sub(r"(vit|trunk)\.$", "", prefix)  # where a timm tower has its projection beside it
    named = {}
    for name, tensor in state.items():
        if name.startswith(prefix):
            renamed, tensor = to_backbone_name(name.removeprefix(prefix), tensor)
            named[renamed] = tensor
        elif name in (f"{around}proj.weight", f"{around}head.proj.weight"):
            named["proj.weight"] = tensor
        elif name == f"{around}{GRID}":
            named[GRID] = tensor
    return named


def to_backbone_name(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """One tensor of an image tower, named by OpenAI or by timm -> the name and the shape that `Backbone` gives it."""
    for pattern, replacement in OPENAI_NAMES:
        if match := re.fullmatch(pattern, name):
            ours = match.expand(replacement)
            if ours == "proj.weight":
                return ours, tensor.T  # OpenAI multiplies from the right: (W, C)
            if ours in ("vit.cls_token", "vit.pos_embed"):
                return ours, tensor.reshape(1, -1, tensor.shape[-1])
            return ours, tensor
    return f"vit.{name}", tensor


def fit_to_backbone(state: dict[str, Tensor], backbone: Backbone) -> None:
    """Resizes the position grid, and takes timm's `head` as the projection where the backbone has one; in place."""
    if isinstance(backbone.proj, nn.Linear) and "proj.weight" not in state and "vit.head.weight" in state:
        state["proj.weight"] = state.pop("vit.head.weight")

    stored = state.pop(GRID, None)
    positions, vit = state.get("vit.pos_embed"), backbone.vit
    if positions is None or vit.pos_embed is None:
        return
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    num_patches = positions.shape[1] - prefix
    old = find_grid(num_patches, backbone.grid) if stored is None else (int(stored[0]), int(stored[1]))
    if old is not None and old != backbone.grid:
        grid = resize_position_grid(positions[0, prefix:], old, backbone.grid)
        state["vit.pos_embed"] = torch.cat([positions[:, :prefix], grid.unsqueeze(0)], dim=1)
        logger.info("position grid resized from %dx%d to %dx%d", *old, *backbone.grid)


def find_grid(num_patches: int, like: tuple[int, int]) -> tuple[int, int] | None:
    """(rows, columns) of a grid whose number of patches alone is known: square, or in the proportions of `like`.

    Public weights are trained on square images, this project's own on images of the proportions it uses.
    """
    if num_patches <= 0:
        return None
    side = math.isqrt(num_patches)
    if side * side == num_patches:
        return side, side
    rows = round(math.sqrt(num_patches * like[0] / like[1]))
    columns = num_patches // max(rows, 1)
    return (rows, columns) if rows * columns == num_patches and rows * like[1] == columns * like[0] else None


def _block(name: str) -> int:
    """Index of the block that a tensor belongs to, -1 outside the blocks."""
    match = re.search(r"\b(?:blocks|resblocks|layers)\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _architecture(state: dict[str, Tensor]) -> str:
    """Width and depth of the transformer in a state dict, in words."""
    widths = [t.shape[0] for name, t in state.items() if t.ndim == 1 and re.search(r"(ln|norm)_?\w*\.weight$", name)]
    depth = 1 + max((_block(name) for name in state), default=-1)
    return f"a transformer of width {widths[0]} with {depth} blocks" if widths and depth else "no transformer"


def _describe(backbone: Backbone) -> str:
    return f"{backbone.timm_name} of width {backbone.width} with {len(backbone.vit.blocks)} blocks"


def _hub_id(backbone: Backbone) -> str:
    return backbone.vit.pretrained_cfg.get("hf_hub_id") or backbone.vit.pretrained_cfg.get("url") or ""


def _way_out(backbone: Backbone) -> str:
    hub_id = _hub_id(backbone)
    url = f"https://huggingface.co/{hub_id}/resolve/main/model.safetensors" if "://" not in hub_id else hub_id
    lines = ["What to do:"]
    if hub_id:
        lines.append(f"  - download {url} (for example to weights/{backbone.timm_name}.safetensors)")
    if backbone.timm_name.startswith("vit_base_patch16_clip") and backbone.timm_name.endswith(".openai"):
        lines.append("    or OpenAI's own ViT-B-16.pt")
    lines.append(
        "  - set MODEL.PRETRAIN_PATH_T to the path of the file, and MODEL.TRANSFORMER_TYPE to its architecture"
    )
    lines.append("  - or set MODEL.PRETRAINED False, to start from random weights on purpose")
    return "\n".join(lines)
