"""Mean, spread and Student's confidence interval of a few values; paired differences."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95
"""Of every confidence interval."""


@dataclass(frozen=True)
class Summary:
    """What n values say; `std` is the sample's (n - 1), `low` and `high` bound the mean. None where n is too small."""

    n: int
    mean: float
    std: float | None
    low: float | None
    high: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)


def summarise(values: Sequence[float], level: float = LEVEL) -> Summary:
    """Mean, sample standard deviation and confidence interval of the mean: mean ± t · std / √n.

    Raises:
        ValueError: no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("no values to summarise")
    mean = math.fsum(values) / n
    if n == 1:
        return Summary(1, mean, None, None, None)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = t_quantile((1 + level) / 2, n - 1) * std / math.sqrt(n)
    return Summary(n, mean, std, mean - half, mean + half)


def paired_differences(values: dict[int, float], reference: dict[int, float]) -> dict[int, float]:
    """Seed -> value - reference, of the seeds that both have, in order."""
    return {seed: values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())}


def t_quantile(p: float, df: int) -> float:
    """The p-quantile of Student's t distribution with a whole number of degrees of freedom, to about 1e-12.

    With t = √df · tan θ the distribution is an elementary function of θ (`_central`), which bisection inverts.

    Raises:
        ValueError: p is not inside (0, 1), or df is under 1.
    """
    if not 0 < p < 1 or df < 1:
        raise ValueError(f"t_quantile({p}, {df}): p must lie in (0, 1) and df be 1 or more")
    if p < 0.5:
        return -t_quantile(1 - p, df)
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _central(middle, df) < 2 * p - 1 else (low, middle)
    return math.sqrt(df) * math.tan((low + high) / 2)


def _central(theta: float, df: int) -> float:
    """P(|T| < √df · tan θ): Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4."""
    cosine, odd = math.cos(theta), df % 2
    term = cosine if odd else 1.0
    total = term if df > 1 else 0.0
    for k in range(2 + odd, df, 2):  # the next terms: 2/3 cos³, 2·4/(3·5) cos⁵, …, or 1/2 cos², 1·3/(2·4) cos⁴, …
        term *= (k - 1) / k * cosine**2
        total += term
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if odd else total
