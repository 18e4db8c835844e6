"""Identity batches against the properties that define them."""

from collections import Counter

import numpy as np
import pytest

from data.sampler import IdentityBatchSampler, identity_batches
from utils.errors import UserError

PIDS = np.random.default_rng(0).permutation(np.repeat(np.arange(12), np.arange(1, 25, 2))).tolist()  # 1, 3, ... 23 each
P, K = 3, 4


def test_each_batch_is_p_identities_with_k_images_side_by_side():
    for batch in identity_batches(PIDS, P, K, seed=1, epoch=1):
        assert len(batch) == P * K
        groups = [[PIDS[index] for index in batch[start : start + K]] for start in range(0, P * K, K)]
        assert all(len(set(group)) == 1 for group in groups)
        assert len({group[0] for group in groups}) == P


def test_an_epoch_repeats_images_only_of_small_identities_and_goes_on_while_p_identities_are_left():
    sizes = Counter(PIDS)
    for epoch in range(20):
        batches = identity_batches(PIDS, P, K, seed=1, epoch=epoch)
        used = Counter(index for batch in batches for index in batch)
        for index, times in used.items():
            assert times == 1 or sizes[PIDS[index]] < K
        groups_left = {pid: max(1, size // K) for pid, size in sizes.items()}
        for batch in batches:
            for index in batch[::K]:
                groups_left[PIDS[index]] -= 1
        assert min(groups_left.values()) >= 0
        assert sum(left > 0 for left in groups_left.values()) < P


def test_small_identity_uses_all_its_images():
    pids = [0] * 3 + [1] * 2
    for epoch in range(10):
        (batch,) = identity_batches(pids, 2, 4, seed=0, epoch=epoch)
        assert set(batch) == {0, 1, 2, 3, 4}


def test_images_are_shuffled_within_their_identity():
    pids = [0] * 6 + [1] * 6
    groups = [
        batch[start : start + 4] for e in range(300) for batch in identity_batches(pids, 2, 4, 0, e) for start in (0, 4)
    ]
    used = Counter(index for group in groups for index in group)
    assert all(160 <= used[index] <= 240 for index in range(12))  # 4 of 6 images in 300 epochs: 200, 4.9 deviations
    assert len({tuple(sorted(group)) for group in groups}) == 30  # every choice of 4 of 6, for both identities


def test_reproducible_from_seed_and_epoch_alone():
    first = identity_batches(PIDS, P, K, seed=5, epoch=2)
    assert identity_batches(PIDS, P, K, seed=5, epoch=2) == first
    assert identity_batches(PIDS, P, K, seed=5, epoch=3) != first
    assert identity_batches(PIDS, P, K, seed=6, epoch=2) != first


def test_every_identity_is_drawn_first_equally_often():
    pids = np.repeat(np.arange(6), 4).tolist()
    first = Counter(pids[identity_batches(pids, 2, 4, seed=0, epoch=e)[0][0]] for e in range(600))
    assert all(60 <= first[pid] <= 140 for pid in range(6))  # 100 expected, 4.4 standard deviations


def test_length_of_an_epoch_of_rgbnt201s_size():
    images = np.full(171, 23)
    images[:18] += 1  # 3951 triples of 171 identities
    pids = np.repeat(np.arange(171), images).tolist()
    assert len(pids) == 3951
    lengths = [len(identity_batches(pids, 8, 8, seed=1111, epoch=epoch)) for epoch in range(5)]
    assert all(38 <= length <= 45 for length in lengths)  # 2 whole groups of 8 an identity, plus one for 18: 45 at most


def test_too_few_identities_names_both_numbers():
    with pytest.raises(UserError, match=r"takes 8 identities .* has 3"):
        identity_batches([0, 0, 1, 1, 2, 2], 8, 2, seed=0, epoch=1)


def test_sampler_resumes_within_an_epoch():
    sampler = IdentityBatchSampler(PIDS, P, K, seed=3)
    sampler.set_epoch(4)
    whole = list(sampler)
    assert [[draw.index for draw in batch] for batch in whole] == identity_batches(PIDS, P, K, 3, 4)
    assert [draw.position for batch in whole for draw in batch] == list(range(len(whole) * P * K))
    assert {draw.epoch for batch in whole for draw in batch} == {4}
    sampler.set_epoch(4, start_step=2)
    assert list(sampler) == whole[2:]
    assert len(sampler) == len(whole)
    sampler.set_epoch(5)
    assert [draw.index for draw in next(iter(sampler))] == identity_batches(PIDS, P, K, 3, 5)[0]
