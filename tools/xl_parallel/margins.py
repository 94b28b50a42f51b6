"""Margin scores between two piles of sentence vectors, and the pairs that they retrieve.

Artetxe and Schwenk 2019 (arXiv 1811.01136), equations 1 to 4: with a = cos(x, y) and m the mean of x's k
nearest cosines among the other pile and of y's, the absolute score is a, the distance a - m, the ratio a / m.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneutils.shared.errors import require

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

MARGINS = ("ratio", "distance", "absolute")
RETRIEVALS = ("max", "intersection", "forward", "backward")


@dataclass(frozen=True)
class Neighbours:
    """The k nearest of the other pile for each row, nearest first.

    Attributes:
        cosines, indices: ``(n, k)``.
    """

    cosines: Floats
    indices: Ints

    @property
    def mean(self) -> Floats:
        """``(n,)``: mean cosine with the k nearest."""
        return self.cosines.mean(1, dtype=np.float64).astype(np.float32)


@dataclass(frozen=True)
class Pairs:
    """Candidate pairs, best first; ties in the order of their numbers.

    Attributes:
        src, tgt: ``(pairs,)`` row numbers.
        scores: ``(pairs,)``.
    """

    src: Ints
    tgt: Ints
    scores: Floats


def nearest(queries: Floats, pile: Floats, k: int, search: str, seed: int = 0) -> Neighbours:
    """The nearest rows of ``pile`` ``(m, d)`` for each of ``queries`` ``(n, d)``, all of length 1 or 0.

    Args:
        k: at most this many; where the pile has fewer, all of it.
        search: ``exact`` compares with every row; ``approximate`` with those in the nearest cells of a
            k-means partition into about 4 √m (faiss ``IndexIVFFlat``), an eighth of them.
    """
    require("faiss", "parallel")
    import faiss

    k = min(k, len(pile))
    index = _partition(faiss, pile, seed) if search == "approximate" else faiss.IndexFlatIP(pile.shape[1])
    index.add(np.ascontiguousarray(pile))
    cosines, indices = index.search(np.ascontiguousarray(queries), k)
    missing = indices < 0  # a cell that was searched may hold fewer than k
    if missing.any():
        exact = faiss.IndexFlatIP(pile.shape[1])
        exact.add(np.ascontiguousarray(pile))
        rows = np.flatnonzero(missing.any(1))
        cosines[rows], indices[rows] = exact.search(np.ascontiguousarray(queries[rows]), k)
    return Neighbours(cosines, indices.astype(np.int64))


def _partition(faiss: Any, pile: Floats, seed: int) -> Any:
    size = pile.shape[1]
    cells = max(1, min(int(4 * len(pile) ** 0.5), len(pile) // 39))  # faiss wants 39 points a cell
    made = faiss.IndexIVFFlat(faiss.IndexFlatIP(size), size, cells, faiss.METRIC_INNER_PRODUCT)
    made.cp.seed = seed + 1234
    made.nprobe = max(1, cells // 8)
    made.train(np.ascontiguousarray(pile))
    return made


def margin(kind: str, cosine: Floats, mean: Floats) -> Floats:
    """Scores of pairs, each ``(pairs,)``: their cosines, and the mean of both rows' mean cosines.

    A ratio to a mean of 0 or less means nothing; such a pair scores 0.
    """
    if kind == "absolute":
        return cosine
    if kind == "distance":
        return cosine - mean
    return np.divide(cosine, mean, out=np.zeros_like(cosine), where=mean > 1e-6)


def retrieve(forward: Neighbours, backward: Neighbours, kind: str, retrieval: str) -> Pairs:
    """Pairs of rows, by their margin.

    ``forward`` takes the best of every source row's neighbours, ``backward`` of every target row's;
    ``intersection`` the pairs that are in both, ``max`` of both the best, each row once.

    Args:
        forward: neighbours of source rows among target rows.
        backward: of target rows among source rows.
    """
    ahead = _best(forward, backward.mean, kind)
    back = _best(backward, forward.mean, kind)
    back = (back[1], back[0], back[2])
    if retrieval == "forward":
        return _sorted(*ahead)
    if retrieval == "backward":
        return _sorted(*back)
    width = len(backward.mean)
    keys = (ahead[0] * width + ahead[1], back[0] * width + back[1])
    if retrieval == "intersection":
        both = np.isin(keys[0], keys[1])
        return _sorted(*(column[both] for column in ahead))
    src, tgt, scores = (np.concatenate(columns) for columns in zip(ahead, back))
    _, first = np.unique(np.concatenate(keys), return_index=True)
    return _one_to_one(_sorted(src[first], tgt[first], scores[first]))


def _best(near: Neighbours, other_mean: Floats, kind: str) -> tuple[Ints, Ints, Floats]:
    """For each row the neighbour of the highest margin: row numbers, the neighbours', scores."""
    mean = (near.mean[:, None] + other_mean[near.indices]) / 2
    scores = margin(kind, near.cosines, mean)
    at = scores.argmax(1)
    rows = np.arange(len(scores))
    return rows, near.indices[rows, at], scores[rows, at]


def _sorted(src: Ints, tgt: Ints, scores: Floats) -> Pairs:
    order = np.lexsort((tgt, src, -scores))
    return Pairs(src[order], tgt[order], scores[order])


def _one_to_one(pairs: Pairs) -> Pairs:
    """Greedily from the best: a pair whose rows are both still free."""
    src_free = np.ones(int(pairs.src.max(initial=-1)) + 1, bool)
    tgt_free = np.ones(int(pairs.tgt.max(initial=-1)) + 1, bool)
    kept = []
    for number, (i, j) in enumerate(zip(pairs.src.tolist(), pairs.tgt.tolist())):
        if src_free[i] and tgt_free[j]:
            src_free[i] = tgt_free[j] = False
            kept.append(number)
    at = np.array(kept, np.int64)
    return Pairs(pairs.src[at], pairs.tgt[at], pairs.scores[at])


@dataclass(frozen=True)
class Agreement:
    """Precision, recall and F1 against gold pairs, of the pairs that score at least ``threshold``."""

    threshold: float
    precision: float
    recall: float
    f1: float
    gold: int
    extracted: int
    correct: int


def measure(scores: Floats, correct: NDArray[np.bool_], gold: int, threshold: float) -> Agreement:
    """Args: scores and whether each pair is gold, both ``(pairs,)``; the number of gold pairs."""
    taken = scores >= threshold
    return _agreement(threshold, int((correct & taken).sum()), int(taken.sum()), gold)


def tune(scores: Floats, correct: NDArray[np.bool_], gold: int) -> Agreement:
    """The threshold of the best F1 (BUCC: Zweigenbaum, Sharoff and Rapp 2017), as LASER sets it.

    It lies midway between the last score taken and the next lower one; pairs of equal scores go together.

    Args:
        scores: descending.
    """
    if not len(scores) or not correct.any():
        return _agreement(float(np.inf), 0, 0, gold)
    hits, taken = np.cumsum(correct), np.arange(1, len(scores) + 1)
    f1 = 2 * hits / (taken + gold)  # 2 P R / (P + R)
    ends = np.append(scores[:-1] > scores[1:], True)
    best = int(np.flatnonzero(ends)[f1[ends].argmax()])
    following = scores[best + 1] if best + 1 < len(scores) else scores[best]
    middle = (float(scores[best]) + float(following)) / 2
    return _agreement(middle, int(hits[best]), best + 1, gold)


def _agreement(threshold: float, correct: int, extracted: int, gold: int) -> Agreement:
    precision = correct / extracted if extracted else 0.0
    recall = correct / gold if gold else 0.0
    f1 = 2 * correct / (extracted + gold) if extracted + gold else 0.0
    return Agreement(threshold, precision, recall, f1, gold, extracted, correct)
