"""Thresholds and bounds against exact rational arithmetic, closed forms and simulation by enumeration."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest

from tuneutils.shared.errors import ToolError
from tuneutils.tools.guard.bounds import binomial_cdf, lower_bound, share, threshold, upper_bound


@pytest.mark.parametrize("n", [1, 5, 20, 60])
@pytest.mark.parametrize("p", [Fraction(1, 20), Fraction(1, 3), Fraction(19, 20)])
def test_binomial_distribution(n: int, p: Fraction) -> None:
    total = Fraction(0)
    for k in range(n + 1):
        total += math.comb(n, k) * p**k * (1 - p) ** (n - k)
        assert binomial_cdf(k, n, float(p)) == pytest.approx(float(total), rel=1e-10)


@pytest.mark.parametrize("n", [1, 10, 59, 299])
def test_nothing_seen(n: int) -> None:
    """k = 0: (1 - p)^n = .05, the rule of three; k = n is its mirror image."""
    assert upper_bound(0, n) == pytest.approx(1 - 0.05 ** (1 / n), abs=1e-12)
    assert lower_bound(n, n) == pytest.approx(0.05 ** (1 / n), abs=1e-12)
    assert (lower_bound(0, n), upper_bound(n, n)) == (0, 1)


def test_published_clopper_pearson_intervals() -> None:
    """Newcombe 1998, Statistics in Medicine 17:857, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for k, n, low, high in [
        (81, 263, 0.2527, 0.3676),
        (15, 148, 0.0578, 0.1617),
        (0, 20, 0.0, 0.1684),
        (1, 29, 0.0009, 0.1776),
    ]:
        found = share(k, n)
        assert found["low"] == pytest.approx(low, abs=6e-5)
        assert found["high"] == pytest.approx(high, abs=6e-5)
    assert share(0, 0)["value"] is None


@pytest.mark.parametrize(
    ("n", "budget"), [(19, 0.05), (39, 0.05), (20, 0.05), (99, 0.01), (10, 0.3), (1, 0.5)]
)
def test_threshold_is_the_conformal_order_statistic(n: int, budget: float) -> None:
    scores = list(np.random.default_rng(n).permutation(n).astype(float))
    found = threshold(scores, budget)
    above = sum(s > found.value for s in scores)
    assert (above + 1) / (n + 1) <= budget + 1e-12  # a new one included
    assert (above + 2) / (n + 1) > budget  # and the next smaller threshold would not do
    assert found.expected == pytest.approx((above + 1) / (n + 1))
    assert found.upper95 == pytest.approx(upper_bound(above, n))


def test_expected_rate_over_all_orders() -> None:
    """Of six exchangeable scores the last one exceeds a threshold set on the others as often as is said."""
    orders = list(permutations(range(6)))
    for budget in (1 / 6, 0.34, 0.5):
        found = [threshold([float(s) for s in order[:5]], budget) for order in orders]
        rate = np.mean([order[5] > t.value for order, t in zip(orders, found, strict=True)])
        assert rate == pytest.approx(found[0].expected)
        assert rate <= budget + 1e-12


def test_95_percent_bound_holds_in_95_percent_of_calibrations() -> None:
    """Scores uniform on [0, 1]: the true rate of a threshold t is 1 - t."""
    rng, n = np.random.default_rng(0), 60
    found = [threshold(list(rng.random(n)), 0.05) for _ in range(4000)]
    covered = np.mean([1 - t.value <= t.upper95 for t in found])
    assert covered == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors


def test_too_few_harmless_exchanges() -> None:
    with pytest.raises(ToolError, match=r"--budget 0\.05 needs 19 harmless exchanges .* there are 18"):
        threshold([0.0] * 18, 0.05)
    with pytest.raises(ToolError, match="needs 99 "):
        threshold([0.0] * 98, 0.01)
