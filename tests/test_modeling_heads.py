"""The classification head, and its product for any number of identities."""

import pytest
import torch

from modeling.heads import BNNeck, aligned_linear


@pytest.mark.parametrize("ids", [1, 7, 8, 171])
def test_aligned_product_is_the_product(ids):
    torch.manual_seed(0)
    x, weight = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (3, ids))
    found, expected = aligned_linear(x, weight), x @ weight.T
    assert found.shape == (3, ids)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight), grad) for y in (found, expected)), strict=True):
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
