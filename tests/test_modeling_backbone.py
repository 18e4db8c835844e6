import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from modeling import backbone as backbone_module
from modeling import foreign
from modeling.backbone import Backbone, _cut, resize_position_grid
from modeling.block_parts import DropPath
from utils.errors import UserError
from utils.modalities import MODALITIES

REFERENCE = Path(__file__).parent / "data" / "reference"
TINY = "deit_tiny_patch16_224"


def reference_weight(key: str, shape: list[int]) -> torch.Tensor:
    """The rule by which the reference numbers' weights are made from their names."""
    x = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
    if key.endswith("weight") and len(shape) == 1:
        x = 1 + 0.1 * x
    elif len(shape) <= 1 or key.endswith("bias"):
        x = 0.1 * x
    else:
        x = x / math.sqrt(shape[-1])
    return torch.from_numpy(x.astype(np.float32))


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def first_triple(file, size):
    """The first sample (M, 3, H, W) of each modality, by the rule for images."""
    rng = np.random.default_rng(int(file["seed"]))
    images = [rng.standard_normal((3, 3, *size))[0] for _ in MODALITIES]
    return torch.from_numpy(np.stack(images).astype(np.float32))


def test_clip_features_equal_the_published_codes():
    """DeMo's checkpoint names, camera embedding, class token, patches and projection, at two shapes of image."""
    blocks = None
    for name, size, cameras in (("baseline_rgbnt201", (256, 128), 4), ("demo_rgbnt100", (128, 256), 8)):
        shapes = json.loads((REFERENCE / f"{name}.keys.json").read_text())
        wanted = {k: s for k, s in shapes.items() if k.startswith("BACKBONE.") or "_reduce." in k}
        if blocks is not None:  # both files have the same blocks: made once
            wanted = {k: s for k, s in wanted.items() if "resblocks" not in k}
        state = foreign.translate({key: reference_weight(key, shape) for key, shape in wanted.items()})

        backbone = Backbone("ViT-B-16", img_size=size, num_cameras=cameras, depth=1 if blocks else 0).eval()
        if blocks is not None:
            backbone.vit.blocks = blocks
            state.update({f"backbone.vit.blocks.{k}": v for k, v in blocks.state_dict().items()})
        blocks = backbone.vit.blocks
        own = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
        backbone.load_state_dict(own)

        with np.load(REFERENCE / f"{name}.npz") as file:
            camid = torch.as_tensor(file["cam"][:1]).repeat(3)
            with torch.no_grad():
                patches, globals_ = backbone(first_triple(file, size), camid)
            pairs = torch.cat([globals_, patches.mean(1)], dim=-1)
            reduced = []
            for m, pair in zip(MODALITIES, pairs, strict=True):
                norm = F.layer_norm(pair, (1024,), state[f"reduce.{m}.norm.weight"], state[f"reduce.{m}.norm.bias"])
                linear = F.linear(norm, state[f"reduce.{m}.linear.weight"], state[f"reduce.{m}.linear.bias"])
                reduced.append(quick_gelu(linear))
            expected = torch.from_numpy(file["ori"][0])
        assert patches.shape == (3, 128, 512)
        assert (torch.cat(reduced) - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.parametrize("old, new", [((3, 3), (5, 2)), ((4, 6), (2, 3)), ((14, 14), (16, 8)), ((2, 5), (2, 5))])
def test_resize_position_grid_equals_a_loop(old, new):
    grid = torch.randn(*old, 4)
    resized = resize_position_grid(grid.reshape(-1, 4), old, new).reshape(*new, 4)
    for row in range(new[0]):
        for column in range(new[1]):
            # pixel centres: the middle of cell i of n lies at (i + 0.5) / n
            y = min(max((row + 0.5) * old[0] / new[0] - 0.5, 0), old[0] - 1)
            x = min(max((column + 0.5) * old[1] / new[1] - 0.5, 0), old[1] - 1)
            top, left = math.floor(y), math.floor(x)
            bottom, right = min(top + 1, old[0] - 1), min(left + 1, old[1] - 1)
            upper = grid[top, left] * (1 - (x - left)) + grid[top, right] * (x - left)
            lower = grid[bottom, left] * (1 - (x - left)) + grid[bottom, right] * (x - left)
            torch.testing.assert_close(resized[row, column], upper * (1 - (y - top)) + lower * (y - top))


@pytest.mark.parametrize(
    "name, prefix, patch",
    [
        (TINY, 1, 16),
        ("deit_tiny_distilled_patch16_224", 2, 16),
        ("vit_small_patch14_dinov2", 1, 14),
        ("vit_small_patch14_reg4_dinov2", 5, 14),
        ("vit_small_patch16_dinov3", 5, 16),
        ("vit_small_patch16_rope_mixed_224", 1, 16),
        ("eva02_tiny_patch14_224", 1, 14),
    ],
)
def test_class_token_and_patches_are_timms_without_registers(name, prefix, patch):
    torch.manual_seed(0)
    backbone = Backbone(name, img_size=(70, 42), depth=2).eval()
    for parameter in backbone.parameters():  # tokens start near zero: make every one count
        torch.nn.init.normal_(parameter, std=0.2)
    assert backbone.grid == (70 // patch, 42 // patch)
    assert (backbone.width, backbone.embed_dim) == (backbone.vit.embed_dim,) * 2
    x = torch.randn(2, 3, 70, 42)
    with torch.no_grad():
        patches, globals_ = backbone(x)
        tokens = backbone.vit.fc_norm(backbone.vit.forward_features(x))
    assert tokens.shape[1] == prefix + backbone.num_patches
    torch.testing.assert_close(globals_, tokens[:, 0])
    torch.testing.assert_close(patches, tokens[:, prefix:])


@pytest.mark.parametrize("name", [TINY, "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_every_parameter_receives_a_gradient(name):
    backbone = Backbone(name, img_size=(32, 32), depth=1, num_cameras=2)
    patches, globals_ = backbone(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    (patches.square().sum() + globals_.square().sum()).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("size, stride", [((64, 32), (8, 16)), ((50, 40), (12, 11)), ((40, 33), (16, 16))])
def test_overlapping_patches_are_crops_at_the_stride(size, stride):
    backbone = Backbone(TINY, img_size=size, stride=stride, depth=1)
    rows, columns = backbone.grid
    assert (rows, columns) == ((size[0] - 16) // stride[0] + 1, (size[1] - 16) // stride[1] + 1)
    assert backbone.vit.pos_embed.shape == (1, 1 + rows * columns, 192)
    x = torch.randn(1, 3, *size)
    embedded = backbone.vit.patch_embed(x)[0].reshape(rows, columns, -1)
    conv = backbone.vit.patch_embed.proj
    for row in range(rows):
        for column in range(columns):
            crop = x[0, :, row * stride[0] :, column * stride[1] :][:, :16, :16]
            expected = (conv.weight * crop).sum((1, 2, 3)) + conv.bias
            torch.testing.assert_close(embedded[row, column], expected, atol=1e-5, rtol=1e-4)
    assert backbone(x)[0].shape == (1, rows * columns, 192)


def test_rope_has_the_grid_of_overlapping_patches():
    """The rope of an overlapping grid is that of a larger image with as many patches side by side."""
    overlapping = Backbone("vit_small_patch16_dinov3", img_size=(48, 32), stride=(8, 8), depth=1)
    larger = timm.create_model("vit_small_patch16_dinov3", img_size=(80, 48), depth=1, dynamic_img_size=False)
    assert overlapping.grid == (5, 3)
    torch.testing.assert_close(overlapping.vit.rope.get_embed(), larger.rope.get_embed())


def test_only_the_class_token_sees_the_camera():
    backbone = Backbone("ViT-B-16", img_size=(32, 16), depth=1, num_cameras=3, sie_coe=2.5)
    assert backbone.cam_embed.shape == (3, 768)
    assert 0.015 < backbone.cam_embed.std() < 0.025
    seen = []
    backbone.vit.norm_pre.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    x = torch.randn(2, 3, 32, 16)
    with torch.no_grad():
        backbone(x, torch.tensor([2, 0]))
        backbone(x)
        cameras, backbone.cam_embed = backbone.cam_embed, None
        backbone(x, torch.tensor([2, 0]))
    by_camera, by_mean, without = seen
    torch.testing.assert_close((by_camera - without)[:, 0], 2.5 * cameras[[2, 0]])
    torch.testing.assert_close((by_mean - without)[:, 0], 2.5 * cameras.mean(0).expand(2, -1))
    assert torch.equal(by_camera[:, 1:], without[:, 1:]) and torch.equal(by_mean[:, 1:], without[:, 1:])


def test_without_cameras_there_is_no_embedding():
    backbone = Backbone(TINY, img_size=(32, 16), depth=1)
    assert backbone.cam_embed is None and "cam_embed" not in backbone.state_dict()


def test_clip_has_its_own_layers():
    backbone = Backbone("ViT-B-16", img_size=(32, 16), depth=1)
    assert (backbone.width, backbone.embed_dim) == (768, 512)
    assert backbone.proj.weight.shape == (512, 768) and backbone.proj.bias is None
    norms = [m for m in backbone.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 4 and {norm.eps for norm in norms} == {1e-5}
    torch.testing.assert_close(backbone.vit.blocks[0].mlp.act(torch.tensor(1.5)), quick_gelu(torch.tensor(1.5)))


def test_depth_spreads_the_drop_path_over_the_blocks_kept():
    backbone = Backbone(TINY, img_size=(32, 16), depth=3, drop_path=0.4, drop=0.2, attn_drop=0.1)
    rates = [1 - float(block.drop_path1.keep) for block in backbone.vit.blocks]
    assert rates == pytest.approx([0.0, 0.2, 0.4])
    assert backbone.vit.blocks[0].attn.attn_drop.p == 0.1 and backbone.vit.blocks[0].mlp.drop1.p == 0.2
    assert len(Backbone(TINY, img_size=(32, 16)).vit.blocks) == 12


def test_blocks_are_checkpointed_only_where_something_learns(monkeypatch):
    calls = []
    monkeypatch.setattr(backbone_module, "checkpoint", lambda run, *args, **options: calls.append(1) or run(*args))
    backbone = Backbone(TINY, img_size=(32, 16), depth=2)
    backbone.set_grad_checkpointing(True)
    x = torch.randn(2, 3, 32, 16)
    backbone(x)
    assert len(calls) == 2
    with torch.no_grad():
        backbone(x)
    backbone.requires_grad_(False)(x)
    assert len(calls) == 2


@pytest.mark.parametrize("name", [TINY, "vit_small_patch16_dinov3"])
def test_checkpointing_recomputes_blocks_and_changes_no_gradient(name):
    torch.manual_seed(0)
    backbone = Backbone(name, img_size=(32, 16), depth=2)
    x = torch.randn(2, 3, 32, 16)
    calls = []
    backbone.vit.blocks[0].register_forward_pre_hook(lambda *args: calls.append(1))

    def gradients():
        backbone.zero_grad()
        backbone(x)[0].square().sum().backward()
        return [p.grad.clone() for p in backbone.parameters()]

    plain = gradients()
    assert len(calls) == 1
    backbone.set_grad_checkpointing(True)
    for expected, got in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(got, expected)
    assert len(calls) == 3
    backbone.eval()(x)[0].sum().backward()
    assert len(calls) == 5
    with torch.no_grad():
        backbone(x)
    assert len(calls) == 6


@pytest.mark.parametrize(
    "name, told",
    [
        ("vit_base_patch16_dinov4", "vit_base_patch16_dinov3"),
        ("ViT-B/16", "ViT-B-16"),
        ("resnet50", "no plain ViT"),
        ("vit_base_patch16_224.nonsense", "vit_base_patch16_224.augreg_in21k"),
        ("test_vit4", "class token"),
    ],
)
def test_unsuitable_names_are_told(name, told):
    with pytest.raises(UserError, match=told) as error:
        Backbone(name, img_size=(160, 160), depth=1)
    assert name in str(error.value)


def test_more_blocks_than_there_are_are_told():
    with pytest.raises(UserError, match="DEPTH is 13.*has 12 blocks"):
        Backbone(TINY, img_size=(64, 32), depth=13)


def test_unsuitable_sizes_are_told():
    with pytest.raises(UserError, match=r"\[8, 32\].*16x16"):
        Backbone(TINY, img_size=(8, 32), depth=1)
    with pytest.raises(UserError, match=r"\[16, 16\].*14x14.*\[14, 14\]"):
        Backbone("vit_small_patch14_dinov2", img_size=(64, 32), stride=(16, 16), depth=1)
    with pytest.raises(UserError, match=r"32x64.*64x32"):
        Backbone(TINY, img_size=(64, 32), depth=1)(torch.zeros(1, 3, 32, 64))


def test_drop_path_drops_samples_at_its_rate_and_keeps_the_mean():
    torch.manual_seed(0)
    layer, x = DropPath(0.25), torch.ones(8000, 2, 3)
    y = layer(x)
    kept = y[:, 0, 0] > 0
    assert torch.equal(y, (kept / 0.75)[:, None, None].expand_as(x))  # a sample stays whole, or goes whole
    assert kept.float().mean() == pytest.approx(0.75, abs=4 * (0.25 * 0.75 / 8000) ** 0.5)
    assert torch.equal(layer.eval()(x), x)


def test_patches_are_embedded_as_the_convolution_does():
    """Also where the last rows and columns of the image fill no patch."""
    torch.manual_seed(0)
    backbone, x = Backbone(TINY, img_size=(40, 24), depth=1), torch.randn(2, 3, 40, 24)
    expected = backbone.vit.patch_embed.proj(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(backbone._patchify(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_patches_are_cut_out_whatever_the_type_and_the_place_in_memory(dtype):
    """Images whose pixels can be copied eight bytes at a time, and such whose pixels cannot."""
    images = torch.randn(2, 3, 8, 12).to(dtype)
    shifted = torch.cat([torch.zeros(1, dtype=dtype), images.flatten()])[1:].view(images.shape)
    for x in (images, shifted, images.clone().requires_grad_(), images.to(memory_format=torch.channels_last)):
        for rows, columns in ((4, 4), (2, 3)):
            crops = [
                images[:, :, i : i + rows, j : j + columns].flatten(1)
                for i in range(0, 8, rows)
                for j in range(0, 12, columns)
            ]
            assert torch.equal(_cut(x, rows, columns), torch.stack(crops, dim=1))
