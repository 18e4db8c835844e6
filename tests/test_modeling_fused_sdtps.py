"""SDTPS by kernels, under Triton's interpreter, against SDTPS as written; where they are used, and where not."""

import pytest
import torch

from modeling import fused_sdtps
from modeling.fused_sdtps import FusedSDTPS, can_fuse, kernels_agree, relative_errors
from modeling.kernels import selection
from modeling.sdtps import NORM_FLOOR, SDTPS
from utils import kernels
from utils.kernels import has_triton, triton

pytestmark = pytest.mark.skipif(not has_triton(), reason="no Triton, or an old one: the kernels are not used")

CPU = torch.device("cpu")
SIZES = {"embed_dim": 64, "num_patches": 16}


@pytest.fixture
def pretend(monkeypatch):
    """As if the CPU were a GPU with kernels for float32 too, which have proven themselves."""
    monkeypatch.setattr(fused_sdtps, "can_fuse", lambda sdtps, v: True)


def batch(seed=0):
    torch.manual_seed(seed)
    v, g = torch.randn(3, 2, 16, 64), torch.randn(3, 2, 64)
    v[0, 0, 3] = 0.1 * NORM_FLOOR * v[0, 0, 3]  # patches and a global without direction
    v[1, 1] = 0
    g[2, 0] = 0
    v[2, 1, 5] = v[2, 1, 4]  # similarities that are equal
    return v.requires_grad_(), g.requires_grad_()


def both(**options):
    """The same SDTPS as written and by kernels."""
    torch.manual_seed(1)
    plain, fused = SDTPS(**SIZES, **options), FusedSDTPS(**SIZES, **options)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    fused.load_state_dict(plain.state_dict())
    return plain, fused


@pytest.mark.parametrize(
    ("options", "present"),
    [
        ({}, None),
        ({"beta": 0.4, "sparse_ratio": 0.3}, torch.tensor([[True, False, True], [True, True, True]])),
        ({"score_grad": "predictor", "temperature": 0.0}, None),
        ({"score_grad": "none"}, None),
        ({"sparse_ratio": 1.0}, None),
    ],
)
def test_selection_and_gradients_are_those_of_sdtps_as_written(pretend, options, present):
    results = []
    for sdtps in both(**options):
        v, g = batch()
        made = sdtps.select(v, g, present)
        tokens, scores, predicted = (torch.stack(list(x.values())) for x in (made.tokens, made.scores, made.predicted))
        torch.manual_seed(2)
        loss = sum((x * torch.randn_like(x)).sum() for x in (tokens, scores, predicted))
        leaves = [v, g, *sdtps.parameters()]
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        results.append([tokens, scores, *grads])
        if isinstance(sdtps, FusedSDTPS) and sdtps.num_kept < sdtps.num_patches:
            # the predictor's come from a kernel; laid out otherwise, DistributedDataParallel would copy them
            laid_out = dict(zip((id(leaf) for leaf in leaves), grads, strict=True))
            for weight in sdtps.predictor.parameters():
                assert laid_out[id(weight)] is None or laid_out[id(weight)].stride() == weight.stride()
    for a, b in zip(*results, strict=True):
        if b is None:
            assert a is None or not a.any()
        else:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * (1 + b.abs().max().item()))


def test_patches_that_lie_apart_are_scored_where_they_lie():
    """As the backbone leaves them: behind the prefix token of each image."""
    _, sdtps = both()
    tokens, (_, g) = torch.randn(3, 2, 17, 64, requires_grad=True), batch()
    results = []
    for v in (
        tokens[:, :, 1:],
        tokens[:, :, 1:].contiguous(),
        tokens[:, :, 1:].transpose(0, 1).contiguous().transpose(0, 1),
    ):
        scores, predicted, same = sdtps.score_by_kernels(v, g)
        assert torch.equal(same, v) and same.is_contiguous()
        loss = (scores * torch.arange(16)).sum() + predicted.sum() + same.square().sum()
        results.append([scores, *torch.autograd.grad(loss, [tokens, g, *sdtps.predictor.parameters()])])
    for found in results[1:]:
        for a, b in zip(results[0], found, strict=True):
            torch.testing.assert_close(a, b)


def test_similarities_within_the_smallest_range_are_not_blown_up(pretend):
    results = []
    for sdtps in both():
        torch.manual_seed(3)
        v = (torch.randn(3, 2, 1, 64) + 1e-3 * torch.randn(3, 2, 16, 64)).requires_grad_()
        scores = sdtps.decide(v, torch.randn(3, 2, 64)).scores
        results.append([scores, *torch.autograd.grad(scores.square().sum(), v)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * (1 + b.abs().max().item()))


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
def test_the_check_s_errors_are_those_of_the_arithmetic(dtype, largest):
    """Scores are as exact as in float32: they decide. No random numbers are taken from those of a run."""
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        errors = relative_errors(16, 64, dtype, CPU, batch=2)
    assert {"scores", "predicted", "tokens", "patches", "globals", "RGB.0.weight"} < errors.keys()
    assert max(own for own, _ in errors.values()) < largest, errors
    assert errors["scores"][0] < 1e-5 and errors["predicted"][0] < 1e-5, errors
    assert torch.equal(state, torch.get_rng_state())


def test_a_wrong_kernel_is_found_and_sdtps_is_then_not_fused(monkeypatch, caplog):
    monkeypatch.setattr(fused_sdtps, "part_patches", lambda v, *args: selection.part_patches(v.flip(0), *args))
    kernels_agree.cache_clear()
    assert not kernels_agree(16, 64, torch.float32, CPU)
    assert "SDTPS is not fused, so steps are slower: tokens differs by" in caplog.text
    kernels_agree.cache_clear()


def test_scores_without_a_gradient_leave_the_predictor_alone(pretend):
    """A gradient of zeros would do: Adam makes steps of weight decay alone."""
    for sdtps in both(score_grad="none"):
        v, g = batch()
        made = sdtps.select(v, g)
        sum(tokens.sum() for tokens in made.tokens.values()).backward()
        assert v.grad.abs().sum() > 0 and g.grad is None
        assert all(parameter.grad is None for parameter in sdtps.predictor.parameters())
        assert all(parameter.grad is not None for name, parameter in sdtps.aggregator.named_parameters())


@pytest.mark.parametrize("embed_dim", [192, 320])  # a predictor of 48 and 80 units
def test_any_width_of_the_predictor(embed_dim):
    errors = relative_errors(16, embed_dim, torch.float32, CPU, batch=1)
    assert max(own for own, _ in errors.values()) < 1e-5, errors


def test_sizes_without_kernels_are_told(caplog):
    kernels_agree.cache_clear()
    with caplog.at_level("INFO"):
        assert not kernels_agree(210, 512, torch.bfloat16, CPU) and not kernels_agree(128, 500, torch.bfloat16, CPU)
    assert "SDTPS is not fused: there are no kernels for 210 patches of 512 channels" in caplog.text
    kernels_agree.cache_clear()


@pytest.mark.parametrize(("most", "tried"), [(3, [3]), (2, [3, 2]), (1, [3, 2, 1])])
def test_a_card_with_less_shared_memory_has_fewer_turns_in_flight(monkeypatch, most, tried):
    seen = []

    def launch(kernel, grid, *args, num_stages, **options):
        seen.append(num_stages)
        if num_stages > most:
            raise triton.runtime.errors.OutOfResources(num_stages, most, "shared memory")

    monkeypatch.setattr(kernels, "launch", launch)
    monkeypatch.setattr(kernels, "_fitting", {})
    for _ in range(2):
        kernels.launch_that_fits("kernel", (1,), torch.zeros(1), N=16)
    assert seen == [*tried, most]


def test_where_kernels_are_used(monkeypatch):
    monkeypatch.setattr(fused_sdtps, "can_launch", lambda device: True)
    monkeypatch.setattr(fused_sdtps, "kernels_agree", lambda patches, channels, *args: channels % 64 == 0)
    v = torch.zeros(3, 2, 16, 64, dtype=torch.bfloat16)
    assert can_fuse(FusedSDTPS(**SIZES), v) and can_fuse(FusedSDTPS(**SIZES), v.half())
    assert not can_fuse(FusedSDTPS(**SIZES), v.float())
    assert not can_fuse(FusedSDTPS(**SIZES, similarity="attention"), v)
    assert not can_fuse(FusedSDTPS(**SIZES), v[:, :, :15])
    assert not can_fuse(FusedSDTPS(**SIZES), v[..., :48])
    monkeypatch.setattr(fused_sdtps, "can_launch", lambda device: False)
    assert not can_fuse(FusedSDTPS(**SIZES), v)
