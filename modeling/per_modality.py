"""Layers of which each modality has its own, applied to all of them at once: one batched operation instead of three."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear(layers: Iterable[nn.Linear], x: Tensor) -> Tensor:
    """Each modality's own layer, (M, ..., C) -> (M, ..., D), as one batched product."""
    layers = list(layers)
    out = x.flatten(1, -2) @ torch.stack([layer.weight for layer in layers]).transpose(1, 2)
    if layers[0].bias is not None:
        out = out + torch.stack([layer.bias for layer in layers]).unsqueeze(1).to(out.dtype)
    return out.unflatten(1, x.shape[1:-1])


def layer_norm(layers: Iterable[nn.LayerNorm], x: Tensor) -> Tensor:
    """Each modality's own layer, (M, ..., C) -> (M, ..., C)."""
    layers = list(layers)
    shape = (len(layers), *[1] * (x.dim() - 2), x.shape[-1])
    weight, bias = (torch.stack([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    return F.layer_norm(x, x.shape[-1:], eps=layers[0].eps) * weight.view(shape) + bias.view(shape)
