"""Costs before a run: against hand-made counts, models that were built, and memory measured on a GPU."""

import gc

import pytest
import torch

from configs import load_cfg
from modeling import make_model
from tools import summary
from tools.summary import GIB, LiveBytes, count_flops, count_tokens, main, shapes_only, summarise, training_memory


def test_parameters_and_checkpoint_are_those_of_the_model(tiny_cfg):
    cfg = tiny_cfg("SOLVER.EMA_DECAY", "0.9")
    summary = summarise(cfg)
    model = make_model(cfg, num_classes=171, num_cameras=4, pretrained=False)
    numbers = sum(p.numel() for p in model.parameters())
    assert sum(summary.parameters.values()) == numbers
    assert summary.parameters["camera embedding"] == 4 * 192
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert summary.checkpoint == pytest.approx(2 * (4 * numbers + buffers) + 8 * numbers, rel=1e-3)


def test_flops_of_a_vit_by_hand(tiny_cfg):
    """A block of width W over L tokens: 24 L W² in its four linear layers, 4 L² W in its attention."""
    cfg = tiny_cfg("MODEL.HDM", "True", "MODEL.ATM", "True", "MODEL.HEAD", "3")
    with shapes_only(cfg) as (model, _):
        flops = count_flops(cfg, model)
    patches, width = 8, 192
    length = patches + 1
    block = 24 * length * width**2 + 4 * length**2 * width
    embedding = 2 * patches * (3 * 16 * 16) * width
    assert flops["backbone"] == 3 * (2 * block + embedding)
    assert set(flops) == {"backbone", "fusion", "sdtps", "pooling and heads"} and min(flops.values()) > 0


def test_patches_that_leave_the_backbone_cost_no_more(tiny_cfg):
    with shapes_only(tiny_cfg()) as (model, _):
        whole = count_flops(tiny_cfg(), model)
    cfg = tiny_cfg("MODEL.SDTPS_AFTER_BLOCK", "1")
    with shapes_only(cfg) as (model, _):
        flops, tokens = count_flops(cfg, model), count_tokens(model)
    assert tokens == {
        "in the backbone": 9,
        "behind its block 1": 6,
        "patches": 8,
        "kept by SDTPS": 4,
        "out of SDTPS": 2,
    }
    width = 192
    block = {length: 24 * length * width**2 + 4 * length**2 * width for length in (9, 6)}
    fusing = 2 * 8 * width
    assert whole["backbone"] - flops["backbone"] == 3 * (block[9] - block[6] - fusing)


def test_tokens_at_each_stage():
    with shapes_only(load_cfg("configs/RGBNT201/DeMo_SDTPS_dinov3.yml", ["MODEL.DEPTH", "1"])) as (model, _):
        assert list(count_tokens(model).values()) == [133, 128, 64, 26]


def test_live_bytes_follow_tensors():
    live = LiveBytes()
    with live:
        a = torch.zeros(1000)
        b = a.view(10, 100) + 1  # a view is no memory of its own
        assert (live.now, live.peak) == (8000, 8000)
        del a
        gc.collect()
        assert live.now == 4000
        b.add_(1)
    assert live.peak == 8000


def memory_of(cfg):
    with shapes_only(cfg) as (model, classes):
        return training_memory(cfg, model, classes)


@pytest.mark.parametrize(
    ("opts", "measured"),
    [([], 11.4), (["SOLVER.GRAD_CHECKPOINT", "True"], 2.91)],  # GiB, batch 64, bf16, on an H200
)
def test_memory_is_near_what_was_measured(opts, measured):
    memory, batch = memory_of(load_cfg("configs/RGBNT201/DeMo_SDTPS.yml", ["MODEL.SDTPS_POOL", "attention", *opts]))
    assert memory["peak"] / GIB == pytest.approx(measured, rel=0.15)
    assert batch == 64


def test_micro_batches_and_float32_change_the_memory(tiny_cfg):
    def activations(*opts):
        cfg = tiny_cfg("SOLVER.IMS_PER_BATCH", "64", "MODEL.USE_SDTPS", "False", "MODEL.DEPTH", "1", *opts)
        return memory_of(cfg)[0]["activations"]

    whole = activations("SOLVER.AMP", "float32")
    assert 3 < whole / activations("SOLVER.AMP", "float32", "SOLVER.ACCUMULATION", "4") < 5
    assert whole > 1.3 * activations("SOLVER.AMP", "bf16")


def test_the_probe_that_is_reckoned_is_the_run_s(tiny_cfg, monkeypatch):
    reckoned = []
    monkeypatch.setattr(
        summary, "_probe", lambda model, loss_fn, images, pid, half, sparing: reckoned.append((half, sparing))
    )
    for amp in ("bf16", "fp16", "float32"):
        memory_of(tiny_cfg("MODEL.DEPTH", "1", "SOLVER.IMS_PER_BATCH", "64", "SOLVER.AMP", amp))
    memory_of(tiny_cfg("MODEL.DEPTH", "1", "SOLVER.IMS_PER_BATCH", "64", "SOLVER.ACCUMULATION", "2"))
    assert reckoned[:3] == [(True, False), (False, True), (False, False)] and reckoned[3][1]


def test_the_command_prints_a_table(tiny_yaml, capsys):
    main(str(tiny_yaml), [])
    out = capsys.readouterr().out
    assert "kept by SDTPS" in out and "GiB" in out and "checkpoint (last.pth)" in out
