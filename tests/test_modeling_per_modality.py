"""Layers for all modalities at once against each modality's own layer."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from modeling import per_modality, precision
from modeling.kernels import linear as kernels_linear
from modeling.per_modality import linear, norm_linear

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
def test_norm_and_linear_are_each_modality_s_own(shape):
    norms, own, x = layers(nn.LayerNorm, C, eps=1e-3), layers(nn.Linear, C, D), torch.randn(M, *shape, C)
    expected = torch.stack([layer(norm(part)) for norm, layer, part in zip(norms, own, x, strict=True)])
    found = norm_linear(norms, own, x)
    torch.testing.assert_close(found, expected)
    parameters = [p for layer in norms + own for p in layer.parameters()]
    grad = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, parameters, grad), torch.autograd.grad(expected, parameters, grad), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("many", [0, 100])
@pytest.mark.parametrize("rows", [6, 7])  # by parts of half of them; 7 cannot be divided
def test_gradients_as_on_a_gpu_are_the_gradients(monkeypatch, rows, many):
    """In parts of the rows from `many` on."""
    monkeypatch.setattr(kernels_linear, "MANY_ROWS", many)
    monkeypatch.setattr(kernels_linear, "PARTS", 2)
    x, weight = torch.randn(M, rows, C, requires_grad=True), torch.randn(M, D, C, requires_grad=True)
    expected, found = x @ weight.mT, per_modality._Rows.apply(x, weight, torch.float32)
    grad, leaves = torch.randn(M, rows, D), [x, weight]
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b)
        assert a.is_contiguous()


def test_products_as_on_a_gpu_in_half_precision_leave_gradients_in_the_types_of_what_they_belong_to():
    x, weight = torch.randn(M, 5, C, requires_grad=True), torch.randn(M, D, C, requires_grad=True)
    found = per_modality._Rows.apply(x, weight, torch.bfloat16)
    assert found.dtype is torch.bfloat16
    for a, b in zip(
        torch.autograd.grad(found.sum(), [x, weight]),
        torch.autograd.grad((x @ weight.mT).sum(), [x, weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_gradients_of_products_are_as_exact_as_these(monkeypatch):
    """Whatever holds when they are computed; afterwards that holds again."""
    used = []

    @contextmanager
    def watch(exactness):
        with within(exactness):
            used.append(torch.get_float32_matmul_precision())
            yield

    within = precision.matmul_precision
    for module in (precision, per_modality):
        monkeypatch.setattr(module, "matmul_precision", watch)
    a, b = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 4, 5, requires_grad=True)
    x, weight = torch.randn(M, 5, C, requires_grad=True), torch.randn(M, D, C, requires_grad=True)
    with within("high"):
        found = precision.product(a, b), per_modality._Rows.apply(x, weight, torch.float32)
    assert torch.get_float32_matmul_precision() == "highest" and not used
    for out, expected, leaves in zip(found, (a @ b, x @ weight.mT), ([a, b], [x, weight]), strict=True):
        grad = torch.randn_like(out)
        for p, q in zip(
            torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
        ):
            torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-2)
    assert used == ["high", "high"] and torch.get_float32_matmul_precision() == "highest"


def test_under_autocast_products_stay_in_half_precision_as_in_torch_s_own_layer():
    own, x = layers(nn.Linear, C, D), torch.randn(M, 5, C)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(own, x).dtype == own[0](x[0]).dtype == torch.bfloat16
