"""Thresholds and intervals from counts, exact: order statistics and the binomial distribution."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tuneutils.shared.errors import ToolError


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(X <= k) for X ~ Binomial(n, p)."""
    if k < 0:
        return 0.0
    if k >= n or p <= 0:
        return 1.0
    if p >= 1:
        return 0.0
    log_p, log_q = math.log(p), math.log1p(-p)
    terms = (
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * log_p + (n - i) * log_q
        for i in range(k + 1)
    )
    return min(1.0, math.fsum(math.exp(t) for t in terms))


def upper_bound(k: int, n: int, confidence: float = 0.95) -> float:
    """The one-sided upper bound of a share of which ``k`` of ``n`` were seen (Clopper and Pearson 1934)."""
    return 1.0 if k >= n else _solve(lambda p: binomial_cdf(k, n, p) > 1 - confidence)


def lower_bound(k: int, n: int, confidence: float = 0.95) -> float:
    """The one-sided lower bound."""
    return 0.0 if k <= 0 else _solve(lambda p: 1 - binomial_cdf(k - 1, n, p) < 1 - confidence)


def _solve(below: Callable[[float], bool]) -> float:
    """Where a predicate that is true up to a point of [0, 1] turns false."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return (low + high) / 2


def share(k: int, n: int) -> dict[str, Any]:
    """``k`` of ``n`` with its exact two-sided 95 % interval; null without any."""
    if not n:
        return {"value": None, "low": None, "high": None, "k": 0, "n": 0}
    return {
        "value": k / n,
        "low": lower_bound(k, n, 0.975),
        "high": upper_bound(k, n, 0.975),
        "k": k,
        "n": n,
    }


@dataclass(frozen=True)
class Threshold:
    """A threshold set on harmless scores, of which it is the ``rank``-th smallest of ``n``.

    A new exchange of their kind exceeds it with probability ``expected`` at most (over draws of both), and
    with 95 % confidence over draws of the calibration set the rate is at most ``upper95``: the share above
    the r-th order statistic is distributed as Beta(n + 1 - r, r).
    """

    value: float
    rank: int
    n: int
    expected: float
    upper95: float


def threshold(harmless: Sequence[float], budget: float) -> Threshold:
    """The smallest threshold that at most a share ``budget`` of harmless exchanges is expected to exceed.

    Split conformal prediction (Vovk et al. 2005; Angelopoulos and Bates 2021, arXiv 2107.07511, section 1):
    the ⌈(1 - budget)(n + 1)⌉-th smallest score.

    Raises:
        ToolError: fewer harmless scores than the budget needs (65).
    """
    n = len(harmless)
    rank = math.ceil((1 - budget) * (n + 1) - 1e-9)
    if rank > n:
        needed = math.ceil(1 / budget - 1e-9) - 1
        raise ToolError(
            f"--budget {budget:g} needs {needed} harmless exchanges to set the threshold on, there are {n}; "
            "add some, or take a larger --budget or --calibration-share"
        )
    value = sorted(harmless)[rank - 1]
    return Threshold(value, rank, n, (n + 1 - rank) / (n + 1), upper_bound(n - rank, n))
