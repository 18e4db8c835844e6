"""A ViT chained of kernels, under Triton's interpreter, against timm's blocks; where it is used, and where not."""

import functools
import logging

import pytest
import torch
from timm.layers.activations import QuickGELU
from timm.models.vision_transformer import Block, ParallelThingsBlock
from torch import nn

from modeling import fused_vit
from modeling.backbone import Backbone
from modeling.block_parts import use_drop_path
from modeling.fused_vit import Kind, can_embed, kernels_agree, kind_of, relative_errors, run_blocks
from modeling.kernels import activation, attention, biases, embedding, linear, residual
from modeling.kernels.residual import Kept, draw_kept
from utils.kernels import has_triton

pytestmark = pytest.mark.skipif(not has_triton(), reason="no Triton, or an old one: the kernels are not used")

CPU = torch.device("cpu")
SMALL = Kind(width=16, hidden=40, heads=1, qkv_bias=True, quick=True)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    monkeypatch.setattr(residual, "PROGRAMS", 3)
    monkeypatch.setattr(linear, "SUM", {"ROWS": 128, "C": 256, "R": 64})
    monkeypatch.setattr(activation, "FORWARD", {"ROWS": 64, "C": 64, "R": 64})
    monkeypatch.setattr(activation, "BACKWARD", {"ROWS": 64, "C": 64, "R": 64})


@pytest.mark.parametrize(("act", "rates"), [(QuickGELU, (0.0, 0.0)), (nn.GELU, (0.0, 0.3))])
def test_blocks_are_timm_s(monkeypatch, act, rates):
    """Also where a block that all images pass stands before one that some skip."""
    torch.manual_seed(0)
    blocks = nn.ModuleList([Block(48, 3, qkv_bias=True, act_layer=act, drop_path=rate) for rate in rates])
    use_drop_path(nn.ModuleDict({"blocks": blocks}))
    for p in blocks.parameters():
        nn.init.normal_(p, std=0.2)
    kept = []
    monkeypatch.setattr(fused_vit, "draw_kept", lambda *args: kept.extend(draw_kept(*args)) or kept)
    x, grad = torch.randn(5, 7, 48, requires_grad=True), torch.randn(5, 7, 48)
    leaves = [x, *blocks.parameters()]
    out = run_blocks(blocks, x)
    found = torch.autograd.grad(out, leaves, grad)

    assert [k.count for k in kept] == ([5, 5, 5, 5] if not any(rates) else [5, 5, 3, 3])
    expected = x
    for i, k in enumerate(kept):
        block = blocks[i // 2]
        branch = block.mlp(block.norm2(expected)) if i % 2 else block.attn(block.norm1(expected))
        there = (k.order < k.count) * 5 / k.count
        expected = expected + there[:, None, None] * branch
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(found, torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


@pytest.mark.parametrize("frozen", ["blocks", "qkv", "proj"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(frozen):
    """The first of two blocks, or the biases of one layer of its attention."""
    torch.manual_seed(0)
    blocks = nn.ModuleList([Block(48, 3, qkv_bias=True) for _ in range(2)])
    for p in blocks.parameters():
        nn.init.normal_(p, std=0.2)
    attn = blocks[0].attn
    {"blocks": blocks[0], "qkv": attn.qkv.bias, "proj": attn.proj.bias}[frozen].requires_grad_(False)
    trained = [p for p in blocks.parameters() if p.requires_grad]
    x, grad = torch.randn(3, 7, 48), torch.randn(3, 7, 48)
    found = torch.autograd.grad(run_blocks(blocks, x), trained, grad)
    for a, b in zip(found, torch.autograd.grad(blocks[1](blocks[0](x)), trained, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
    prepared = fused_vit._prepare(blocks, torch.float32)
    assert prepared[0].proj_bias.requires_grad is (frozen != "blocks")  # of "proj" for the sake of the values' bias
    assert prepared[1].proj_bias.requires_grad and prepared[1].query_bias.requires_grad


def test_one_pass_is_differentiated_twice():
    """As the gradient probe does: the second time by another gradient, which is found as if it were the first."""
    torch.manual_seed(0)
    blocks = nn.ModuleList([Block(48, 3, qkv_bias=True) for _ in range(2)])
    x = torch.randn(3, 7, 48, requires_grad=True)
    leaves, (one, other) = [x, *blocks.parameters()], torch.randn(2, 3, 7, 48)
    out = run_blocks(blocks, x)
    torch.autograd.grad(out, leaves, one, retain_graph=True)
    found = torch.autograd.grad(out, leaves, other)
    expected = torch.autograd.grad(run_blocks(blocks, x), leaves, other)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_evaluation_skips_nothing():
    blocks = nn.ModuleList([Block(48, 3, drop_path=0.5, qkv_bias=True)])
    use_drop_path(nn.ModuleDict({"blocks": blocks}))
    blocks.eval()
    x = torch.randn(4, 7, 48)
    with torch.no_grad():
        torch.testing.assert_close(run_blocks(blocks, x), blocks[0](x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 1e-5), (torch.bfloat16, 0.04), (torch.float16, 0.01)])
def test_the_check_s_errors_are_those_of_the_arithmetic(dtype, largest):
    """Within inference and whatever autocast too; and no random numbers are taken from those of a run."""
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.float16):
        errors = relative_errors(SMALL, 7, dtype, CPU, images=4)
    assert {"output", "patches", "class tokens", "positions", "blocks.1.mlp.fc2.bias", "norm.weight"} < errors.keys()
    by_kernels, by_timm = zip(*errors.values(), strict=True)
    assert max(by_kernels) < largest, errors
    assert max(by_timm) < largest and (max(by_timm) > 0) == (dtype is not torch.float32), errors
    assert torch.equal(state, torch.get_rng_state())


def launches_nothing(monkeypatch, instead=lambda *args, **options: None):
    """What is computed from the kernels' results means nothing then."""
    for module in (activation, attention, biases, embedding, linear, residual):
        monkeypatch.setattr(module, "launch", instead)


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_the_check_is_made_in_the_type_that_the_tokens_will_have(monkeypatch, stream):
    seen, embed = [], fused_vit.embed_tokens
    monkeypatch.setattr(fused_vit, "embed_tokens", lambda *args: seen.append(args[4]) or embed(*args))
    launches_nothing(monkeypatch)
    relative_errors(SMALL, 7, torch.bfloat16, CPU, images=4, stream=stream)
    assert seen == [stream] * 2


@pytest.mark.parametrize("drop_path", [0.0, 0.1], ids=["plain", "drop path"])
@pytest.mark.parametrize("last", ["norm", "none", "norm apart", "checkpointed"])
def test_every_variant_of_a_pass_is_among_those_that_were_checked(monkeypatch, drop_path, last):
    def variants(run):
        seen = set()
        launches_nothing(monkeypatch, lambda kernel, grid, *args, **options: seen.add(variant(kernel, args, options)))
        run()
        return seen

    def variant(kernel, args, options):
        return kernel.fn.__name__, *(getattr(arg, "dtype", type(arg)) for arg in args), *options.items()

    def train():
        blocks = [Block(16, 1, 2.5, True, drop_path=drop_path, act_layer=QuickGELU) for _ in range(4)]
        vit = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
        use_drop_path(vit)
        x = torch.zeros(20, 7, 16, dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            if last == "checkpointed":
                out = x
                for block in vit["blocks"]:
                    out = run_blocks([block], out)
            else:
                out = run_blocks(vit["blocks"], x, nn.LayerNorm(16) if last == "norm" else None)
            if last == "norm apart":
                out = residual.layer_norm(out, nn.LayerNorm(16))
        out.sum().backward()

    checked = variants(lambda: relative_errors(SMALL, 7, torch.bfloat16, CPU, images=4, stream=torch.bfloat16))
    trained = variants(train)
    assert len(trained) > 3 and trained <= checked, trained - checked


def scrambled(size, rates, device):
    """The fault that this check is for: all images are kept, in an order that the gradient does not know of."""
    torch.manual_seed(1)
    return [Kept(torch.randperm(size).int(), k.count) for k in draw_kept(size, rates, device)]


def test_a_wrong_gradient_is_found_and_blocks_are_then_not_fused(monkeypatch, caplog):
    few_images = functools.partial(relative_errors, images=4)
    monkeypatch.setattr(fused_vit, "relative_errors", few_images)
    kernels_agree.cache_clear()
    monkeypatch.setattr(fused_vit, "draw_kept", scrambled)
    with caplog.at_level(logging.WARNING):
        assert not kernels_agree(SMALL, 7, torch.float32, CPU, torch.float32)
        assert not kernels_agree(SMALL, 7, torch.float32, CPU, torch.float32)
    assert len(caplog.messages) == 1 and "blocks are not fused, so the backbone is slower: " in caplog.text
    assert "patches differs by " in caplog.text
    kernels_agree.cache_clear()


def test_kernels_that_do_not_run_are_told_and_done_without(monkeypatch, caplog):
    def broken(*args):
        raise RuntimeError("no C compiler found\nset CC")

    monkeypatch.setattr(fused_vit, "embed_tokens", broken)
    kernels_agree.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not kernels_agree(SMALL, 7, torch.float32, CPU, torch.float32)
    assert "RuntimeError: set CC" in caplog.text
    kernels_agree.cache_clear()


@pytest.fixture
def pretend(monkeypatch):
    """As if the CPU were a GPU whose kernels have been checked; what `can_fuse` says of a backbone there."""
    monkeypatch.setattr(fused_vit, "can_launch", lambda device: True)
    monkeypatch.setattr(fused_vit, "kernels_agree", lambda *args: True)

    def ask(backbone, dtype=torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            return backbone.fuses(9, CPU)

    return ask


def tiny(name="vit_tiny_patch16_224", **kwargs):
    return Backbone(name, img_size=(64, 32), depth=2, **kwargs)


def test_blocks_are_fused_in_half_precision_alone(pretend):
    backbone = tiny(drop_path=0.2)
    assert pretend(backbone) and pretend(backbone, torch.float16) and not pretend(backbone, None)
    assert not pretend(tiny(fused=False))
    assert not pretend(backbone.bfloat16())


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch16_dinov3", "deit3_small_patch16_224"])
def test_other_kinds_of_blocks_are_left_to_timm(pretend, name):
    assert not pretend(tiny(name))


def replace_qkv(block):
    block.attn.qkv = nn.Sequential(block.attn.qkv)


def listen(block):
    block.mlp.fc1.register_forward_hook(lambda module, args, out: None)


def drop(block):
    block.attn.proj_drop.p = 0.1


def parallel(block):
    block.__class__ = ParallelThingsBlock


def norm_queries(block):
    block.attn.q_norm = nn.LayerNorm(64)


@pytest.mark.parametrize("change", [replace_qkv, listen, drop, parallel, norm_queries])
def test_a_block_with_a_part_that_no_kernel_knows_is_left_to_timm(pretend, change):
    backbone = tiny()
    change(backbone.vit.blocks[1])
    assert not pretend(backbone)


def test_kinds_tell_what_shapes_the_kernels():
    assert kind_of(tiny().vit.blocks[0]) == Kind(192, 768, 3, True, False)
    assert kind_of(Backbone("ViT-B-16", img_size=(32, 16), depth=1).vit.blocks[0]) == Kind(768, 3072, 12, True, True)


@pytest.mark.parametrize(
    ("name", "can"), [("ViT-B-16", True), ("vit_tiny_patch16_224", True), ("vit_small_patch14_reg4_dinov2", False)]
)
def test_which_embeddings_have_a_kernel(name, can):
    assert can_embed(Backbone(name, img_size=(56, 28) if "14" in name else (32, 16), depth=1).vit) is can


@pytest.mark.parametrize(
    ("name", "cameras"), [("ViT-B-16", 3), ("vit_tiny_patch16_224", 0), ("vit_tiny_patch16_224", 2)]
)
@pytest.mark.parametrize("camid", [None, torch.tensor([0, 1])])
def test_a_fused_backbone_is_the_one_as_written(pretend, monkeypatch, name, cameras, camid):
    """From images to patches and global, with the gradients of all weights."""
    torch.manual_seed(0)
    backbone = Backbone(name, img_size=(32, 32), depth=1, num_cameras=cameras)
    x, weights = torch.randn(2, 3, 32, 32), [p for p in backbone.parameters() if p.requires_grad]
    results = []
    for fused in (True, False):
        monkeypatch.setattr(fused_vit, "can_fuse", lambda *args, fused=fused: fused)
        patches, global_ = backbone(x, camid)
        torch.manual_seed(1)
        loss = (patches * torch.randn_like(patches)).sum() + (global_ * torch.randn_like(global_)).sum()
        results.append([patches, global_, *torch.autograd.grad(loss, weights, allow_unused=True)])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_a_fused_backbone_in_two_parts_and_with_checkpoints_is_the_one_in_one_piece(monkeypatch):
    """Stochastic depth too: what a checkpoint computes again skips the same images."""
    monkeypatch.setattr(fused_vit, "can_fuse", lambda *args: True)
    torch.manual_seed(0)
    backbone = Backbone("vit_tiny_patch16_224", img_size=(32, 16), depth=2, drop_path=0.4)
    backbone.split(1)
    x, weights = torch.randn(4, 3, 32, 16), [p for p in backbone.parameters() if p.requires_grad]
    grads = torch.randn(4, 2, backbone.embed_dim), torch.randn(4, backbone.embed_dim)

    def run(whole, checkpointed):
        backbone.set_grad_checkpointing(checkpointed)
        torch.manual_seed(1)
        outputs = backbone(x) if whole else backbone.end(backbone.begin(x))
        return [*outputs, *torch.autograd.grad(outputs, weights, grads)]

    drawn = []
    monkeypatch.setattr(fused_vit, "draw_kept", lambda *args: drawn.append(args) or draw_kept(*args))
    expected = run(False, False)
    assert any(max(rates) > 0 for _, rates, _ in drawn)
    for found in (run(False, True), run(True, True)):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
