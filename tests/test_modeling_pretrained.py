import logging
import pickle
import zipfile

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file as save_safetensors
from torch import nn

from modeling.backbone import Backbone, resize_position_grid
from modeling.pretrained import find_grid, load_pretrained
from utils.errors import UserError

CLIP = "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m"  # width 256, 4 heads, projection to 512
WIDTH, HEADS, PROJECTION, DEPTH = 256, 4, 512, 2


def openai_tower(width=WIDTH, depth=DEPTH, patches=4):
    """Random weights of an image tower by OpenAI's names, all of them exact in half precision."""
    shapes = {
        "class_embedding": (width,),
        "positional_embedding": (1 + patches, width),
        "proj": (width, PROJECTION),
        "conv1.weight": (width, 3, 16, 16),
    }
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for i in range(depth):
        block = f"transformer.resblocks.{i}"
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        shapes |= {f"{block}.attn.out_proj.weight": (width, width), f"{block}.attn.out_proj.bias": (width,)}
        shapes |= {f"{block}.mlp.c_fc.weight": (4 * width, width), f"{block}.mlp.c_fc.bias": (4 * width,)}
        shapes |= {f"{block}.mlp.c_proj.weight": (width, 4 * width), f"{block}.mlp.c_proj.bias": (width,)}
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
    generator = torch.Generator().manual_seed(5)
    return {
        name: (torch.randn(shape, generator=generator) * 0.1 + (name.endswith("weight") and len(shape) == 1))
        .half()
        .float()
        for name, shape in shapes.items()
    }


def clip_image_tower(state, x):
    """CLIP's image encoder written out on OpenAI's names, with GELU as this small CLIP has it -> (B, 1 + N, C)."""

    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)

    x = F.conv2d(x, state["conv1.weight"], stride=16).flatten(2).mT
    x = torch.cat([state["class_embedding"].expand(len(x), 1, -1), x], dim=1) + state["positional_embedding"]
    x = norm(x, "ln_pre")
    for i in range(DEPTH):
        block = f"transformer.resblocks.{i}"
        attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        attention.load_state_dict(
            {k.removeprefix(f"{block}.attn."): v for k, v in state.items() if f"{block}.attn" in k}
        )
        y = norm(x, f"{block}.ln_1")
        x = x + attention(y, y, y, need_weights=False)[0]
        y = F.linear(norm(x, f"{block}.ln_2"), state[f"{block}.mlp.c_fc.weight"], state[f"{block}.mlp.c_fc.bias"])
        x = x + F.linear(F.gelu(y), state[f"{block}.mlp.c_proj.weight"], state[f"{block}.mlp.c_proj.bias"])
    return norm(x, "ln_post") @ state["proj"]


def clip_backbone(size=(32, 32), depth=DEPTH, **kwargs):
    return Backbone(CLIP, img_size=size, depth=depth, **kwargs).eval()


TEXT = {
    "token_embedding.weight": torch.zeros(10, 64),
    "positional_embedding": torch.zeros(7, 64),
    "transformer.resblocks.0.ln_1.weight": torch.ones(64),
    "transformer.resblocks.1.ln_1.weight": torch.ones(64),
    "ln_final.weight": torch.ones(64),
    "text_projection": torch.zeros(64, PROJECTION),
    "logit_scale": torch.zeros(()),
}


def save_torchscript(state, path):
    """An archive like OpenAI's: nested modules that hold the tensors as parameters, in half precision."""
    root = nn.Module()
    for name, tensor in state.items():
        module, (*parents, leaf) = root, name.split(".")
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, nn.Module())
            module = module._modules[parent]
        module.register_parameter(leaf, nn.Parameter(tensor.half(), requires_grad=False))
    root.forward = lambda x: x + 1
    torch.jit.trace(root, torch.zeros(1)).save(str(path))


def timm_names(state):
    """By timm's names, as its hub stores CLIP: projection as a head with a zero bias."""
    vit = timm.create_model(CLIP, img_size=32, depth=DEPTH)
    renamed = timm.models.vision_transformer.checkpoint_filter_fn({f"visual.{k}": v for k, v in state.items()}, vit)
    assert renamed.keys() == vit.state_dict().keys()
    return renamed


def own_names(state):
    backbone = clip_backbone(num_cameras=3)
    vit = timm_names(state)
    backbone.proj.load_state_dict({"weight": vit.pop("head.weight")})
    backbone.vit.load_state_dict({k: v for k, v in vit.items() if k != "head.bias"})
    return backbone.state_dict()


def prefixed(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def write_openai_archive(state, folder):
    save_torchscript(prefixed("visual.", state) | TEXT, folder / "ViT.pt")
    return folder / "ViT.pt"


def write_openai_state_dict(state, folder):
    torch.save(prefixed("visual.", state) | TEXT, folder / "w.pt")
    return folder / "w.pt"


def write_bare_tower(state, folder):
    torch.save({name: tensor.half() for name, tensor in state.items()}, folder / "w.pth")
    return folder / "w.pth"


def write_open_clip_checkpoint(state, folder):
    torch.save({"epoch": 3, "state_dict": prefixed("module.", prefixed("visual.", state) | TEXT)}, folder / "w.pt")
    return folder / "w.pt"


def write_open_clip_safetensors(state, folder):
    save_safetensors(prefixed("model.", prefixed("visual.", state) | TEXT), folder / "w.safetensors")
    return folder / "w.safetensors"


def write_open_clip_timm_tower(state, folder):
    trunk = timm_names(state)
    head = {"visual.head.proj.weight": trunk.pop("head.weight")}
    trunk.pop("head.bias")
    torch.save(prefixed("visual.trunk.", trunk) | head | prefixed("text.", TEXT), folder / "w.pt")
    return folder / "w.pt"


def write_timm(state, folder):
    save_safetensors({k: v.contiguous() for k, v in timm_names(state).items()}, folder / "model.safetensors")
    return folder / "model.safetensors"


def write_own_backbone(state, folder):
    save_safetensors(own_names(state), folder / "own.safetensors")
    return folder / "own.safetensors"


def write_own_checkpoint(state, folder):
    model = prefixed("backbone.", own_names(state)) | {"heads.ori.classifier.weight": torch.zeros(3, 4)}
    torch.save({"model": model, "epoch": 7}, folder / "own.pth")
    return folder / "own.pth"


FORMATS = [
    write_openai_archive,
    write_openai_state_dict,
    write_bare_tower,
    write_open_clip_checkpoint,
    write_open_clip_safetensors,
    write_open_clip_timm_tower,
    write_timm,
    write_own_backbone,
    write_own_checkpoint,
]


@pytest.mark.parametrize("write", FORMATS, ids=lambda f: f.__name__.removeprefix("write_"))
@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_every_format_gives_clips_features(write, tmp_path, caplog):
    state = openai_tower()
    backbone = clip_backbone(num_cameras=2)
    cameras = backbone.cam_embed.detach().clone()
    with caplog.at_level(logging.WARNING):
        load_pretrained(backbone, write(state, tmp_path))
    assert caplog.messages == []
    assert torch.equal(backbone.cam_embed, cameras)
    assert {tensor.dtype for tensor in backbone.state_dict().values()} == {torch.float32}

    backbone.cam_embed = None
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        patches, globals_ = backbone(x)
        expected = clip_image_tower(state, x)
    torch.testing.assert_close(globals_, expected[:, 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(patches, expected[:, 1:], atol=1e-5, rtol=1e-4)


def test_the_position_grid_is_resized_and_prefix_tokens_keep_theirs(tmp_path):
    state = openai_tower(patches=9)
    backbone = clip_backbone(size=(64, 32))
    load_pretrained(backbone, write_bare_tower(state, tmp_path))  # a half precision file, resized in float32
    positions = backbone.vit.pos_embed[0]
    assert torch.equal(positions[0], state["positional_embedding"][0])
    assert torch.equal(positions[1:], resize_position_grid(state["positional_embedding"][1:], (3, 3), (4, 2)))


def test_a_grid_of_as_many_patches_but_other_sides_is_resized_too(tmp_path):
    state = openai_tower(patches=16)
    backbone = clip_backbone(size=(128, 32))
    load_pretrained(backbone, write_openai_state_dict(state, tmp_path))
    expected = resize_position_grid(state["positional_embedding"][1:], (4, 4), (8, 2))
    assert torch.equal(backbone.vit.pos_embed[0, 1:], expected)


def test_positions_without_prefix_entries(tmp_path):
    """DINOv2 with registers: class and registers have no position."""
    name = "vit_small_patch14_reg4_dinov2"
    source = timm.create_model(name, img_size=42, depth=1, num_classes=0)
    torch.save(source.state_dict() | {"mask_token": torch.zeros(1, 384)}, tmp_path / "w.pth")
    backbone = Backbone(name, img_size=(56, 28), depth=1)
    load_pretrained(backbone, tmp_path / "w.pth")
    assert torch.equal(backbone.vit.reg_token, source.reg_token)
    expected = resize_position_grid(source.pos_embed[0], (3, 3), (4, 2))
    assert torch.equal(backbone.vit.pos_embed[0], expected)


@pytest.mark.parametrize(
    "patches, like, grid",
    [
        (196, (16, 8), (14, 14)),
        (128, (16, 8), (16, 8)),
        (128, (8, 16), (8, 16)),
        (32, (16, 8), (8, 4)),
        (130, (16, 8), None),
        (0, (16, 8), None),
    ],
)
def test_find_grid(patches, like, grid):
    assert find_grid(patches, like) == grid


def test_a_backbone_of_fewer_blocks_takes_the_first_of_the_file(tmp_path, caplog):
    path = write_openai_state_dict(openai_tower(), tmp_path)
    backbone = clip_backbone(depth=1)
    with caplog.at_level(logging.WARNING):
        load_pretrained(backbone, path)
    assert caplog.messages == []
    expected = openai_tower()["transformer.resblocks.0.mlp.c_fc.weight"]
    assert torch.equal(backbone.vit.blocks[0].mlp.fc1.weight, expected)


def test_unknown_tensors_are_told_in_one_line(tmp_path, caplog):
    torch.save(openai_tower() | {"prompt": torch.zeros(2), "gate.bias": torch.zeros(3)}, tmp_path / "w.pt")
    with caplog.at_level(logging.WARNING):
        load_pretrained(clip_backbone(), tmp_path / "w.pt")
    (line,) = caplog.messages
    assert "prompt" in line and "gate.bias" in line and "blocks" not in line


def refused(path, backbone=None):
    """The message with which loading stops, the backbone being left as it was."""
    backbone = backbone or clip_backbone()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_pretrained(backbone, path)
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())
    return str(error.value)


def test_a_missing_tensor_stops(tmp_path):
    state = openai_tower()
    del state["transformer.resblocks.1.mlp.c_proj.bias"], state["proj"]
    torch.save(state, tmp_path / "w.pt")
    message = refused(tmp_path / "w.pt")
    assert "missing in the file (2)" in message
    assert "vit.blocks.1.mlp.fc2.bias" in message and "proj.weight" in message
    assert "MODEL.PRETRAIN_PATH_T" in message and "MODEL.PRETRAINED False" in message


def test_a_tensor_of_another_shape_stops(tmp_path):
    state = openai_tower()
    state["conv1.weight"] = torch.zeros(WIDTH, 3, 14, 14)
    torch.save(state, tmp_path / "w.pt")
    message = refused(tmp_path / "w.pt")
    assert "vit.patch_embed.proj.weight (256, 3, 14, 14), wanted (256, 3, 16, 16)" in message


def test_another_architecture_is_told_by_width_and_depth(tmp_path):
    torch.save(openai_tower(width=128, depth=3), tmp_path / "w.pt")
    message = refused(tmp_path / "w.pt")
    assert "width 256 with 2 blocks" in message and "width 128 with 3 blocks" in message


def test_a_deeper_file_stops_unless_the_backbone_was_cut(tmp_path):
    backbone = clip_backbone(depth=1)
    backbone.depth_limit = 0  # as if one block were all that this ViT has
    message = refused(write_openai_state_dict(openai_tower(), tmp_path), backbone)
    assert "with 1 blocks" in message and "with 2 blocks" in message


def test_a_text_encoder_is_told(tmp_path):
    torch.save(TEXT, tmp_path / "w.pt")
    message = refused(tmp_path / "w.pt")
    assert "no image transformer" in message and "width 64 with 2 blocks" in message
    assert "width 256 with 2 blocks" in message


def test_two_towers_are_told(tmp_path):
    tower = openai_tower()
    torch.save(prefixed("student.", tower) | prefixed("teacher.", tower), tmp_path / "w.pt")
    message = refused(tmp_path / "w.pt")
    assert "student." in message and "teacher." in message and "w.pt" in message


class Bomb:
    def __reduce__(self):
        return print, ("the file ran code",)


def test_a_damaged_archive_is_told(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("w/constants.pkl", b"")
    assert "w.pt: damaged TorchScript archive" in refused(tmp_path / "w.pt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_runs_code_is_refused(tmp_path, capsys):
    torch.save(openai_tower() | {"bomb": Bomb()}, tmp_path / "w.pt")
    assert "refused" in refused(tmp_path / "w.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"bomb": Bomb()}))
    refused(tmp_path / "plain.pkl")
    assert capsys.readouterr().out == ""


def test_a_file_that_is_not_there_is_told(tmp_path):
    assert "nowhere.pt" in refused(tmp_path / "nowhere.pt")


def test_without_a_path_timms_weights_are_fetched_at_their_own_size(monkeypatch):
    create, asked = timm.create_model, []

    def hub(name, pretrained, **kwargs):
        asked.append((name, pretrained, kwargs))
        return create(name, depth=DEPTH, img_size=48)

    backbone = clip_backbone(size=(64, 32))
    monkeypatch.setattr(timm, "create_model", hub)
    load_pretrained(backbone)
    assert asked == [(CLIP, True, {})]
    assert backbone.vit.pos_embed.shape == (1, 9, WIDTH)


def test_an_unreachable_hub_says_what_to_do(monkeypatch):
    backbone = Backbone("ViT-B-16", img_size=(32, 16), depth=1)

    def hub(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", hub)
    message = refused("", backbone)
    assert "no route to host" in message
    assert "https://huggingface.co/timm/vit_base_patch16_clip_224.openai/resolve/main/model.safetensors" in message
    assert "ViT-B-16.pt" in message
    assert "MODEL.PRETRAIN_PATH_T" in message and "MODEL.PRETRAINED False" in message
