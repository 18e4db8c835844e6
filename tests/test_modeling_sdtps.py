"""SDTPS: what it selects, what it makes of it, and what "gradient-enabled" means, assertion by assertion."""

import numpy as np
import pytest
import torch
from reference import REFERENCE, reference_state, relative_error

from modeling import foreign
from modeling.pooling import POOLS, make_pool
from modeling.sdtps import SDTPS, Choice, token_counts
from utils.modalities import MODALITIES

SIZES = {"toy": dict(num_patches=12, embed_dim=16), "full": dict(num_patches=128, embed_dim=512)}


@pytest.fixture(params=SIZES)
def size(request):
    return SIZES[request.param]


def make(size, seed=0, **kwargs):
    torch.manual_seed(seed)
    return SDTPS(**size, **kwargs)


def inputs(size, batch=2, dtype=torch.float32, seed=1, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)

    tokens = {m: draw(batch, size["num_patches"], size["embed_dim"]) for m in MODALITIES}
    return tokens, {m: draw(batch, size["embed_dim"]) for m in MODALITIES}


def aggregated(selection, m, sdtps):
    """The aggregated tokens of a modality, without the fused one."""
    return selection.tokens[m][:, : sdtps.num_aggregated]


def random_loss(selection, seed=5, pick=lambda tokens: tokens):
    """A random linear function of the output tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.stack([pick(selection.tokens[m]) for m in MODALITIES])
    return (tokens * torch.randn(tokens.shape, generator=generator, dtype=torch.float64).to(tokens.dtype)).sum()


# --- the method ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patches", "sparse", "aggr", "expected"),
    [
        (128, 0.5, 0.4, (64, 25)),
        (128, 0.7, 0.5, (90, 45)),
        (100, 0.07, 1.0, (7, 7)),  # 100 * 0.07 is 7.000000000000001 in floating point
        (10, 0.3, 0.1, (3, 1)),
        (100, 1.0, 0.29, (100, 29)),  # 100 * 0.29 is 28.999999999999996
        (1, 0.5, 0.4, (1, 1)),
    ],
)
def test_token_counts(patches, sparse, aggr, expected):
    assert token_counts(patches, sparse, aggr) == expected


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01])
def test_ratios_outside_the_interval_are_refused(ratio):
    with pytest.raises(ValueError, match="sparse_ratio"):
        token_counts(10, ratio, 0.5)
    with pytest.raises(ValueError, match="aggr_ratio"):
        token_counts(10, 0.5, ratio)


def naive_scores(sdtps, tokens, globals_, m, b):
    """The score of every patch of one sample by loops over the definition."""
    beta, scores = sdtps.beta, []

    def normalised(global_):
        sims = [float(torch.dot(v, global_) / (v.norm() * global_.norm())) for v in tokens[m][b]]
        return [(s - min(sims)) / max(max(sims) - min(sims), 1e-2) for s in sims]

    own = normalised(globals_[m][b])
    others = [normalised(globals_[o][b]) for o in MODALITIES if o != m]
    for i, v in enumerate(tokens[m][b]):
        predicted = float(sdtps.predictor[m](v).sigmoid().detach())
        scores.append((1 - 2 * beta) * predicted + beta * (others[0][i] + others[1][i] + 2 * own[i]))
    return scores


def test_forward_against_a_naive_loop():
    size = SIZES["toy"]
    sdtps = make(size, sparse_ratio=0.5, aggr_ratio=0.4, beta=0.2, temperature=0.3).double()
    tokens, globals_ = inputs(size, batch=3, dtype=torch.float64)
    selection = sdtps(tokens, globals_)
    for m in MODALITIES:
        for b in range(3):
            scores = naive_scores(sdtps, tokens, globals_, m, b)
            assert selection.scores[m][b].tolist() == pytest.approx(scores, rel=1e-9)
            ranking = sorted(range(len(scores)), key=lambda i: -scores[i])
            kept, dropped = ranking[:6], ranking[6:]
            assert selection.kept[m][b].tolist() == kept
            assert selection.mask[m][b].nonzero().flatten().tolist() == sorted(kept)

            aggregator = sdtps.aggregator[m]
            logits = [
                aggregator.scale * aggregator.fc2(torch.nn.functional.gelu(aggregator.fc1(aggregator.norm(v))))
                + scores[i] / 0.3
                for i, v in ((i, tokens[m][b, i]) for i in kept)
            ]
            for a in range(sdtps.num_aggregated):
                share = torch.stack([row[a] for row in logits]).exp()
                expected = sum(w * tokens[m][b, i] for w, i in zip(share / share.sum(), kept, strict=True))
                torch.testing.assert_close(selection.tokens[m][b, a], expected)
            share = torch.tensor([scores[i] for i in dropped], dtype=torch.float64).exp()
            expected = sum(w * tokens[m][b, i] for w, i in zip(share / share.sum(), dropped, strict=True))
            torch.testing.assert_close(selection.tokens[m][b, -1], expected)


def test_matches_the_published_forks_numbers():
    state = foreign.translate(reference_state("sdtps"))
    sdtps = SDTPS(embed_dim=512, num_patches=128, sparse_ratio=0.5, aggr_ratio=0.4, beta=0.25, temperature=0)
    sdtps.load_state_dict({key.removeprefix("sdtps."): value for key, value in state.items()})
    rng = np.random.default_rng(31)
    tokens = torch.tensor(rng.standard_normal((3, 2, 128, 512)), dtype=torch.float32)
    globals_ = torch.tensor(rng.standard_normal((3, 2, 512)), dtype=torch.float32)
    with torch.no_grad():
        selection = sdtps(dict(zip(MODALITIES, tokens, strict=True)), dict(zip(MODALITIES, globals_, strict=True)))

    reference = np.load(REFERENCE / "sdtps.npz")
    pooled = torch.cat([selection.tokens[m].mean(1) for m in MODALITIES], dim=-1)
    assert relative_error(pooled, reference["pooled"]) <= 1e-4
    kept = torch.stack([selection.mask[m] for m in MODALITIES]).numpy()
    assert (kept == reference["kept"].astype(bool)).all()


def test_ratio_one_keeps_all_and_adds_no_token(size):
    sdtps = make(size, sparse_ratio=1.0)
    selection = sdtps(*inputs(size))
    for m in MODALITIES:
        assert selection.mask[m].all()
        assert selection.tokens[m].shape == (2, sdtps.num_aggregated, size["embed_dim"])


def test_wrong_number_of_patches_is_named():
    with pytest.raises(ValueError, match=r"got 7 patch tokens.* built for 12"):
        make(SIZES["toy"])(*inputs(dict(num_patches=7, embed_dim=16)))


def test_gumbel_samples_in_training_only_and_by_importance():
    size = SIZES["toy"]
    sdtps = make(size, use_gumbel=True, gumbel_tau=0.1)
    tokens, globals_ = inputs(size)
    plain = make(size)(tokens, globals_)
    sampled = [sdtps(tokens, globals_) for _ in range(200)]
    masks = torch.stack([s.mask["RGB"] for s in sampled]).float()
    assert (masks.sum(-1) == sdtps.num_kept).all()
    assert masks.mean(0).std() > 0 and (masks.mean(0) < 1).any()
    order = plain.scores["RGB"][0].argsort(descending=True)
    assert masks.mean(0)[0, order[:3]].mean() > masks.mean(0)[0, order[-3:]].mean() + 0.3
    assert torch.equal(sdtps.eval()(tokens, globals_).mask["RGB"], plain.mask["RGB"])


def test_gumbel_frequencies_are_those_of_the_softmax():
    """With K = 1 the Gumbel-max trick draws patch i with probability softmax(s / tau)_i."""
    size = dict(num_patches=4, embed_dim=8)
    sdtps = make(size, sparse_ratio=0.25, use_gumbel=True, gumbel_tau=0.5)
    scores = torch.tensor([0.9, 0.6, 0.3, 0.1]).expand(3, 20000, 4)
    kept, _ = sdtps.choose(scores)
    frequency = torch.bincount(kept[0].flatten(), minlength=4) / 20000
    torch.testing.assert_close(frequency, (scores[0, 0] / 0.5).softmax(-1), atol=0.015, rtol=0)


def test_random_choice_keeps_any_patches_alike_and_changes_nothing_else():
    size = SIZES["toy"]
    sdtps = make(size, choice="random")
    tokens, globals_ = inputs(size, batch=3)
    drawn = [sdtps(tokens, globals_) for _ in range(300)]
    kept = torch.stack([torch.stack([s.mask[m] for m in MODALITIES]) for s in drawn]).float()
    assert (kept.sum(-1) == sdtps.num_kept).all()
    torch.testing.assert_close(kept.mean(0), torch.full((3, 3, 12), 0.5), atol=0.15, rtol=0)  # 5 standard deviations
    assert (kept[:, 0] != kept[:, 1]).any() and (kept[:, :, 0] != kept[:, :, 1]).any()
    plain, selection = make(size), drawn[0]
    expected = plain(tokens, globals_)
    v, scores = (torch.stack([x[m] for m in MODALITIES]) for x in (tokens, expected.scores))
    kept = torch.stack([selection.kept[m] for m in MODALITIES])
    left = (~torch.stack([selection.mask[m] for m in MODALITIES])).nonzero()[:, 2].view(3, 3, 6)
    made = plain.aggregate(v, Choice(scores, scores, kept, left))
    for m in MODALITIES:
        assert torch.equal(selection.scores[m], expected.scores[m])
        torch.testing.assert_close(selection.tokens[m], made.tokens[m])


def test_random_choice_is_fixed_in_evaluation():
    """By the place in the batch: neither weights, nor the global random state, nor what stands behind it matters."""
    size = SIZES["toy"]
    one = make(size, choice="random").eval()(*inputs(size, batch=5))
    other = make(size, seed=3, choice="random").eval()
    state = torch.get_rng_state()
    again = other(*inputs(size, batch=3, seed=4))
    assert torch.equal(torch.get_rng_state(), state)
    for m in MODALITIES:
        assert torch.equal(one.kept[m][:3], again.kept[m])
    rows = torch.cat([one.mask[m] for m in MODALITIES])
    assert len(rows.unique(dim=0)) == len(rows)  # another choice for each image and modality


def test_absent_modality_gives_no_score_and_zeros():
    size = SIZES["toy"]
    sdtps = make(size)
    tokens, globals_ = inputs(size)
    present = torch.tensor([[True, True, False], [True, True, True]])
    selection = sdtps(tokens, globals_, present)
    full = sdtps(tokens, globals_)
    assert (selection.tokens["TI"][0] == 0).all() and (selection.tokens["TI"][1] != 0).any()
    torch.testing.assert_close(selection.scores["RGB"][1], full.scores["RGB"][1])
    # what TI holds does not reach the other modalities of the sample that lacks it
    noise = {**tokens, "TI": tokens["TI"] * 3 + 1}
    other = sdtps(noise, {**globals_, "TI": -globals_["TI"]}, present)
    assert torch.equal(other.tokens["RGB"][0], selection.tokens["RGB"][0])
    assert not torch.equal(other.tokens["RGB"][1], selection.tokens["RGB"][1])
    # its weight goes to the rest: similarities still add up to 4 beta
    weight = sdtps._similarity_weights(torch.stack([tokens[m] for m in MODALITIES]), present)
    torch.testing.assert_close(weight[0, 0, :, 0], torch.tensor([2 / 3, 1 / 3, 0.0]))
    torch.testing.assert_close(weight[0, 1, :, 0], torch.tensor([0.5, 0.25, 0.25]))


# --- gradient-enabled ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["cosine", "attention"])
def test_1_predictor_learns_from_the_kept_tokens(size, similarity):
    sdtps = make(size, similarity=similarity)
    random_loss(sdtps(*inputs(size)), pick=lambda t: t[:, : sdtps.num_aggregated]).backward()
    for name, parameter in sdtps.named_parameters():
        if name.startswith(("predictor.", "query.", "key.")):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, f"no gradient at {name}"


@pytest.mark.parametrize("similarity", ["cosine", "attention"])
def test_2_every_global_reaches_every_modality(size, similarity):
    sdtps = make(size, similarity=similarity)
    tokens, globals_ = inputs(size, requires_grad=True)
    selection = sdtps(tokens, globals_)
    for m in MODALITIES:
        output = aggregated(selection, m, sdtps)
        loss = (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(3))).sum()
        for o, gradient in zip(
            MODALITIES,
            torch.autograd.grad(loss, [globals_[o] for o in MODALITIES], retain_graph=True),
            strict=True,
        ):
            assert gradient.norm(dim=-1).min() > 0, f"global {o} does not reach the tokens of {m}"


@pytest.mark.parametrize("similarity", ["cosine", "attention"])
def test_3_autograd_is_the_true_derivative(size, similarity, monkeypatch):
    sdtps = make(size, similarity=similarity).double()
    tokens, globals_ = inputs(size, dtype=torch.float64, requires_grad=True)
    selection = sdtps(tokens, globals_)
    choice = sdtps.choose(torch.stack([selection.scores[m] for m in MODALITIES]))
    monkeypatch.setattr(sdtps, "choose", lambda scores: choice)  # the selection held fixed

    leaves = [*tokens.values(), *globals_.values(), *sdtps.parameters()]
    gradients = torch.autograd.grad(random_loss(selection), leaves)
    generator = torch.Generator().manual_seed(9)
    directions = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in leaves]
    analytic = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    step, values = 1e-6, []
    with torch.no_grad():
        for sign in (1, -1):
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf += sign * step * direction
            values.append(random_loss(sdtps(tokens, globals_)))
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf -= sign * step * direction
    numeric = (values[0] - values[1]) / (2 * step)
    assert float(numeric) == pytest.approx(float(analytic), rel=1e-3)


def test_4_a_common_shift_of_the_scores_changes_nothing(size):
    sdtps = make(size).double()
    tokens, _ = inputs(size, dtype=torch.float64)
    v = torch.stack([tokens[m] for m in MODALITIES])
    scores = torch.rand(v.shape[:3], dtype=torch.float64, requires_grad=True)
    selection = sdtps.aggregate(v, Choice(scores, scores, *sdtps.choose(scores)))
    out = torch.stack([selection.tokens[m] for m in MODALITIES])
    (gradient,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), scores)
    assert (gradient.sum(-1).abs() <= 1e-6 * gradient.norm(dim=-1)).all()
    assert gradient.norm(dim=-1).min() > 0


def test_5_the_score_path_is_neither_starved_nor_exploding():
    size = SIZES["full"]
    sdtps = make(size, temperature=0.3)
    tokens, globals_ = inputs(size, batch=4, requires_grad=True)

    def token_gradient(mode):
        sdtps.score_grad = mode
        selection = sdtps(tokens, globals_)
        pooled = torch.cat([selection.tokens[m].mean(1) for m in MODALITIES], dim=-1)
        loss = (pooled * torch.randn(pooled.shape, generator=torch.Generator().manual_seed(2))).sum()
        return torch.stack(torch.autograd.grad(loss, [tokens[m] for m in MODALITIES]))

    value = token_gradient("none")
    score = token_gradient("all") - value
    assert 0.05 <= float(score.norm() / value.norm()) <= 1


@pytest.mark.parametrize("similarity", ["cosine", "attention"])
@pytest.mark.parametrize("pool", POOLS)
def test_5_every_parameter_moves_in_one_step(similarity, pool):
    size = SIZES["toy"]
    sdtps = make(size, similarity=similarity)
    module = make_pool(pool, size["embed_dim"])
    parameters = dict(sdtps.named_parameters()) | {f"pool.{k}": p for k, p in module.named_parameters()}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    tokens, globals_ = inputs(size)
    selection = sdtps(tokens, globals_)
    pooled = module(*(torch.stack([x[m] for m in MODALITIES]) for x in (selection.tokens, globals_)))
    (pooled * torch.randn(pooled.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    optimizer.step()
    unseen_by_softmax = ("fc2.bias",)
    still = [
        name for name, p in parameters.items() if torch.equal(p, before[name]) and not name.endswith(unseen_by_softmax)
    ]
    assert not still, f"did not move: {still}"


def token_gradient(sdtps, tokens, globals_, autocast=None):
    """Largest gradient entry at the inputs for a random loss; asserts that the output is finite."""
    leaves = [*tokens.values(), *globals_.values()]
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        selection = sdtps(tokens, globals_)
        assert all(selection.tokens[m].isfinite().all() for m in MODALITIES)
        loss = random_loss(selection)
    gradients = torch.autograd.grad(loss, leaves)
    assert all(g.isfinite().all() for g in gradients)
    return max(float(g.abs().max()) for g in gradients)


def zero_modality(tokens, globals_):
    tokens["NI"], globals_["NI"] = torch.zeros_like(tokens["NI"]), torch.zeros_like(globals_["NI"])


def hostile(change):
    def apply(tokens, globals_):
        for m in MODALITIES:
            tokens[m], globals_[m] = change(tokens[m], globals_[m])

    return apply


HOSTILE = {
    "constant tokens": hostile(lambda v, g: (torch.ones_like(v), g)),
    "one token everywhere": hostile(lambda v, g: (v[:, :1].expand_as(v).clone(), g)),
    "zero tokens": hostile(lambda v, g: (torch.zeros_like(v), g)),
    "a few zero tokens": hostile(lambda v, g: (v * (torch.arange(v.shape[1]) % 3 > 0)[:, None], g)),
    "zero globals": hostile(lambda v, g: (v, torch.zeros_like(g))),
    "tiny globals": hostile(lambda v, g: (v, 1e-5 * g / g.norm(dim=-1, keepdim=True))),
    "all zero": hostile(lambda v, g: (torch.zeros_like(v), torch.zeros_like(g))),
    "a zeroed modality": zero_modality,
    "large tokens": hostile(lambda v, g: (v * 1e4, g * 1e4)),
}


@pytest.mark.parametrize("similarity", ["cosine", "attention"])
@pytest.mark.parametrize("case", HOSTILE)
def test_6_hostile_input(size, case, similarity):
    sdtps = make(size, similarity=similarity)
    tokens, globals_ = inputs(size)
    ordinary = token_gradient(sdtps, *inputs(size, requires_grad=True))
    HOSTILE[case](tokens, globals_)
    for d in (tokens, globals_):
        for m in MODALITIES:
            d[m].requires_grad_(True)
    for autocast in (None, torch.bfloat16, torch.float16):
        assert token_gradient(sdtps, tokens, globals_, autocast) <= 1e4 * ordinary


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_6_half_types_promote(autocast):
    size = SIZES["toy"]
    sdtps = make(size)
    tokens, globals_ = inputs(size, dtype=autocast)
    selection = sdtps(tokens, globals_)
    assert selection.tokens["RGB"].dtype == torch.float32
    exact = sdtps({m: v.float() for m, v in tokens.items()}, {m: v.float() for m, v in globals_.items()})
    with torch.autocast("cpu", dtype=autocast):
        inside = sdtps(tokens, globals_)
    for m in MODALITIES:
        assert torch.equal(inside.tokens[m], exact.tokens[m]) and torch.equal(selection.kept[m], exact.kept[m])


@pytest.mark.parametrize(
    ("kwargs", "batch"),
    [(dict(num_patches=12, sparse_ratio=1.0), 2), (dict(num_patches=1), 2), (dict(num_patches=12), 1)],
    ids=["ratio 1", "one patch", "batch of one"],
)
def test_6_edge_sizes(kwargs, batch):
    size = dict(num_patches=kwargs.pop("num_patches"), embed_dim=16)
    sdtps = make(size, **kwargs)
    tokens, globals_ = inputs(size, batch=batch, requires_grad=True)
    assert token_gradient(sdtps, tokens, globals_) > 0


def test_7_score_grad_turns_off_what_it_says(size):
    tokens, globals_ = inputs(size, requires_grad=True)
    outputs, gradients = {}, {}
    for mode in ("all", "predictor", "none"):
        sdtps = make(size, score_grad=mode)
        selection = sdtps(tokens, globals_)
        outputs[mode] = torch.stack([selection.tokens[m] for m in MODALITIES])
        leaves = [*globals_.values(), *sdtps.predictor.parameters(), tokens["RGB"]]
        gradients[mode] = torch.autograd.grad(random_loss(selection), leaves, allow_unused=True)
    assert torch.equal(outputs["all"], outputs["predictor"]) and torch.equal(outputs["all"], outputs["none"])

    def attached(mode, part):
        return [g is not None and bool(g.abs().sum() > 0) for g in gradients[mode][part]]

    globals_part, predictor_part, tokens_part = slice(0, 3), slice(3, -1), slice(-1, None)
    assert all(attached("all", globals_part)) and all(attached("all", predictor_part))
    assert not any(attached("predictor", globals_part)) and all(attached("predictor", predictor_part))
    assert not any(attached("none", globals_part)) and not any(attached("none", predictor_part))
    for mode in gradients:
        assert all(attached(mode, tokens_part))
    different = [gradients[mode][-1] for mode in gradients]
    assert not torch.allclose(different[0], different[1]) and not torch.allclose(different[1], different[2])


def test_temperature_zero_leaves_scores_out_of_the_aggregation(size):
    sdtps = make(size, temperature=0.0)
    tokens, globals_ = inputs(size, requires_grad=True)
    selection = sdtps(tokens, globals_)
    loss = random_loss(selection, pick=lambda t: t[:, : sdtps.num_aggregated])
    gradients = torch.autograd.grad(loss, [*globals_.values(), *sdtps.predictor.parameters()], allow_unused=True)
    assert all(g is None or g.abs().sum() == 0 for g in gradients)
