"""Each kernel, under Triton's interpreter (see conftest), against torch's operations, and all of them compiled."""

import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from timm.layers.activations import QuickGELU
from torch import nn

from modeling.kernels import activation, attention, embedding, residual
from modeling.kernels import linear as linear_kernels
from modeling.kernels.activation import activated_linear
from modeling.kernels.attention import prefix_for, tiled_attention
from modeling.kernels.biases import tied_biases
from modeling.kernels.embedding import embed_tokens
from modeling.kernels.linear import linear
from modeling.kernels.residual import Branch, Kept, add_branch, draw_kept, layer_norm, norm_for
from utils import kernels
from utils.kernels import build_together, has_triton, trial, triton

pytestmark = pytest.mark.skipif(not has_triton(), reason="no Triton, or an old one: the kernels are not used")

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Sizes that do not divide what the tests give them, and few programs, of which each is slow to interpret."""
    torch.manual_seed(0)
    monkeypatch.setattr(residual, "PROGRAMS", 3)
    monkeypatch.setattr(embedding, "PARTS", 2)
    monkeypatch.setattr(linear_kernels, "SUM", {"ROWS": 16, "C": 256, "R": 8})
    monkeypatch.setattr(activation, "FORWARD", {"ROWS": 16, "C": 32, "R": 8})
    monkeypatch.setattr(activation, "BACKWARD", {"ROWS": 16, "C": 32, "R": 8})


def agree(found, expected, leaves, rtol=1e-4):
    """Outputs, and gradients of `leaves` for one random gradient of the output."""
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)
    grad = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.abs().max().item())


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


@pytest.mark.parametrize(("images", "patches", "heads", "width", "prefix"), [(3, 32, 2, 16, 1), (1, 128, 1, 32, 5)])
def test_attention(images, patches, heads, width, prefix):
    qkv = leaf(images, prefix + patches, 3 * heads * width)
    q, k, v = qkv.unflatten(2, (3, heads, width)).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    agree(tiled_attention(qkv, heads, prefix), expected, [qkv])


def test_attention_s_gradient_by_programs_that_stay():
    qkv, grad_out = leaf(3, 33, 96), torch.randn(3, 33, 32)
    (expected,) = torch.autograd.grad(tiled_attention(qkv, 2, 1), qkv, grad_out)
    grad = torch.full_like(expected, float("nan"))
    sizes = {"P": 1, "N": 32, "H": 2, "D": 16, "AHEAD": 3}
    attention._gradient_kernel[(4,)](qkv.detach(), grad_out, grad, 6, 16**-0.5, **sizes)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize(
    ("tokens", "head_dim", "prefix"), [(129, 64, 1), (66, 64, 2), (48, 64, 16), (128, 64, 0), (92, 64, 0), (129, 24, 0)]
)
def test_tokens_beyond_a_power_of_two_are_prefix(tokens, head_dim, prefix):
    assert prefix_for(tokens, 2, head_dim, torch.bfloat16, CPU) == prefix


@pytest.mark.parametrize(("most", "found"), [(3, 3), (2, 1), (1, 1), (0, 0)])
def test_a_card_with_less_shared_memory_fetches_less_far_ahead_or_leaves_attention_to_torch(monkeypatch, most, found):
    def attempt(ahead):
        if ahead > most:
            raise triton.runtime.errors.OutOfResources(ahead, most, "shared memory")

    assert attention.first_that_fits(attempt) == found
    monkeypatch.setattr(attention, "images_at_once", lambda *args: found)
    assert prefix_for(129, 12, 64, torch.bfloat16, CPU) == (1 if found else 0)


def test_how_far_ahead_it_fetches_is_found_beside_other_builds(monkeypatch):
    tried = []

    def found(*args):
        tried.append((*args, threading.get_ident()))
        return 1

    monkeypatch.setattr(attention, "images_at_once", found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    qkv = torch.randn(2, 33, 3 * 16, dtype=torch.bfloat16, requires_grad=True)

    def run():
        with trial(CPU):
            tiled_attention(qkv, 1, prefix_for(33, 1, 16, qkv.dtype, CPU)).sum().backward()

    build_together(run)
    ((*known, thread),) = tried
    assert known == [33, 1, 1, 16, qkv.dtype, CPU] and thread != threading.get_ident()
    run()
    assert [others[-1] for others in tried[1:]] == 2 * [threading.get_ident()]


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias):
    x, weight = leaf(3, 7, 12), leaf(20, 12)
    biases = [leaf(20)] if bias else []
    agree(linear(x, weight, *biases), F.linear(x, weight, *biases), [x, weight, *biases])


@pytest.mark.parametrize(("rows", "parts"), [(6, 2), (9, 3), (7, 1), (3, 1)])
def test_gradients_of_few_weights_are_made_in_parts_of_many_rows(monkeypatch, rows, parts):
    monkeypatch.setattr(linear_kernels, "MANY_ROWS", 6)
    monkeypatch.setattr(linear_kernels, "FEW_WEIGHTS", 20 * 12)
    batches = []
    monkeypatch.setattr(torch.Tensor, "sum", lambda x, *dims: batches.append(len(x)) or torch.sum(x, *dims))
    grad_out, more, x = (torch.randn(rows, n, dtype=torch.float64) for n in (20, 21, 12))
    found = linear_kernels.weight_gradient(grad_out, x, torch.float64)
    torch.testing.assert_close(found, torch.einsum("mw,mv->wv", grad_out, x))
    assert batches == ([parts] if parts > 1 else [])
    linear_kernels.weight_gradient(more, x, torch.float64)
    linear_kernels.weight_gradient(grad_out[None], x[None], torch.float64)  # a batch of one, which is in parts already
    assert len(batches) == (parts > 1)


@pytest.mark.parametrize("act", [QuickGELU(), nn.GELU()])
def test_activated_linear(act):
    hidden, bias, weight = leaf(3, 7, 40), leaf(40), leaf(12, 40)
    for keep in (False, True):
        found = activated_linear(hidden, bias, weight, act, keep=keep)
        agree(found, act(hidden + bias) @ weight.T, [hidden, bias, weight])


@pytest.mark.parametrize("normed", [True, False])
def test_embedding(normed):
    patches, class_tokens, positions = leaf(5, 6, 20), leaf(5, 20), leaf(7, 20)
    norm = nn.LayerNorm(20, eps=1e-3) if normed else None
    leaves = [patches, class_tokens, positions]
    expected = torch.cat([class_tokens[:, None], patches], dim=1) + positions
    if norm is not None:
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
        expected, leaves = norm(expected), leaves + list(norm.parameters())
    agree(embed_tokens(patches, class_tokens, positions, norm, torch.float32), expected, leaves)


def random_norm(width):
    norm = nn.LayerNorm(width, eps=1e-3)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def taken(x, kept):
    """The images of x that a branch keeps, in the branch's order."""
    return torch.stack([x[image] for image in kept.order.argsort().tolist()[: kept.count]])


@pytest.mark.parametrize("counts", [(5, 5), (5, 3), (3, 5), (2, 3)])
def test_residual_and_norm(counts):
    """Whatever stands before and behind: branches that all images pass, and such as some skip."""
    x, bias, norm = leaf(5, 3, 20), leaf(20), random_norm(20)
    own, following = (Kept(torch.randperm(5).int() if n < 5 else torch.arange(5).int(), n) for n in counts)
    out = leaf(own.count, 3, 20)
    leaves = [x, out, bias, *norm.parameters()]

    def expected():
        there = torch.zeros(5, 3, 20).index_add(0, own.order.argsort()[: own.count], out + bias)
        total = x + 5 / own.count * there * (own.order < own.count)[:, None, None]
        return total, taken(norm(total), following)

    def found():
        return norm_for(x, norm, following, Branch(out, bias, own))

    agree(found()[1], expected()[1], leaves)
    agree(*(2 * total.sum() + normed.square().sum() for total, normed in (found(), expected())), leaves)
    agree(add_branch(x, Branch(out, bias, own)), expected()[0], leaves[:3])


def test_norm_by_itself():
    x, norm = leaf(5, 3, 20), random_norm(20)
    agree(layer_norm(x, norm), norm(x), [x, *norm.parameters()])


def test_every_image_skips_a_branch_as_often_and_independently_of_the_next():
    draws, size = 4000, 8
    skips = torch.zeros(draws, 2, size)
    for i in range(draws):
        kept = draw_kept(size, [0.0, 0.25, 0.25], CPU)
        assert [k.count for k in kept] == [8, 6, 6] and kept[1].scale == pytest.approx(8 / 6)
        assert kept[0].order.tolist() == list(range(size))
        assert all(k.order.sort().values.tolist() == list(range(size)) for k in kept)
        skips[i] = torch.stack([k.order >= k.count for k in kept[1:]]).float()
    spread = 4 * (0.25 * 0.75 / draws) ** 0.5
    torch.testing.assert_close(skips.mean(0), torch.full((2, size), 0.25), rtol=0, atol=spread)
    together = (skips[:, 0] * skips[:, 1]).mean(0)
    torch.testing.assert_close(together, torch.full((size,), 0.0625), rtol=0, atol=4 * (0.0625 / draws) ** 0.5)


def test_at_least_one_image_stays():
    assert [k.count for k in draw_kept(2, [0.9, 0.2], CPU)] == [1, 2]


@pytest.mark.parametrize(
    ("architecture", "files", "kernels", "there_is"),
    [("80", [], 16, 163 * 1024), ("90", ["attention", "selection"], 6, 227 * 1024)],
    ids=["A100", "H100"],
)
def test_every_kernel_of_a_step_compiles_and_finds_its_shared_memory(architecture, files, kernels, there_is):
    """Without a card: what a pass of ViT-B/16 and SDTPS would launch is recorded and compiled for an architecture."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": "."}
    command = [sys.executable, "-m", "tests.compiled_kernels", architecture, *files]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    shared = {name: int(used) for name, used in (line.split() for line in result.stdout.splitlines())}
    assert len(shared) == kernels and max(shared.values()) <= there_is, shared


@pytest.mark.parametrize("columns", [90, 30])
def test_columns_are_summed_up_also_where_their_rows_lie_apart(columns):
    x = torch.randn(40, 90)[:, :columns]
    torch.testing.assert_close(linear_kernels.column_sums(x), x.sum(0))


def test_a_layer_may_give_the_beginning_of_its_bias_alone_a_gradient():
    x, weight, bias = leaf(5, 16), leaf(24, 16), leaf(24)
    out = linear(x, weight, bias[:8], (weight.detach(), bias.detach()))
    agree(out, x @ weight.T + torch.cat([bias[:8], bias[8:].detach()]), [x, weight, bias])


def test_the_gradients_of_attention_s_biases_come_from_those_of_queries_and_output():
    """Two blocks side by side, whose tokens each go through attention, layer and bias; against autograd as written."""
    width, images, tokens = 48, 2, 9
    qkv_biases, proj_biases = [leaf(3 * width) for _ in range(2)], [leaf(width) for _ in range(2)]
    weights, x = torch.randn(2, width, width), torch.randn(2, images, tokens, 3 * width)

    def attended(i, qkv, bias):
        q, k, v = qkv.unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) @ weights[i].T + bias

    queries, outs = tied_biases(qkv_biases, proj_biases, weights)
    found, expected = [], []
    for i, (whole, query, out) in enumerate(zip(qkv_biases, queries, outs, strict=True)):
        others = torch.cat([query, whole[width:].detach()])
        found.append(attended(i, x[i] + others, out))
        expected.append(attended(i, x[i] + whole, proj_biases[i]))
    agree(torch.stack(found), torch.stack(expected), [*qkv_biases, *proj_biases], rtol=1e-4)


def test_parts_of_any_shape_are_summed_up():
    parts = torch.randn(300, 3, 50)  # more than are taken at a time
    torch.testing.assert_close(linear_kernels.sum_parts(parts), parts.sum(0))


def test_attention_in_half_precision():
    qkv = (0.5 * torch.randn(2, 33, 96)).half().requires_grad_()
    found = tiled_attention(qkv, 2, 1)
    wide = qkv.detach().float().requires_grad_()
    q, k, v = wide.unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=2e-3)
    (a,), (b,) = torch.autograd.grad(found, qkv, grad.half()), torch.autograd.grad(expected, wide, grad)
    torch.testing.assert_close(a.float(), b, rtol=0, atol=4e-3)


@pytest.mark.parametrize(("version", "can"), [("3.2.0", False), ("3.3.1", True), ("4.0.0", True)])
def test_kernels_need_a_triton_that_compiles_them(monkeypatch, caplog, version, can):
    monkeypatch.setattr(triton, "__version__", version)
    kernels.has_triton.cache_clear()
    assert kernels.can_launch(torch.device("cuda")) is (can and torch.version.hip is None)
    assert ("Triton is 3.2.0, and 3.3 (torch 2.7) is needed" in caplog.text) is not can
    kernels.has_triton.cache_clear()


def test_attention_that_fails_is_left_to_torch(caplog):
    def attempt(ahead):
        raise RuntimeError("ptxas fatal\nno such card")

    assert attention.first_that_fits(attempt) == 0
    assert "attention is left to torch: RuntimeError: no such card" in caplog.text


def test_kernels_that_could_not_be_tried_for_want_of_memory_are_not_given_up():
    def errors():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        kernels.proven(errors, "slow")
