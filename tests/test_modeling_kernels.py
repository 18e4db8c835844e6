"""The kernels under Triton's interpreter, against torch's operations and timm's blocks, and their gradients."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from modeling.kernels.attention import prefix_for
from modeling.kernels.residual import draw_kept

ATTENTION = """
import torch
import torch.nn.functional as F
from modeling.kernels import attention as a

for B, N, H, D, P in [(3, 32, 2, 16, 1), (1, 128, 2, 64, 1), (1, 64, 1, 32, 5)]:
    torch.manual_seed(0)
    qkv = torch.randn(B, P + N, 3 * H * D, requires_grad=True)
    grad_out = torch.randn(B, P + N, H * D)
    q, k, v = qkv.view(B, P + N, 3, H, D).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, P + N, H * D)
    expected.backward(grad_out)
    out = torch.full_like(expected.detach(), float("nan"))
    grad = torch.full_like(qkv.detach(), float("nan"))
    sizes = a._sizes(qkv, H, P)
    a._attend_kernel[(H, B)](qkv.detach(), out, **sizes, R=min(a.QUERIES, N))
    a._gradient_kernel[(2,)](qkv.detach(), grad_out, grad, B * H, **sizes, AHEAD=3)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, qkv.grad, rtol=1e-4, atol=1e-5)
"""

BLOCKS = """
import torch
from timm.layers import QuickGELU
from timm.models.vision_transformer import Block
import modeling.fused_blocks as fused
from modeling.backbone import use_drop_path
from modeling.kernels import activation, linear, residual

residual.PROGRAMS = 7
linear.ROWS, linear.COLUMNS, linear.CHUNK = 8, 64, 4
activation.FORWARD = activation.BACKWARD = {"ROWS": 8, "C": 32, "R": 4}
draw, kept = fused.draw_kept, []
fused.draw_kept = lambda *args: kept.extend(draw(*args)) or kept

NONE, SOME = (0.0, 0.0), (0.0, 0.3)  # a block that all images pass stands before one that some skip
for act, rates in ((QuickGELU, NONE), (torch.nn.GELU, NONE), (QuickGELU, SOME)):
    torch.manual_seed(0)
    kept.clear()
    blocks = torch.nn.ModuleList([Block(48, 3, qkv_bias=True, act_layer=act, drop_path=rate) for rate in rates])
    use_drop_path(torch.nn.ModuleDict({"blocks": blocks}))
    assert all(fused._is_known(block) for block in blocks)
    for p in blocks.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, grad = torch.randn(5, 7, 48, requires_grad=True), torch.randn(5, 7, 48)
    leaves = [x, *blocks.parameters()]

    out = fused.run_blocks(blocks, x)
    found = torch.autograd.grad(out, leaves, grad)

    assert [k.count for k in kept] == [5, 5, 5, 5] if rates == NONE else [5, 5, 3, 3]
    expected = x
    for i, k in enumerate(kept):
        block = blocks[i // 2]
        branch = block.mlp(block.norm2(expected)) if i % 2 else block.attn(block.norm1(expected))
        there = (k.order < k.count) * 5 / k.count
        expected = expected + there[:, None, None] * branch
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(found, torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
"""


@pytest.mark.parametrize("check", [ATTENTION, BLOCKS], ids=["attention", "blocks"])
def test_kernels_agree_with_torch(check):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": "."}
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize(
    ("tokens", "head_dim", "prefix"), [(129, 64, 1), (66, 64, 2), (48, 64, 16), (128, 64, 0), (92, 64, 0), (129, 24, 0)]
)
def test_tokens_beyond_a_power_of_two_are_prefix(tokens, head_dim, prefix):
    assert prefix_for(tokens, head_dim) == prefix


def test_every_image_skips_a_branch_as_often_and_independently_of_the_next():
    torch.manual_seed(0)
    draws, size = 4000, 8
    skips = torch.zeros(draws, 2, size)
    for i in range(draws):
        kept = draw_kept(size, [0.0, 0.25, 0.25], torch.device("cpu"))
        assert [k.count for k in kept] == [8, 6, 6] and kept[1].scale == pytest.approx(8 / 6)
        assert all(k.order.sort().values.tolist() == list(range(size)) for k in kept)
        skips[i] = torch.stack([k.order >= k.count for k in kept[1:]]).float()
    spread = 4 * (0.25 * 0.75 / draws) ** 0.5
    torch.testing.assert_close(skips.mean(0), torch.full((2, size), 0.25), rtol=0, atol=spread)
    together = (skips[:, 0] * skips[:, 1]).mean(0)
    torch.testing.assert_close(together, torch.full((size,), 0.0625), rtol=0, atol=4 * (0.0625 / draws) ** 0.5)


def test_at_least_one_image_stays():
    assert [k.count for k in draw_kept(2, [0.9, 0.2], torch.device("cpu"))] == [1, 2]
