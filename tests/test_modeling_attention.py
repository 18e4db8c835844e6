"""The attention kernels under Triton's interpreter, against torch's attention and its gradient."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CHECK = """
import torch
import torch.nn.functional as F
from modeling import attention as a

for B, N, H, D, P in [(2, 32, 2, 16, 1), (1, 128, 2, 64, 1), (1, 64, 1, 32, 5)]:
    torch.manual_seed(0)
    qkv = torch.randn(B, P + N, 3 * H * D, requires_grad=True)
    grad_out = torch.randn(B, P + N, H * D)
    q, k, v = qkv.view(B, P + N, 3, H, D).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, P + N, H * D)
    expected.backward(grad_out)
    out = torch.full_like(expected.detach(), float("nan"))
    grad = torch.full_like(qkv.detach(), float("nan"))
    a._attend_kernel[(H, B)](qkv.detach(), out, **a._sizes(qkv, H, P))
    a._gradient_kernel[(H, B)](qkv.detach(), grad_out, grad, **a._sizes(qkv, H, P))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, qkv.grad, rtol=1e-4, atol=1e-5)
"""


def test_kernels_agree_with_torch():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": "."}
    result = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
