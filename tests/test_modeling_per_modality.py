"""Layers for all modalities at once against each modality's own layer."""

import pytest
import torch
from torch import nn

from modeling.per_modality import layer_norm, linear

M, C, D = 3, 6, 4


def layers(kind, *args, **kwargs):
    torch.manual_seed(0)
    made = [kind(*args, **kwargs) for _ in range(M)]
    for parameter in (p for layer in made for p in layer.parameters()):
        nn.init.normal_(parameter)
    return made


@pytest.mark.parametrize("shape", [(5,), (2, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_each_modality_s_own(shape, bias):
    own, x = layers(nn.Linear, C, D, bias=bias), torch.randn(M, *shape, C)
    torch.testing.assert_close(linear(own, x), torch.stack([layer(part) for layer, part in zip(own, x, strict=True)]))


@pytest.mark.parametrize("shape", [(5,), (2, 5)])
def test_layer_norm_is_each_modality_s_own(shape):
    own, x = layers(nn.LayerNorm, C, eps=1e-3), torch.randn(M, *shape, C)
    expected = torch.stack([layer(part) for layer, part in zip(own, x, strict=True)])
    torch.testing.assert_close(layer_norm(own, x), expected)


def test_under_autocast_products_stay_in_half_precision_as_in_torch_s_own_layer():
    own, x = layers(nn.Linear, C, D), torch.randn(M, 5, C)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(own, x).dtype == own[0](x[0]).dtype == torch.bfloat16
