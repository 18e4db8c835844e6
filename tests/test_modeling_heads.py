"""The classification head, and its product for any number of identities."""

import pytest
import torch
import torch.nn.functional as F

from modeling.heads import BNNeck, Classifier


@pytest.fixture
def products(monkeypatch):
    """Shapes of the weights that `linear` is called with."""
    shapes = []

    def noted(x, weight, bias=None):
        shapes.append(tuple(weight.shape))
        return torch.matmul(x, weight.T)

    monkeypatch.setattr(F, "linear", noted)
    return shapes


class OnCard(torch.Tensor):
    """Says so."""

    is_cuda = True


@pytest.mark.parametrize(
    ("ids", "half", "cuda", "outputs"),
    [
        (171, True, True, 176),
        (7, True, True, 8),
        (1, True, True, 8),
        (176, True, True, 176),
        (171, False, True, 171),
        (171, True, False, 171),
    ],
)
def test_outputs_are_filled_up_in_half_precision_on_cuda_and_nobody_sees_it(
    monkeypatch, products, ids, half, cuda, outputs
):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: half)
    torch.manual_seed(0)
    layer = Classifier(5, ids).double()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    found, expected = layer(x.as_subclass(OnCard if cuda else torch.Tensor)), x @ layer.weight.T
    assert products == [(outputs, 5)]
    found = found.as_subclass(torch.Tensor)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(y, (x, layer.weight), grad) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_neck_normalises_without_shift_and_classifies_what_comes_of_it():
    torch.manual_seed(0)
    neck = BNNeck(5, 3)
    feature = 4 + 2 * torch.randn(64, 5)
    normalised, logits = neck(feature)
    expected = (feature - feature.mean(0)) / (feature.var(0, correction=0) + neck.bottleneck.eps).sqrt()
    torch.testing.assert_close(normalised, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, normalised @ neck.classifier.weight.T)
    assert not neck.bottleneck.bias.requires_grad and neck.classifier.bias is None
