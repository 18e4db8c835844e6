from pathlib import Path

import numpy as np
import pytest
import torch

from utils.errors import UserError
from utils.metrics import rank_metrics
from utils.reranking import _nearest, re_ranking

REFERENCE = np.load(Path(__file__).parent / "data/reference/ranking.npz")


def naive_re_ranking(query, gallery, k1, k2, lambda_value):
    """Sets and loops, float64."""
    features, queries = np.concatenate([query, gallery]).astype(np.float64), len(query)
    n = len(features)
    distance = ((features[:, None] - features) ** 2).sum(-1)
    distance /= distance.max(1, keepdims=True)
    ranking = np.argsort(distance, 1, kind="stable")

    def reciprocal(i, k):
        return {j for j in ranking[i, : k + 1] if i in ranking[j, : k + 1]}

    encoding = np.zeros((n, n))
    for i in range(n):
        core = reciprocal(i, k1)
        expanded = set(core)
        for candidate in core:
            offered = reciprocal(candidate, round(k1 / 2))
            if 3 * len(offered & core) > 2 * len(offered):
                expanded |= offered
        members = sorted(expanded)
        encoding[i, members] = np.exp(-distance[i, members]) / np.exp(-distance[i, members]).sum()
    encoding = np.stack([encoding[ranking[i, :k2]].mean(0) for i in range(n)])
    overlap = np.minimum(encoding[:queries, None], encoding[None, queries:]).sum(-1)
    return (1 - lambda_value) * (1 - overlap / (2 - overlap)) + lambda_value * distance[:queries, queries:]


def clusters(seed, queries, gallery, identities=6, width=8):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((identities, width))
    draw = lambda n: (centres[rng.integers(0, identities, n)] + rng.standard_normal((n, width))).astype(np.float32)  # noqa: E731
    return draw(queries), draw(gallery)


def test_reference():
    distance = re_ranking(REFERENCE["qf"], REFERENCE["gf"]).numpy()
    expected = REFERENCE["rerank_distance"]
    assert np.linalg.norm(distance - expected) / np.linalg.norm(expected) < 1e-3
    cmc, mean_ap = rank_metrics(distance, *(REFERENCE[name] for name in ("q_pid", "g_pid", "q_cam", "g_cam")))
    np.testing.assert_allclose(cmc, REFERENCE["rerank_cmc"], atol=1e-3)
    assert mean_ap == pytest.approx(float(REFERENCE["rerank_map"]), abs=1e-3)


@pytest.mark.parametrize("k1, k2, lambda_value", [(20, 6, 0.3), (5, 1, 0.0), (7, 9, 0.5), (60, 3, 0.3), (1, 1, 1.0)])
@pytest.mark.parametrize("chunk", [16, 512])
def test_naive_loop(k1, k2, lambda_value, chunk, monkeypatch):
    monkeypatch.setattr("utils.reranking.CHUNK", chunk)
    query, gallery = clusters(0, 9, 41)
    distance = re_ranking(torch.tensor(query), torch.tensor(gallery), k1, k2, lambda_value)
    expected = naive_re_ranking(query, gallery, k1, k2, lambda_value)
    assert distance.shape == (9, 41)
    np.testing.assert_allclose(distance.numpy(), expected, atol=1e-5)


def test_copies_of_one_image_stay_finite():
    distance = re_ranking(torch.ones(3, 4), torch.ones(30, 4))
    assert distance.isfinite().all()


def test_an_image_comes_before_its_copies():
    assert _nearest(torch.zeros(6, 6), 2)[:, 0].tolist() == list(range(6))


def test_does_not_change_its_input():
    query, gallery = (torch.tensor(part) for part in clusters(1, 4, 12))
    before = query.clone(), gallery.clone()
    re_ranking(query, gallery)
    assert torch.equal(query, before[0]) and torch.equal(gallery, before[1])


def test_refusals():
    query, gallery = torch.randn(2, 4), torch.randn(5, 4)
    with pytest.raises(UserError, match=r"lambda_value 1\.5"):
        re_ranking(query, gallery, lambda_value=1.5)
    with pytest.raises(UserError, match="k1 0"):
        re_ranking(query, gallery, k1=0)
    gallery[3, 1] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        re_ranking(query, gallery)
