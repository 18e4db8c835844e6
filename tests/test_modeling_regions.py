"""Regions for torch.compile: which code is shared, and that results do not change."""

import copy
import functools

import pytest
import torch
from timm.layers import DropPath as TimmDropPath
from torch._dynamo.testing import CompileCounter

from modeling import regions
from modeling.backbone import Backbone
from modeling.regions import compile_regions


@pytest.fixture
def counter(monkeypatch):
    """Compiles without generating code, and counts."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = functools.cache(lambda method: torch.compile(method, dynamic=False, backend=counter))
    monkeypatch.setattr(regions, "_compiled", compiled)
    yield counter
    torch._dynamo.reset()


def run(backbone):
    torch.manual_seed(0)
    patches, globals_ = backbone(torch.randn(2, 3, 32, 16), torch.tensor([0, 1]))
    return patches.sum() + globals_.square().sum()


def test_blocks_of_different_drop_path_share_one_graph(counter):
    """Three for training (embedding, a group of blocks, projection), three for evaluation, whatever the depth."""
    backbone = Backbone("vit_tiny_patch16_224", img_size=(32, 16), drop_path=0.3, num_cameras=2)
    compile_regions(backbone)
    run(backbone).backward()
    assert counter.frame_count == 3
    with torch.no_grad():
        run(backbone.eval())
    assert counter.frame_count == 6
    for i, block in enumerate(backbone.vit.blocks):  # the trap: with a Python number in each block, each compiles anew
        block.drop_path1 = TimmDropPath(i / 100)
    run(backbone.train())
    assert counter.frame_count > 8


def test_compiled_regions_compute_the_same(counter):
    backbone = Backbone("vit_tiny_patch16_224", img_size=(32, 16), depth=3, drop_path=0.3, num_cameras=2)
    twin = copy.deepcopy(backbone)
    compile_regions(twin)
    for model in (backbone, twin):
        run(model).backward()
    assert counter.frame_count
    for (name, p), q in zip(backbone.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_a_copy_of_a_compiled_model_computes_with_its_own_weights(counter):
    backbone = Backbone("vit_tiny_patch16_224", img_size=(32, 16), depth=1, num_cameras=2).eval()
    compile_regions(backbone)
    run(backbone)
    twin = copy.deepcopy(backbone)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert run(twin) == 0 and run(backbone) != 0
