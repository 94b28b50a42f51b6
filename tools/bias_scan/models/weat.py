"""WEAT's effect size and permutation test on vectors (Caliskan, Bryson and Narayanan 2017).

``s(w) = mean cos(w, A) - mean cos(w, B)``; ``d = (mean s(X) - mean s(Y)) / std of s over X and Y``, with
``ddof=1`` as in the authors' code; p is the share of partitions of X and Y, of the same sizes, whose
statistic ``sum s(X) - sum s(Y)`` is at least the one seen. It depends on s alone, so each partition costs a
sum.
"""

from __future__ import annotations

import math
from itertools import chain, combinations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
EXACT_PARTITIONS = 200_000
_CHUNK_VALUES = 8_000_000


def associations(words: Floats, first: Floats, second: Floats) -> Floats:
    """``s(w)`` of each word.

    Args:
        words: ``(n, d)``.
        first, second: ``(a, d)`` and ``(b, d)``, the attributes A and B.
    """
    words, first, second = _unit(words), _unit(first), _unit(second)
    return words @ (first.mean(axis=0) - second.mean(axis=0))


def _unit(vectors: Floats) -> Floats:
    values = np.asarray(vectors, dtype=np.float64)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    if not np.all(norms > 0):
        raise ValueError("a vector is zero, which has no direction")
    made: Floats = values / norms
    return made


def effect_size(sums: Floats) -> Floats:
    """d from sums over words of the columns ``[in X, in Y, s if in X, s if in Y, s squared]``."""
    nx, ny, sx, sy, squares = sums.T
    n = nx + ny
    variance = (squares - (sx + sy) ** 2 / n) / (n - 1)
    made: Floats = (sx / nx - sy / ny) / np.sqrt(np.maximum(variance, 0.0))
    return made


def columns(s: Floats, size_x: int) -> Floats:
    """The columns that :func:`effect_size` sums; the first ``size_x`` words are X."""
    in_x = np.arange(len(s)) < size_x
    return np.stack([in_x, ~in_x, s * in_x, s * ~in_x, s * s], axis=1).astype(np.float64)


def p_value(s: Floats, size_x: int, permutations: int, seed: int) -> tuple[float, int, bool]:
    """One-sided p: ``(p, partitions, exact)``.

    All partitions where there are at most ``EXACT_PARTITIONS``, else a random sample with the observed one
    counted in, which keeps the test valid (Phipson and Smyth 2010).
    """
    values = np.asarray(s, dtype=np.float64)
    n = len(values)
    seen = values[:size_x].sum()
    slack = 1e-9 * max(1.0, float(np.abs(values).sum()))
    count = math.comb(n, size_x)
    if count <= EXACT_PARTITIONS:
        picks = np.fromiter(chain.from_iterable(combinations(range(n), size_x)), np.int64, count * size_x)
        totals = values[picks.reshape(count, size_x)].sum(axis=1)
        return float((totals >= seen - slack).mean()), count, True
    rng = np.random.default_rng(seed)
    reached = 0
    rows = max(1, _CHUNK_VALUES // n)
    for start in range(0, permutations, rows):
        keys = rng.random((min(rows, permutations - start), n), dtype=np.float32)
        chosen = np.argpartition(keys, size_x - 1, axis=1)[:, :size_x]
        reached += int((values[chosen].sum(axis=1) >= seen - slack).sum())
    return (reached + 1) / (permutations + 1), permutations, False
