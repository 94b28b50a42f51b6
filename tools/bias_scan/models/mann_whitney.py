"""Mann-Whitney U of every pair of groups at once (Mann and Whitney 1947), two-sided."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
#: Up to this size of the smaller group, and without ties, p is exact; as in SciPy's ``method="auto"``.
EXACT_SIZE = 8
_erfc = np.frompyfunc(math.erfc, 1, 1)


def pairwise(values: ArrayLike) -> tuple[Floats, Floats]:
    """U and p of each pair of groups of equal size.

    Args:
        values: ``(groups, n)``.

    Returns:
        ``(groups, groups)`` each; ``U[i, j]`` counts the pairs in which a value of ``i`` exceeds one of
        ``j``, a tie as one half.
    """
    x = np.asarray(values, dtype=np.float64)
    groups, n = x.shape
    u = np.zeros((groups, groups))
    ties = np.zeros((groups, groups))
    for i in range(groups):
        more = np.searchsorted
        for j in range(groups):
            ordered = np.sort(x[j])
            below, upto = more(ordered, x[i], "left"), more(ordered, x[i], "right")
            u[i, j] = below.sum() + 0.5 * (upto - below).sum()
            ties[i, j] = _tie_term(np.concatenate([x[i], x[j]]))
    p = _asymptotic(u, ties, n, n)
    if n <= EXACT_SIZE:
        exact = ties == 0
        tail = _tail(n, n)
        largest = np.rint(np.maximum(u, n * n - u)).astype(np.int64)
        p[exact] = np.minimum(1.0, 2.0 * tail[largest[exact]])
    return u, p


def _tie_term(values: Floats) -> float:
    counts = np.unique(values, return_counts=True)[1].astype(np.float64)
    return float((counts**3 - counts).sum())


def _asymptotic(u: Floats, ties: Floats, n1: int, n2: int) -> Floats:
    """Normal approximation with the tie correction and continuity correction."""
    total = n1 + n2
    spread = np.sqrt(n1 * n2 / 12.0 * (total + 1 - ties / (total * (total - 1))))
    largest = np.maximum(u, n1 * n2 - u)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = (largest - n1 * n2 / 2.0 - 0.5) / spread
    p = _erfc(z / math.sqrt(2.0)).astype(np.float64)
    p[spread == 0] = 1.0
    return np.minimum(1.0, p)


@lru_cache(maxsize=64)
def _tail(n1: int, n2: int) -> Floats:
    """``P(U >= u)`` under the null for every u, by counting orders (Mann and Whitney's recurrence)."""
    ways = [[np.ones(1)] * (n2 + 1) for _ in range(n1 + 1)]
    for a in range(1, n1 + 1):
        for b in range(1, n2 + 1):
            made = np.zeros(a * b + 1)
            shifted, kept = ways[a - 1][b], ways[a][b - 1]
            made[b : b + len(shifted)] += shifted
            made[: len(kept)] += kept
            ways[a][b] = made
    counts = ways[n1][n2]
    tail: Floats = counts[::-1].cumsum()[::-1] / counts.sum()
    return tail
