"""When training is compiled, and that neither success nor failure leaves a trace."""

import functools
import logging

import pytest
import torch

import engine.compile
import train_net
from engine import processor
from engine.compile import EVALUATION_PAYS, compile_training, pays_in_evaluation, reason_against
from modeling import make_model, regions
from modeling.regions import is_compiled, uncompiled
from solver import make_loss


def built(tiny_cfg, *opts):
    cfg = tiny_cfg(*opts)
    torch.manual_seed(0)
    return cfg, make_model(cfg, num_classes=6, num_cameras=2, pretrained=False), make_loss(cfg, 6)


def backend(monkeypatch, function):
    torch._dynamo.reset()
    compiled = functools.cache(lambda method: torch.compile(method, dynamic=False, backend=function))
    monkeypatch.setattr(regions, "_compiled", compiled)


def test_a_cpu_is_left_alone_unless_asked_for(tiny_cfg):
    for opts in ((), ("SOLVER.COMPILE", "off")):
        cfg, model, loss_fn = built(tiny_cfg, *opts)
        assert not compile_training(cfg, model, loss_fn, None, 8, replayed=False) and not is_compiled(model)


def test_compiling_changes_no_weight_no_statistic_and_no_random_state(tiny_cfg, monkeypatch):
    calls = []
    backend(monkeypatch, lambda graph, inputs: calls.append(1) or graph)
    cfg, model, loss_fn = built(tiny_cfg, "SOLVER.COMPILE", "on", "MODEL.DROP_PATH", "0.2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    assert compile_training(cfg, model.eval(), loss_fn, None, 8, replayed=False) and calls
    assert is_compiled(model) and is_compiled(loss_fn) and not model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(RuntimeError), uncompiled(model, loss_fn):
        assert not is_compiled(model.backbone) and not is_compiled(loss_fn)
        raise RuntimeError
    assert is_compiled(model.backbone) and is_compiled(loss_fn)


def test_a_compiler_that_fails_is_told_and_done_without(tiny_cfg, monkeypatch, caplog):
    def broken(graph, inputs):
        raise RuntimeError("no C compiler found")

    backend(monkeypatch, broken)
    cfg, model, loss_fn = built(tiny_cfg, "SOLVER.COMPILE", "on")
    with caplog.at_level(logging.WARNING):
        assert not compile_training(cfg, model, loss_fn, None, 8, replayed=False)
    assert "not compiled, so training is slower" in caplog.text and "no C compiler found" in caplog.text
    assert not is_compiled(model) and not is_compiled(loss_fn)
    images = {m: torch.zeros(2, 3, *cfg.INPUT.SIZE_TRAIN) for m in ("RGB", "NI", "TI")}
    assert model(images, torch.tensor([0, 1])).logits


@pytest.mark.parametrize(
    ("fused", "replayed", "opts", "against"),
    [
        (True, True, (), "fused blocks"),
        (False, True, (), ""),
        (True, False, (), ""),
        (False, False, ("SOLVER.DETERMINISTIC", "True"), "SOLVER.DETERMINISTIC"),
    ],
)
def test_a_gpu_is_compiled_for_unless_blocks_are_fused_and_steps_replayed(tiny_cfg, fused, replayed, opts, against):
    reason = reason_against(tiny_cfg(*opts), fused, replayed)
    assert against in reason and bool(reason) is bool(against)


def test_evaluation_is_compiled_where_a_run_evaluates_enough(tiny_cfg):
    """Before training and after epochs 3, 6, 9 and the tenth and last: five times."""
    cfg = tiny_cfg("SOLVER.MAX_EPOCHS", "10", "SOLVER.EVAL_PERIOD", "3")
    assert not pays_in_evaluation(cfg, EVALUATION_PAYS // 5)
    assert pays_in_evaluation(cfg, EVALUATION_PAYS // 5 + 1)


@pytest.mark.parametrize("pays", [False, True])
def test_a_run_evaluates_as_the_rule_says_and_trains_compiled(tiny_yaml, monkeypatch, pays):
    """12 images, three evaluations; where they are not compiled, every graph is there before the first of them."""
    graphs, evaluated, trained = [], [], []
    backend(monkeypatch, lambda graph, inputs: graphs.append(graph) or graph)
    monkeypatch.setattr(engine.compile, "EVALUATION_PAYS", 35 if pays else 36)
    evaluate, step = processor.evaluate, processor.TrainStep.__call__

    def watched_evaluate(cfg, model, *args, **kwargs):
        evaluated.append((is_compiled(model), len(graphs)))
        return evaluate(cfg, model, *args, **kwargs)

    def watched_step(self, *args):
        trained.append(is_compiled(self.model))
        return step(self, *args)

    monkeypatch.setattr(processor, "evaluate", watched_evaluate)
    monkeypatch.setattr(processor.TrainStep, "__call__", watched_step)
    train_net.main(str(tiny_yaml), ["SOLVER.COMPILE", "on"])
    assert [compiled for compiled, _ in evaluated] == [pays] * 3 and set(trained) == {True}
    before, after = evaluated[0][1], len(graphs)
    assert after > before > 0 if pays else after == before > 0
