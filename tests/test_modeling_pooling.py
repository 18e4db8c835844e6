"""The poolings behind SDTPS: from the tokens of each modality to one vector."""

import pytest
import torch
import torch.nn.functional as F

from modeling import fused_vit
from modeling.pooling import POOLS, TOKEN_POOLS, make_pool, make_token_pool
from utils.kernels import has_triton

M, B, T, C = 3, 4, 5, 16


def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(M, B, T, C, generator=generator), torch.randn(M, B, C, generator=generator)


def pool(kind):
    torch.manual_seed(1)
    module = make_pool(kind, C)
    for name, p in module.named_parameters():
        if name.endswith("query"):  # starts at zero, as the mean
            torch.nn.init.normal_(p)
    return module


def test_mean_pooling_makes_the_aggregation_one_average():
    """Why SDTPS_POOL is not the mean by default: mean(W v) = mean(W) v, the others are not linear in W."""
    tokens = torch.rand(2, 5, 16, generator=torch.Generator().manual_seed(0)) + 0.1
    weight = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(1)).softmax(-1)
    for kind in TOKEN_POOLS:
        torch.manual_seed(2)
        module = make_token_pool(kind, 16)
        if kind == "attention":
            torch.nn.init.normal_(module.query)
        pooled, collapsed = module(weight @ tokens), weight.mean(1, keepdim=True) @ tokens
        assert torch.allclose(pooled, collapsed.squeeze(1), atol=1e-5) == (kind == "mean")


@pytest.mark.parametrize("kind", POOLS)
def test_only_cross_lets_modalities_meet(kind):
    tokens, class_tokens = inputs()
    module, other = pool(kind), tokens.clone()
    other[1] = -other[1]
    before, after = module(tokens, class_tokens), module(other, class_tokens)
    assert before.shape == (M, B, C)
    assert not torch.allclose(before[1], after[1], atol=1e-4)
    assert torch.allclose(before[0], after[0], atol=1e-4) == (kind != "cross")


def test_reduce_is_what_global_local_does_with_the_attended_tokens():
    tokens, class_tokens = inputs()
    module = pool("reduce")
    own, layers = module.own["NI"], module.reduce["NI"]
    heads, width = own.query.shape
    for b in range(B):
        local = torch.cat(
            [
                (tokens[1, b, :, h * width : (h + 1) * width] @ own.query[h] * width**-0.5).softmax(0)
                @ tokens[1, b, :, h * width : (h + 1) * width]
                for h in range(heads)
            ]
        )
        pair = F.layer_norm(torch.cat([class_tokens[1, b], local]), (2 * C,))
        x = layers.linear.weight @ pair + layers.linear.bias
        torch.testing.assert_close(module(tokens, class_tokens)[1, b], x * torch.sigmoid(1.702 * x))


def test_cross_is_a_transformer_layer_over_all_tokens():
    """Against torch's own layer of the same weights."""
    tokens, class_tokens = inputs()
    module = pool("cross")
    block = module.block
    layer = torch.nn.TransformerEncoderLayer(
        C, block.attn.num_heads, 2 * C, dropout=0, activation="gelu", batch_first=True, norm_first=True
    )
    names = {
        "self_attn.in_proj_weight": block.attn.qkv.weight,
        "self_attn.in_proj_bias": block.attn.qkv.bias,
        "self_attn.out_proj.weight": block.attn.proj.weight,
        "self_attn.out_proj.bias": block.attn.proj.bias,
        **{f"{a}.{kind}": getattr(b, kind) for kind in ("weight", "bias") for a, b in _layers(block)},
    }
    layer.load_state_dict(names)
    layer.norm1.eps, layer.norm2.eps = block.norm1.eps, block.norm2.eps
    x = torch.cat([torch.cat([class_tokens[i, :, None], tokens[i]], 1) + module.modality[i] for i in range(M)], 1)
    y = layer(x)
    for i, (name, layers) in enumerate(module.reduce.items()):
        own = y[:, i * (T + 1) : (i + 1) * (T + 1)]
        x = layers.linear(layers.norm(torch.cat([own[:, 0], own[:, 1:].mean(1)], dim=-1)))
        expected = x * torch.sigmoid(1.702 * x)
        torch.testing.assert_close(module(tokens, class_tokens)[i], expected, msg=name)


def _layers(block):
    return ("linear1", block.mlp.fc1), ("linear2", block.mlp.fc2), ("norm1", block.norm1), ("norm2", block.norm2)


@pytest.mark.parametrize("fused", [True, False])
def test_cross_does_not_look_at_an_absent_modality(fused):
    tokens, class_tokens = inputs()
    module = pool("cross")
    module.block.attn.fused_attn = fused  # timm's own attention, which a fully masked row turns into NaN
    present = torch.tensor([[True, True, True], [True, False, True], [False, True, False], [False, False, False]])
    out = module(tokens, class_tokens, present)
    assert out.isfinite().all()
    for b in range(3):
        strange = tokens.clone()
        strange[~present[b], b] = 100.0
        torch.testing.assert_close(module(strange, class_tokens, present)[present[b], b], out[present[b], b])
    everything = torch.ones(B, M, dtype=torch.bool)
    torch.testing.assert_close(module(tokens, class_tokens, everything), module(tokens, class_tokens))
    torch.testing.assert_close(out[:, 0], module(tokens, class_tokens)[:, 0])
    assert not torch.allclose(out[0, 1], module(tokens, class_tokens)[0, 1])


def test_an_unknown_pooling_is_named_with_those_that_there_are():
    with pytest.raises(ValueError, match="'max'.*mean, gem, attention, transformer, reduce, cross"):
        make_pool("max", C)


@pytest.mark.skipif(not has_triton(), reason="no Triton, or an old one: the kernels are not used")
@pytest.mark.parametrize("present", [None, torch.tensor([[True, True, False]] * 2)])
def test_a_fused_layer_of_cross_is_the_one_as_written(monkeypatch, present):
    """Where modalities are missing, the layer has a mask, which no kernel knows."""
    calls = []
    monkeypatch.setattr(fused_vit, "can_fuse", lambda *args: calls.append(args) or True)
    torch.manual_seed(0)
    module, tokens, class_tokens = make_pool("cross", 32), torch.randn(M, 2, 3, 32), torch.randn(M, 2, 32)
    results = []
    for fused in (False, True):
        module.fused = fused
        out = module(tokens, class_tokens, present)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(module.parameters()))])
    assert [call[3] for call in calls] == [torch.float32] * (present is None)  # the type that the kernels are tried in
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
