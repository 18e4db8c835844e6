from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from utils.errors import UserError
from utils.metrics import one_thread, pairwise_distance, rank_features, rank_metrics

REFERENCE = np.load(Path(__file__).parent / "data/reference/ranking.npz")
LABELS = [REFERENCE[name] for name in ("q_pid", "g_pid", "q_cam", "g_cam", "q_scene", "g_scene")]


def naive_metrics(distance, q_pid, g_pid, q_place, g_place, max_rank):
    """One query at a time, one gallery entry at a time."""
    curves, precisions = [], []
    for row, pid, place in zip(distance, q_pid, q_place, strict=True):
        ranking = sorted(range(len(row)), key=lambda j: (row[j], j))
        hits = [g_pid[j] == pid for j in ranking if not (g_pid[j] == pid and g_place[j] == place)]
        if not any(hits):
            continue
        curves.append([any(hits[: r + 1]) for r in range(max_rank)])
        precisions.append(np.mean([sum(hits[: r + 1]) / (r + 1) for r, hit in enumerate(hits) if hit]))
    return np.mean(curves, axis=0), np.mean(precisions)


def test_distances_of_the_reference():
    distance = pairwise_distance(torch.tensor(REFERENCE["qf"]), torch.tensor(REFERENCE["gf"]))
    np.testing.assert_allclose(distance.numpy(), REFERENCE["distance"], rtol=1e-5)


def test_distances_are_never_negative_and_promote_half_types():
    features = torch.nn.functional.normalize(torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) + 9)
    assert pairwise_distance(features, features).min() >= 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance = pairwise_distance(features[:5].half(), features[5:].half())
    exact = (features[:5, None].half().double() - features[None, 5:].half().double()).square().sum(-1)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance.double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("protocol", ["camera", "scene"])
@pytest.mark.parametrize("as_type", [np.asarray, torch.as_tensor])
def test_reference(protocol, as_type):
    cmc, mean_ap = rank_metrics(as_type(REFERENCE["distance"]), *map(as_type, LABELS), protocol=protocol)
    np.testing.assert_allclose(cmc, REFERENCE[f"{protocol}_cmc"], atol=1e-6)
    assert mean_ap == pytest.approx(float(REFERENCE[f"{protocol}_map"]), abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("gallery", [3, 40])
def test_naive_loop_with_ties_negative_distances_and_queries_without_a_match(seed, gallery, monkeypatch):
    monkeypatch.setattr("utils.metrics.CHUNK", 4)
    rng = np.random.default_rng(seed)
    distance = rng.integers(-4, 5, (21, gallery)) * rng.choice([0.25, -0.0, 0.1], (21, gallery))
    distance[0, 0] = np.inf
    q_pid, g_pid = rng.integers(0, 6, 21), rng.integers(0, 4, gallery)
    q_cam, g_cam = rng.integers(0, 2, 21), rng.integers(0, 2, gallery)
    q_pid[0], g_pid[0], q_cam[0], g_cam[0] = 1, 1, 0, 1
    cmc, mean_ap = rank_metrics(distance, q_pid, g_pid, q_cam, g_cam, max_rank=12)
    expected_cmc, expected_map = naive_metrics(distance.astype(np.float32), q_pid, g_pid, q_cam, g_cam, 12)
    np.testing.assert_allclose(cmc, expected_cmc, atol=1e-12)
    assert mean_ap == pytest.approx(expected_map, abs=1e-12)


def test_by_hand():
    # nearest first, the query's own camera left out: other id, match, other id, match
    cmc, mean_ap = rank_metrics(
        [[0.0, 0.4, 0.1, 0.2, 0.3]], q_pid=[7], g_pid=[7, 7, 5, 7, 6], q_cam=[0], g_cam=[0, 1, 0, 1, 1], max_rank=6
    )
    assert cmc.tolist() == [0, 1, 1, 1, 1, 1]
    assert mean_ap == pytest.approx((1 / 2 + 2 / 4) / 2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"protocol": "view"}, "'camera' or 'scene'"),
        ({"protocol": "scene"}, "needs q_scene"),
        ({"distance": [[0.0, float("nan")]]}, "1 of 2 distances are NaN"),
        ({"g_cam": [0, 0]}, "no query has a match"),
        ({"g_pid": [1]}, r"distance is \(1, 2\)"),
        ({"g_cam": [1]}, r"distance is \(1, 2\)"),
    ],
)
def test_refusals(change, message):
    arguments = {"distance": [[0.0, 1.0]], "q_pid": [1], "g_pid": [1, 2], "q_cam": [0], "g_cam": [1, 1]}
    rank_metrics(**arguments)
    with pytest.raises(UserError, match=message):
        rank_metrics(**arguments | change)


def whole_features(queries, gallery, channels, seed=0):
    """Features of small whole numbers, whose distances are exact however they are cut and often equal; labels."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (queries, gallery)
    features = [torch.randint(-1, 2, (n, channels), generator=generator).float() for n in sizes]
    pids, cameras, scenes = ([torch.randint(0, top, (n,), generator=generator) for n in sizes] for top in (5, 2, 3))
    return features, [*pids, *cameras, *scenes]


@pytest.mark.parametrize("protocol", ["camera", "scene"])
@pytest.mark.parametrize(("entries", "numbers"), [(1, 1), (100, 18), (37 * 4, 6 * 36), (2**23, 2**25)])
def test_chunks_of_features_score_as_the_whole_matrix(monkeypatch, protocol, entries, numbers):
    """Whatever the size of the chunks: with ties, entries that are left out, and a query without a match."""
    (query, gallery), labels = whole_features(23, 37, 6)
    labels[0][3] = 99
    distance = pairwise_distance(query, gallery)
    assert len(distance.unique()) < 30
    expected_cmc, expected_map = rank_metrics(distance, *labels, protocol=protocol)
    plain, place = [x.tolist() for x in labels], 2 if protocol == "camera" else 4
    naive_cmc, naive_map = naive_metrics(distance.tolist(), *plain[:2], *plain[place : place + 2], max_rank=50)
    np.testing.assert_allclose(expected_cmc[:37], naive_cmc[:37], atol=1e-12)
    assert expected_map == pytest.approx(naive_map, abs=1e-12)
    monkeypatch.setattr("utils.metrics.ENTRIES", entries)
    monkeypatch.setattr("utils.metrics.FEATURES", numbers)
    cmc, mean_ap = rank_features(query, gallery, *labels, protocol=protocol)
    assert cmc.tolist() == expected_cmc.tolist() and mean_ap == expected_map


def test_features_are_scaled_to_length_one_where_asked(monkeypatch):
    """Against exact arithmetic, on distances too far apart for the rounding of any machine to change their order."""
    _, labels = whole_features(23, 37, 6, seed=1)
    generator = torch.Generator().manual_seed(2)
    query, gallery = torch.randn(23, 6, generator=generator), torch.randn(37, 6, generator=generator)
    gallery *= torch.arange(1, 38)[:, None]
    unit = [side.double() / side.double().square().sum(-1, keepdim=True).sqrt() for side in (query, gallery)]
    distance = (unit[0][:, None] - unit[1]).square().sum(-1)
    assert distance.sort(dim=1).values.diff().min() > 1e-5
    expected = naive_metrics(distance.tolist(), *(x.tolist() for x in labels[:4]), max_rank=50)[1]
    monkeypatch.setattr("utils.metrics.FEATURES", 60)
    assert rank_features(query, gallery, *labels, normalise=True)[1] == pytest.approx(expected, abs=1e-9)
    assert rank_features(query, gallery, *labels)[1] != pytest.approx(expected, abs=1e-3)


def test_nan_features_are_refused():
    (query, gallery), labels = whole_features(4, 5, 6)
    gallery[2, 1] = float("nan")
    with pytest.raises(UserError, match="4 of 20 distances are NaN"):
        rank_features(query, gallery, *labels)


class LargestResult(TorchDispatchMode):
    """Remembers the largest tensor that any operation made, in elements; views of its arguments do not count."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, x.numel())
        return result


@pytest.mark.parametrize("normalise", [False, True])
def test_neither_the_matrix_nor_a_second_gallery_is_ever_made(monkeypatch, normalise):
    (query, gallery), labels = whole_features(64, 512, 16)
    monkeypatch.setattr("utils.metrics.ENTRIES", 2048)
    monkeypatch.setattr("utils.metrics.FEATURES", 1024)
    with LargestResult() as whole:
        rank_metrics(pairwise_distance(query, gallery), *labels)
    assert whole.largest == 64 * 512
    with LargestResult() as chunked:
        rank_features(query, gallery, *labels, normalise=normalise, max_rank=10)
    assert chunked.largest == 2048  # the gallery has 8192 numbers


def test_one_thread_gives_the_threads_back(monkeypatch):
    set_to = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    with pytest.raises(KeyError), one_thread():
        raise KeyError
    assert set_to == [1, 5]
