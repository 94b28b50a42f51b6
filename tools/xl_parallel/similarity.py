"""Costs of beads by what their texts say: vectors of spelling, of a dictionary's glosses, of an encoder.

Each view gives a sentence a vector that is a sum over its parts, so that a block's vector is the sum of its
sentences'. The similarity s of two blocks is the weighted mean of the views' cosines; of it is taken
what a block has with any sentence of the other document on average, (s - q) / (1 - q), so that one that is
like everything gains nothing by it (as Thompson and Koehn 2019, section 3, normalise). A bead of a and b
sentences costs ``(1 - s)(a + b)/2 + LENGTH·mismatch + SIZE·(a + b - 2)``, and ``MANY`` unless it is 1-1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tuneutils.tools.xl_parallel import lengths
from tuneutils.tools.xl_parallel.beads import Bead, Kind

Floats = NDArray[np.float64]
Vectors = NDArray[np.float32]

#: Chosen on the development part of Bleualign's German-French articles.
SKIP, LENGTH, SIZE, MANY = 0.6, 0.035, 0.137, 0.02
#: Rows of the table whose similarities are made by one matrix product.
_CHUNK = 64


@dataclass(frozen=True)
class View:
    """Additive vectors of both documents, ``(n, d)`` and ``(m, d)``, and how much they count."""

    src: Vectors
    tgt: Vectors
    weight: float


def kinds_up_to(size: int) -> list[Kind]:
    """1-0, and all beads of at most ``size`` sentences with one of each side; 3-3 and more only one-sided."""
    found = [(a, b) for a in range(1, size) for b in range(1, size) if a + b <= size]
    return [(1, 0), *(k for k in found if min(k) == 1 or sum(k) <= 5)]


class BlockCosts:
    """``RowCosts`` over views, made a chunk of rows at a time.

    Args:
        views: at least one.
        src_lengths, tgt_lengths: characters of each sentence.
        kinds: from ``kinds_up_to``.
        left, width: the band, as for ``best_path``.
    """

    def __init__(
        self, views: Sequence[View], src_lengths: Floats, tgt_lengths: Floats, kinds: Sequence[Kind],
        left: NDArray[np.int64], width: int,
    ) -> None:  # fmt: skip
        total = sum(v.weight for v in views)
        self._weights = [np.float32(np.sqrt(v.weight / total)) for v in views]
        self._sums = [[_prefix(side) for side in (v.src, v.tgt)] for v in views]
        self._lengths = lengths.prefix(src_lengths), lengths.prefix(tgt_lengths)
        self._kinds, self._left, self._width = kinds, left, width
        self._n, self._m = len(src_lengths), len(tgt_lengths)
        self._means = [
            self._blocks(side, 1, 1, count + 1).mean(0) for side, count in ((0, self._n), (1, self._m))
        ]
        self._first = self._last = 0
        self._costs = np.zeros((0, 0, 0))
        self._start = 0

    def __call__(self, row: int, start: int, width: int) -> Floats:
        if not self._first <= row < self._last:
            self._fill(row)
        at = start - self._start
        return self._costs[:, row - self._first, at : at + width]

    @property
    def insertion(self) -> Floats:
        """``(m,)``: cost of each target sentence left out."""
        return np.full(self._m, SKIP)

    def score(self, bead: Bead) -> float | None:
        """Similarity of a bead's sides, 0 to 1; None where one is empty."""
        if bead.src_start == bead.src_end or bead.tgt_start == bead.tgt_end:
            return None
        a = self._blocks(0, bead.src_end - bead.src_start, bead.src_end, bead.src_end + 1)
        b = self._blocks(1, bead.tgt_end - bead.tgt_start, bead.tgt_end, bead.tgt_end + 1)
        return min(max(float(self._adjusted(a, b)[0, 0]), 0.0), 1.0)

    def _fill(self, first: int) -> None:
        self._first, self._last = first, min(first + _CHUNK, self._n + 1)
        self._start = int(self._left[first])
        stop = int(self._left[self._last - 1]) + self._width
        shape = (len(self._kinds), self._last - first, stop - self._start)
        self._costs = np.full(shape, SKIP)
        cols = slice(self._start, stop)
        rights = {b: self._blocks(1, b, cols.start, cols.stop) for b in {b for _, b in self._kinds if b}}
        spans = {b: lengths.ending(self._lengths[1], cols, b) for b in rights}
        for a in {a for a, b in self._kinds if b}:
            block = self._blocks(0, a, first, self._last)
            span = lengths.ending(self._lengths[0], slice(first, self._last), a)
            for k, (of, b) in enumerate(self._kinds):
                if of != a or not b:
                    continue
                cost = (1 - self._adjusted(block, rights[b])) * ((a + b) / 2)
                cost += LENGTH * np.minimum(lengths.mismatch(span[:, None], spans[b][None]), 20)
                self._costs[k] = cost + (SIZE * (a + b - 2) + (MANY if a + b > 2 else 0))

    def _adjusted(self, src: Vectors, tgt: Vectors) -> Vectors:
        usual = ((src @ self._means[1])[:, None] + (tgt @ self._means[0])[None]) / 2
        return np.asarray((src @ tgt.T - usual) / (1 - usual), np.float32)

    def _blocks(self, side: int, size: int, first: int, stop: int) -> Vectors:
        """Of the ``size`` sentences before each boundary in ``first … stop - 1``, all views side by side.

        Zeros where there are fewer, or beyond the document.
        """
        count = (self._n, self._m)[side]
        made = []
        for weight, sums in zip(self._weights, self._sums):
            prefix = sums[side]
            block = np.zeros((stop - first, prefix.shape[1]), np.float32)
            a, b = max(first, size), min(stop, count + 1)
            if a < b:
                block[a - first : b - first] = prefix[a:b] - prefix[a - size : b - size]
                norms = np.linalg.norm(block, axis=1, keepdims=True)
                np.divide(block, norms, out=block, where=norms > 1e-6)
            made.append(block * weight)
        return np.concatenate(made, axis=1)


def _prefix(vectors: Vectors) -> Floats:
    """``(n + 1, d)``; in float64, so that a difference of large sums is exact enough."""
    return np.concatenate([np.zeros((1, vectors.shape[1])), np.cumsum(vectors, 0, dtype=np.float64)])
