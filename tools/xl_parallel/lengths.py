"""Lengths alone: Gale and Church 1993, A Program for Aligning Sentences in Bilingual Corpora, section 3."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneutils.tools.xl_parallel.beads import Kind, RowCosts

Floats = NDArray[np.float64]

#: Characters of the target for one of the source, and their variance for one.
RATIO, VARIANCE = 1.0, 6.8
#: Priors of the kinds of bead (table 5), used for each of two mirrored kinds as in the paper's own program.
PRIORS: dict[Kind, float] = {
    (1, 1): 0.89, (1, 0): 0.0099, (0, 1): 0.0099, (2, 1): 0.089, (1, 2): 0.089, (2, 2): 0.011,
}  # fmt: skip


def deviation(src: NDArray[Any], tgt: NDArray[Any]) -> NDArray[Any]:
    """``|z|``, z = (tgt - c·src) / √(s²·mean), mean = (src + tgt/c) / 2; 0 where both lengths are."""
    mean = (src + tgt / RATIO) / 2
    return np.asarray(np.abs(tgt - RATIO * src) / np.sqrt(VARIANCE * np.maximum(mean, 1e-9)))


def surprise(z: Floats) -> Floats:
    """``-ln 2(1 - Φ(|z|))``."""
    from scipy.special import log_ndtr

    return np.asarray(-(np.log(2) + log_ndtr(-z)))


def mismatch(src: Floats, tgt: Floats) -> Floats:
    """The surprise at two lengths for translations of each other."""
    return surprise(deviation(src, tgt))


def prefix(lengths: Floats) -> Floats:
    return np.concatenate([[0.0], np.cumsum(lengths)])


def ending(sums: Floats, at: slice, size: int) -> Floats:
    """Total length of the ``size`` sentences before each boundary of ``at``; 0 where there are fewer."""
    stop = min(at.stop, len(sums))
    made = np.zeros(at.stop - at.start)
    first = max(at.start, size)
    if first < stop:
        made[first - at.start : stop - at.start] = sums[first:stop] - sums[first - size : stop - size]
    return made


def gale_church(src: Floats, tgt: Floats) -> tuple[list[Kind], RowCosts, Floats]:
    """Kinds, costs and insertion costs for ``best_path``.

    Args:
        src, tgt: lengths in characters, ``(n,)`` and ``(m,)``.
    """
    kinds = [kind for kind in PRIORS if kind != (0, 1)]
    left, right = prefix(src), prefix(tgt)

    def costs(row: int, start: int, width: int) -> Floats:
        made = np.empty((len(kinds), width))
        for k, (a, b) in enumerate(kinds):
            size = left[row] - left[max(row - a, 0)]
            made[k] = mismatch(size, ending(right, slice(start, start + width), b)) - np.log(PRIORS[a, b])
        return made

    return kinds, costs, mismatch(np.zeros(len(tgt)), tgt) - np.log(PRIORS[0, 1])
