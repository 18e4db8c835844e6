"""Replayed steps against steps as they are; a stand-in for CUDA's graphs runs the recorded pass on the CPU."""

import copy
import logging
from contextlib import contextmanager
from typing import ClassVar

import pytest
import torch

import engine.cuda_graph
import engine.parallel
from data import Batch
from engine.cuda_graph import WARM_UP, ReplayedPass, obstacles, recording_stream
from engine.guard import FiniteGuard
from engine.parallel import Objective
from engine.step import TrainStep
from modeling import make_model
from solver import make_loss, make_optimizer
from utils.errors import UserError
from utils.modalities import MODALITIES


class FakeGraph:
    """Recording runs the pass without effect, as on a device; a replay runs it on the recorded tensors and overwrites
    what the recording returned."""

    made: ClassVar[list] = []

    def __init__(self):
        self.replays, self.call, self.dropped = 0, None, False
        FakeGraph.made.append(self)

    def reset(self):
        assert not self.dropped
        self.dropped = True

    def replay(self):
        assert not self.dropped
        self.replays += 1
        run, batch, epoch, (values, output), parameters, grads = self.call
        new_values, new_output = run(batch, epoch)
        for name, value in new_values.items():
            values[name].copy_(value)
        for name, logits in new_output.logits.items():
            output.logits[name].copy_(logits)
        for parameter, grad in zip(parameters, grads, strict=True):
            assert (parameter.grad is None) == (grad is None)
            if grad is not None:
                grad.copy_(parameter.grad)
            parameter.grad = grad


class FakeStream:
    """Remembers for whom it waited, and what was made while it was the current one."""

    def __init__(self, device=None):
        self.waited_for, self.device = [], device

    def wait_stream(self, other):
        self.waited_for.append(other)


@pytest.fixture
def fake_streams(monkeypatch):
    """Lets streams be made and used on the CPU; the stack of streams, the current one last."""
    stack = [FakeStream()]

    @contextmanager
    def use(stream):
        stack.append(stream)
        yield
        assert stack.pop() is stream

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stack[-1])
    return stack


@pytest.fixture
def fake_graphs(monkeypatch, fake_streams):
    """Lets `TrainStep` replay on the CPU; the list of graphs made."""
    FakeGraph.made = []

    @contextmanager
    def recording(graph, stream, capture_error_mode):
        assert capture_error_mode == "thread_local" and stream is step.stream
        model = step.model
        before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        yield
        model.load_state_dict(before)
        torch.set_rng_state(random)

    class Watched(ReplayedPass):
        def __init__(self, *args):
            nonlocal step
            step = self
            super().__init__(*args)

        def _record(self, batch, epoch):
            recorded = super()._record(batch, epoch)
            recorded.graph.call = (
                self.run,
                recorded.batch,
                epoch,
                recorded.result,
                self.parameters,
                recorded.grads,
            )
            return recorded

    step = None
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(engine.step, "ReplayedPass", Watched)
    return FakeGraph.made


def make_batch(seed, size=8, present=False):
    generator = torch.Generator().manual_seed(seed)
    images = {m: torch.randn(size, 3, 64, 32, generator=generator) for m in MODALITIES}
    pid = torch.randperm(6, generator=generator)[: size // 2].repeat_interleave(2)
    there = torch.rand(size, 3, generator=generator) < 0.7
    there[:, 0] = True
    camid = torch.randint(2, (size,), generator=generator)
    return Batch(images, pid, camid, torch.full_like(pid, -1), pid, [""] * size, there if present else None)


def train(cfg, batches, epochs):
    """Values and logits of every step, and the weights and statistics in the end."""
    torch.manual_seed(0)
    model = make_model(cfg, num_classes=6, num_cameras=2, pretrained=False)
    guard = FiniteGuard(model, make_optimizer(cfg, model), torch.amp.GradScaler("cpu", enabled=False))
    stream = torch.cuda.Stream() if cfg.SOLVER.CUDA_GRAPH else None
    step = TrainStep(cfg, Objective(model, make_loss(cfg, 6)), guard, stream=stream)
    model.train()
    told = []
    for i, (batch, epoch) in enumerate(zip(batches, epochs, strict=True)):
        values, output = step(batch, epoch, i)
        told.append(values | {name: logits.clone() for name, logits in output.logits.items()})
    step.close()
    return told, model.state_dict()


@pytest.mark.parametrize(
    ("opts", "present", "epochs", "graphs"),
    [
        ((), False, [1] * 6, 1),
        (("MODEL.DROP_PATH", "0.2", "MODEL.SDTPS_USE_GUMBEL", "True"), False, [1] * 6, 1),
        (("SOLVER.GRAD_CLIP", "0.5", "MODEL.SDTPS_CHOICE", "random"), True, [1] * 6, 1),
        (("SOLVER.AMP", "bf16"), False, [1] * 6, 1),
        (("SOLVER.ACCUMULATION", "2"), True, [1] * 6, 1),
        # SDTPS's losses have no weight, then half of it, then all of it: three recordings
        (("MODEL.SDTPS_WARMUP_EPOCHS", "2", "SOLVER.MAX_EPOCHS", "5"), False, [2] * 4 + [3] * 4 + [4] * 4 + [5] * 2, 3),
    ],
)
def test_replayed_steps_are_those_that_are_not_replayed(tiny_cfg, fake_graphs, opts, present, epochs, graphs):
    batches = [make_batch(i, present=present) for i in range(len(epochs))]
    plain, expected = train(tiny_cfg(*opts, "SOLVER.CUDA_GRAPH", "False"), batches, epochs)
    assert not fake_graphs
    told, weights = train(tiny_cfg(*opts), batches, epochs)
    assert len(fake_graphs) == graphs
    assert sum(graph.replays for graph in fake_graphs) == len(epochs) - graphs * WARM_UP
    kept_as = torch.bfloat16 if "bf16" in opts else torch.float32
    assert {image.dtype for graph in fake_graphs for image in graph.call[1].images.values()} == {kept_as}
    for a, b in zip(plain, told, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(b[name], a[name], rtol=1e-5, atol=1e-6)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_batch_of_another_size_is_recorded_anew(tiny_cfg, fake_graphs):
    sizes = [8, 8, 8, 4, 4, 4, 4]
    batches = [make_batch(i, size) for i, size in enumerate(sizes)]
    plain, _ = train(tiny_cfg("SOLVER.CUDA_GRAPH", "False"), batches, [1] * 7)
    told, _ = train(tiny_cfg(), batches, [1] * 7)
    assert [graph.replays for graph in fake_graphs] == [1, 2] and all(graph.dropped for graph in fake_graphs)
    losses = [[step["loss"].item() for step in steps] for steps in (plain, told)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_first_passes_run_on_the_stream_of_the_recording(tiny_cfg, fake_graphs, fake_streams):
    """Each behind what was under way, and before what follows."""
    cfg = tiny_cfg()
    model = make_model(cfg, num_classes=6, num_cameras=2, pretrained=False)
    replayed = ReplayedPass(lambda batch, epoch: ({}, fake_streams[-1]), model, make_loss(cfg, 6), FakeStream())
    for i in range(1, WARM_UP + 1):
        _, used = replayed(make_batch(0), 1)
        assert used is replayed.stream and used is not fake_streams[-1]
        assert used.waited_for == i * [fake_streams[-1]] and fake_streams[-1].waited_for == i * [used]


def test_what_cannot_be_recorded_is_told_with_the_key_that_helps(tiny_cfg, monkeypatch, fake_streams):
    class Graph:
        pass

    @contextmanager
    def recording(graph, stream, capture_error_mode):
        try:
            yield
        finally:  # as torch does it: the recording that was spoilt fails once more as it ends
            raise RuntimeError("operation failed due to a previous error during capture")

    def waits(batch, epoch):
        raise RuntimeError("operation not permitted when stream is capturing\nSearch for …")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    cfg = tiny_cfg()
    model = make_model(cfg, num_classes=6, num_cameras=2, pretrained=False)
    replayed = ReplayedPass(waits, model, make_loss(cfg, 6), FakeStream())
    replayed.run = lambda batch, epoch: ({}, None)
    for _ in range(WARM_UP):
        replayed(make_batch(0), 1)
    replayed.run = waits
    with pytest.raises(UserError, match=r"not permitted when stream is capturing\. Set SOLVER\.CUDA_GRAPH False"):
        replayed(make_batch(0), 1)


@pytest.mark.parametrize(
    ("opts", "fused", "idle", "found"),
    [
        ((), False, [], []),
        (("SOLVER.GRAD_CHECKPOINT", "True"), True, [], []),
        (
            ("SOLVER.GRAD_CHECKPOINT", "True"),
            False,
            [],
            ["SOLVER.GRAD_CHECKPOINT of blocks that are not fused"],
        ),
        (("SOLVER.DETERMINISTIC", "True"), True, [], ["SOLVER.DETERMINISTIC"]),
        ((), True, ["sdtps.scale"], ["several ranks, and parts that do not learn from the first step on"]),
    ],
)
def test_what_stands_in_the_way_of_a_recording(tiny_cfg, opts, fused, idle, found):
    assert obstacles(tiny_cfg(*opts), fused, idle) == found


@pytest.mark.parametrize(
    ("device", "opts", "recorded", "told"),
    [
        ("cuda", (), True, ""),
        ("cuda", ("SOLVER.DETERMINISTIC", "True"), False, "kernel by kernel, not replayed as a CUDA graph: SOLVER.DET"),
        ("cuda", ("SOLVER.CUDA_GRAPH", "False"), False, ""),
        ("cpu", (), False, ""),
    ],
)
def test_steps_are_replayed_on_cuda_where_asked_for_and_the_log_says_why_not(
    tiny_cfg, caplog, fake_streams, device, opts, recorded, told
):
    class Model:
        def parameters(self):
            yield type("Parameter", (), {"device": torch.device(device)})

    cfg = tiny_cfg(*opts, "SOLVER.AMP", "float32")
    with caplog.at_level(logging.INFO, "engine.cuda_graph"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.cuda_graph, "has_fused_blocks", lambda model, dtype: False)
        stream = recording_stream(cfg, Model())
    assert isinstance(stream, FakeStream) is recorded and (stream is None) is not recorded
    assert told in caplog.text and bool(told) is bool(caplog.messages)


def test_what_exchanges_gradients_is_made_on_the_stream_of_the_recording(tiny_cfg, monkeypatch, fake_streams):
    """It keeps autograd's nodes of the parameters, which keep the stream on which they were made."""
    cfg, stream, made = tiny_cfg(), FakeStream(), []
    objective = Objective(make_model(cfg, num_classes=6, num_cameras=2, pretrained=False), make_loss(cfg, 6))
    monkeypatch.setattr(engine.parallel, "world_size", lambda: 2)

    def wrapped(parallel, module, **options):
        made.append((module, fake_streams[-1], options["find_unused_parameters"]))
        assert options["bucket_cap_mb"] == 160

    monkeypatch.setattr(engine.parallel.DistributedDataParallel, "__init__", wrapped)
    engine.parallel.parallel(objective, [], stream)
    engine.parallel.parallel(objective, ["sdtps.scale"], None)
    assert made == [(objective, stream, False), (objective, fake_streams[-1], True)]
    assert stream.waited_for == [fake_streams[-1]] and fake_streams[-1].waited_for == [stream]


def test_of_several_ranks_more_passes_come_before_a_recording(tiny_cfg, monkeypatch):
    cfg = tiny_cfg()
    model = make_model(cfg, num_classes=6, num_cameras=2, pretrained=False)
    for ranks, passes in ((1, 2), (2, 11)):
        monkeypatch.setattr(engine.cuda_graph, "world_size", lambda ranks=ranks: ranks)
        assert ReplayedPass(lambda *a: None, model, make_loss(cfg, 6), FakeStream()).warm_up == passes
