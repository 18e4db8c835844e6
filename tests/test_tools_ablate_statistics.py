"""The figures of a report against hand-computed ones."""

import math
from statistics import NormalDist

import pytest

from tools.ablate.statistics import paired_differences, summarise, t_quantile

TABLE = {  # two-sided 95 % points of Student's t, as tables print them, with more digits
    1: 12.706204736,
    2: 4.302652730,
    3: 3.182446305,
    4: 2.776445105,
    5: 2.570581836,
    6: 2.446911851,
    7: 2.364624252,
    8: 2.306004135,
    9: 2.262157163,
    10: 2.228138852,
    20: 2.085963447,
    29: 2.045229642,
    30: 2.042272456,
    100: 1.983971519,
}


@pytest.mark.parametrize(("df", "expected"), TABLE.items())
def test_t_quantile_against_the_table(df, expected):
    assert t_quantile(0.975, df) == pytest.approx(expected, abs=1e-6)
    assert t_quantile(0.025, df) == pytest.approx(-expected, abs=1e-6)


@pytest.mark.parametrize("p", [0.5001, 0.6, 0.9, 0.995, 0.9999])
def test_t_quantile_against_closed_forms(p):
    """One, two and four degrees of freedom have formulas."""
    a = 4 * p * (1 - p)
    q = math.cos(math.acos(math.sqrt(a)) / 3) / math.sqrt(a)
    assert t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9)
    assert t_quantile(p, 2) == pytest.approx(2 * (p - 0.5) * math.sqrt(2 / a), rel=1e-9)
    assert t_quantile(p, 4) == pytest.approx(2 * math.sqrt(q - 1), rel=1e-6)
    assert t_quantile(p, 5000) == pytest.approx(NormalDist().inv_cdf(p), rel=2e-3)


def test_t_quantile_refuses_nonsense():
    for p, df in ((0, 3), (1, 3), (0.5, 0)):
        with pytest.raises(ValueError, match="t_quantile"):
            t_quantile(p, df)


def test_summary_by_hand():
    """1, 2, 3, 4: mean 2.5, squares 2.25 + 0.25 + 0.25 + 2.25 = 5, std √(5/3), half √(5/3)/2 · 3.1824463."""
    summary = summarise([1, 2, 3, 4])
    assert (summary.n, summary.mean) == (4, 2.5)
    assert summary.std == pytest.approx(1.2909944487, abs=1e-9)
    assert summary.low == pytest.approx(2.5 - 2.0542602568, abs=1e-6)
    assert summary.high == pytest.approx(2.5 + 2.0542602568, abs=1e-6)


def test_few_values():
    one = summarise([7.5])
    assert (one.n, one.mean, one.std, one.low, one.high) == (1, 7.5, None, None, None)
    same = summarise([3.0, 3.0, 3.0])
    assert (same.std, same.low, same.high) == (0, 3, 3)
    with pytest.raises(ValueError, match="no values"):
        summarise([])


def test_pairs_are_those_that_both_have():
    assert paired_differences({3: 9.0, 1: 5.0, 7: 1.0}, {1: 4.0, 3: 6.5, 2: 0.0}) == {1: 1.0, 3: 2.5}
    # paired, an effect that every seed shows is seen through a spread far larger than it
    ours, theirs = {1: 70.1, 2: 80.2, 3: 90.3}, {1: 69.0, 2: 79.0, 3: 89.0}
    assert summarise(list(paired_differences(ours, theirs).values())).low > 0.8
