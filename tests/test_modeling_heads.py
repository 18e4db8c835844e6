"""The classification head, and its product for any number of identities."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

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


@pytest.mark.parametrize(
    ("ids", "half", "device", "outputs"),
    [
        (171, True, "cuda", 176),
        (7, True, "cuda", 8),
        (176, True, "cuda", 176),
        (171, False, "cuda", 171),
        (171, True, "cpu", 171),
    ],
)
def test_outputs_are_filled_up_in_half_precision_on_cuda(monkeypatch, products, ids, half, device, outputs):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: half)
    with FakeTensorMode(), torch.device(device):  # tensors of no card
        logits = Classifier(16, ids)(torch.empty(4, 16))
    assert products == [(outputs, 16)] and logits.shape == (4, ids)


@pytest.mark.parametrize("ids", [1, 7, 8, 171])
def test_they_do_not_change_the_logits_nor_any_gradient(monkeypatch, products, ids):
    class OnCard(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    torch.manual_seed(0)
    layer = Classifier(5, ids).double()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    found, expected = layer(x.as_subclass(OnCard)).as_subclass(torch.Tensor), x @ layer.weight.T
    assert products == ([(-(-ids // 8) * 8, 5)] if ids % 8 else [(ids, 5)])
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
