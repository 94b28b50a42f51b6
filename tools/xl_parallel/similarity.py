"""Costs of beads by what their texts say: vectors of spelling, of a dictionary's glosses, of an encoder.

Each view gives a sentence a vector that is a sum over its parts, so that a block's vector is the sum of its
sentences', and the inner product of two blocks the sum of those of their sentences. The similarity s of two
blocks is the weighted mean of the views' cosines; of it is taken what a block has with any sentence of the
other document on average, (s - q) / (1 - q), so that one that is like everything gains nothing by it (as
Thompson and Koehn 2019, section 3, normalise). A bead of a and b sentences costs
``(1 - s)(a + b)/2 + LENGTH·mismatch + SIZE·(a + b - 2)``, and ``MANY`` unless it is 1-1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneutils.tools.xl_parallel import lengths
from tuneutils.tools.xl_parallel.beads import Bead, Kind

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
#: ``(n, d)`` in float32: a NumPy array, or a sparse CSR matrix.
Vectors = Any

#: Chosen on the development part of Bleualign's German-French articles.
SKIP, LENGTH, SIZE, MANY = 0.6, 0.035, 0.137, 0.02
#: Rows of the table whose similarities are made at once.
_CHUNK = 64
#: Most that a mismatch of lengths counts, and steps of its table a unit of z.
_MOST, _STEPS = 20, 1024


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
        self._views = [View(v.src, v.tgt, v.weight / total) for v in views]
        self._kinds, self._left, self._width = kinds, left, width
        self._n, self._m = len(src_lengths), len(tgt_lengths)
        self._tallest, self._widest = max(a for a, _ in kinds), max(b for _, b in kinds)
        self._src = _Blocks([(v.src, v.tgt, v.weight) for v in self._views], src_lengths, self._tallest)
        self._tgt = _Blocks([(v.tgt, v.src, v.weight) for v in self._views], tgt_lengths, self._widest)
        self._first = self._last = self._start = 0
        self._costs: Singles = np.zeros((0, 0, 0), np.float32)

    def __call__(self, row: int, start: int, width: int) -> Singles:
        if not self._first <= row < self._last:
            self._fill(row)
        at = start - self._start
        return self._costs[:, row - self._first, at : at + width]

    @property
    def insertion(self) -> Floats:
        """``(m,)``: cost of each target sentence left out."""
        return np.full(self._m, SKIP)

    def scores(self, beads: Sequence[Bead]) -> list[float | None]:
        """Similarity of each bead's sides, 0 to 1; None where one is empty."""
        full = [b for b in beads if b.src_start < b.src_end and b.tgt_start < b.tgt_end]
        left = np.array([(b.src_end - b.src_start, b.src_end) for b in full], np.int64).reshape(-1, 2).T
        right = np.array([(b.tgt_end - b.tgt_start, b.tgt_end) for b in full], np.int64).reshape(-1, 2).T
        alike = np.zeros(len(full), np.float32)
        for v, view in enumerate(self._views):
            products = _dot(sums(view.src, *left), sums(view.tgt, *right))
            alike += products * self._src.scale[v][*left] * self._tgt.scale[v][*right]
        usual = (self._src.usual[*left] + self._tgt.usual[*right]) / 2
        found = dict(zip(full, np.clip(1 - _distance(alike, usual), 0, 1).tolist()))
        return [found.get(bead) for bead in beads]

    def _fill(self, first: int) -> None:
        self._first, self._last = first, min(first + _CHUNK, self._n + 1)
        self._start = int(self._left[first])
        rows = slice(first, self._last)
        cols = slice(self._start, int(self._left[self._last - 1]) + self._width)
        alike = self._similarities(rows, cols)
        self._costs = np.full(alike.shape, SKIP, np.float32)
        for k, (a, b) in enumerate(self._kinds):
            if not b:
                continue
            usual = (self._src.usual[a][rows, None] + self._tgt.usual[b][cols]) / 2
            cost = _distance(alike[k], usual) * np.float32((a + b) / 2)
            z = lengths.deviation(self._src.lengths[a][rows, None], self._tgt.lengths[b][cols])
            cost += _length_costs().take((z * _STEPS).astype(np.int32), mode="clip")
            self._costs[k] = cost + np.float32(SIZE * (a + b - 2) + (MANY if a + b > 2 else 0))

    def _similarities(self, rows: slice, cols: slice) -> Singles:
        """``(kinds, rows, columns)``: weighted cosines of the blocks that end at each row and column."""
        height, width = rows.stop - rows.start, cols.stop - cols.start
        made = np.zeros((len(self._kinds), height, width), np.float32)
        place = {kind: k for k, kind in enumerate(self._kinds)}
        for v, view in enumerate(self._views):
            products = self._products(view, rows, cols)
            for a, tall in enumerate(_running(products, height, self._tallest), 1):
                widest = max(b for of, b in self._kinds if of == a)
                for b, block in enumerate(_running(tall.T, width, widest), 1):
                    scale = self._src.scale[v][a][rows, None] * self._tgt.scale[v][b][cols]
                    made[place[a, b]] += block.T * scale
        return made

    def _products(self, view: View, rows: slice, cols: slice) -> Singles:
        """Of sentences, from those of the blocks that end first; 0 before the documents' beginning."""
        top, front = rows.start - self._tallest, cols.start - self._widest
        made = np.zeros((rows.stop - 1 - top, cols.stop - 1 - front), np.float32)
        i, j = max(top, 0), max(front, 0)
        found = view.src[i : rows.stop - 1] @ view.tgt[j : cols.stop - 1].T
        made[i - top :, j - front :] = found.toarray() if hasattr(found, "toarray") else found
        return made


class _Blocks:
    """What the blocks of one document are, of each size, by the boundary at which they end.

    Attributes:
        scale: ``(views, sizes + 1, n + 1)``: root of the view's weight over the block's norm; 0
            where there are fewer sentences, or no n-gram that counts.
        usual: ``(sizes + 1, n + 1)``: mean similarity with the other document's sentences.
        lengths: ``(sizes + 1, n + 1)``: characters.

    Args:
        views: vectors of this document and of the other, and their weights, which sum to 1.
    """

    def __init__(self, views: Sequence[tuple[Vectors, Vectors, float]], sizes: Floats, most: int) -> None:
        count = len(sizes)
        self.scale = np.zeros((len(views), most + 1, count + 1), np.float32)
        self.usual = np.zeros((most + 1, count + 1), np.float32)
        self.lengths = np.zeros((most + 1, count + 1), np.float32)
        for v, (own, others, weight) in enumerate(views):
            typical = _inverse_norms(others) @ others / others.shape[0]
            blocks = zip(_running_all(own, most), _running_all(own @ typical, most))
            for size, (block, alike) in enumerate(blocks, 1):
                scale = _inverse_norms(block)
                self.scale[v, size, size:] = np.sqrt(weight) * scale
                self.usual[size, size:] += weight * scale * alike
        for size, block in enumerate(_running_all(sizes, most), 1):
            self.lengths[size, size:] = block


def sums(rows: Vectors, counts: NDArray[np.int64], ends: NDArray[np.int64]) -> Vectors:
    """``(blocks, d)``: sums of ``counts[i]`` rows before ``ends[i]``, dense or sparse as ``rows`` are."""
    from scipy import sparse

    bounds = np.concatenate([[0], np.cumsum(counts)])
    at = np.arange(bounds[-1]) + np.repeat(ends - bounds[1:], counts)
    chosen = sparse.csr_matrix((np.ones(len(at), np.float32), at, bounds), (len(counts), rows.shape[0]))
    return chosen @ rows


def _running_all(rows: Vectors, most: int) -> Iterator[Vectors]:
    """Sums of 1, 2, … ``most`` consecutive rows; the i-th of the sums of k ends with row i + k - 1."""
    total = rows
    yield total
    for size in range(1, most):
        total = total[1:] + rows[: max(rows.shape[0] - size, 0)]
        yield total


def _running(rows: Singles, count: int, most: int) -> Iterator[Singles]:
    """Sums of 1, 2, … ``most`` consecutive rows that end with each of the last ``count``."""
    last = len(rows) - count
    total = rows[last:]
    yield total
    for size in range(1, most):
        total = total + rows[last - size : last - size + count]
        yield total


def _distance(alike: Singles, usual: Singles) -> Singles:
    """``1 - (alike - usual) / (1 - usual)``."""
    return np.asarray((1 - alike) / np.maximum(1 - usual, np.float32(1e-3)))


@cache
def _length_costs() -> Singles:
    """Of z in steps, up to where they grow no more."""
    z = np.arange(0, np.sqrt(2 * _MOST) + 1, 1 / _STEPS)  # the surprise at z is above z²/2
    return (LENGTH * np.minimum(lengths.surprise(z), _MOST)).astype(np.float32)


def _dot(some: Vectors, others: Vectors) -> Singles:
    """``(n,)``: the inner products of rows of the same number."""
    products = some.multiply(others) if hasattr(some, "multiply") else some * others
    return np.asarray(products.sum(1), np.float32).ravel()


def _inverse_norms(rows: Vectors) -> Singles:
    """``(n,)``; 0 for a row of zeros."""
    from scipy.sparse import issparse, linalg

    norms = np.asarray((linalg if issparse(rows) else np.linalg).norm(rows, axis=1), np.float32)
    return np.divide(1, norms, out=np.zeros_like(norms), where=norms > 1e-6)
