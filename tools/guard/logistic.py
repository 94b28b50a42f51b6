"""Logistic regression with an L2 penalty, by L-BFGS in double precision: one optimum, the same in every run.

The objective is convex: mean weighted log loss plus ``l2 / 2`` times the squared length of the weights; the
intercept is not penalised. L-BFGS as in Nocedal and Wright, Numerical Optimization (2006), algorithms 7.4
and 7.5, with backtracking (3.1).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
HISTORY = 10
SUFFICIENT = 1e-4


class Rows(Protocol):
    """A matrix ``(n, d)`` that can be multiplied from both sides."""

    shape: tuple[int, int]

    def times(self, weights: Array) -> Array: ...

    def transposed_times(self, residuals: Array) -> Array: ...


class Dense:
    """Rows of numbers."""

    def __init__(self, values: NDArray[Any]) -> None:
        self.values = np.ascontiguousarray(values, dtype=np.float64)
        self.shape = (self.values.shape[0], self.values.shape[1])

    def times(self, weights: Array) -> Array:
        made: Array = self.values @ weights
        return made

    def transposed_times(self, residuals: Array) -> Array:
        made: Array = self.values.T @ residuals
        return made


class Sparse:
    """Rows of ``(columns, values)``, as ``ngrams.features`` gives them."""

    def __init__(self, rows: Sequence[tuple[Ints, Array]], columns: int) -> None:
        self.shape = (len(rows), columns)
        self._row = np.repeat(np.arange(len(rows)), [len(r[0]) for r in rows])
        self._column = np.concatenate([r[0] for r in rows]) if rows else np.zeros(0, np.int64)
        self._value = np.concatenate([r[1] for r in rows]) if rows else np.zeros(0)

    def times(self, weights: Array) -> Array:
        return np.bincount(self._row, self._value * weights[self._column], self.shape[0])

    def transposed_times(self, residuals: Array) -> Array:
        return np.bincount(self._column, self._value * residuals[self._row], self.shape[1])


@dataclass(frozen=True)
class Fit:
    """Weights ``(d,)``, intercept, and how the search ended."""

    weights: Array
    bias: float
    loss: float
    gradient: float
    steps: int


def fit(
    rows: Rows,
    targets: NDArray[Any],
    l2: float,
    *,
    sample_weights: Array | None = None,
    start: tuple[Array, float] | None = None,
    tolerance: float = 1e-8,
    max_steps: int = 1000,
) -> Fit:
    """The optimum, to a largest absolute value of the gradient of ``tolerance``.

    Args:
        targets: ``(n,)`` 0 or 1.
        sample_weights: ``(n,)``, ones by default; only their ratios matter.
        start: weights and intercept to begin from.
    """
    signs = 2.0 * np.asarray(targets, dtype=np.float64) - 1
    share = np.ones(len(signs)) if sample_weights is None else np.asarray(sample_weights, dtype=np.float64)
    share = share / share.sum()
    at = np.zeros(rows.shape[1] + 1)
    if start is not None:
        at[:-1], at[-1] = start

    def evaluate(point: Array) -> tuple[float, Array]:
        margins = signs * (rows.times(point[:-1]) + point[-1])
        loss = float(share @ np.logaddexp(0, -margins)) + 0.5 * l2 * float(point[:-1] @ point[:-1])
        residuals = -signs * share * expit(-margins)
        return loss, np.append(rows.transposed_times(residuals) + l2 * point[:-1], residuals.sum())

    loss, gradient = evaluate(at)
    memory: deque[tuple[Array, Array]] = deque(maxlen=HISTORY)
    steps = 0
    while np.abs(gradient).max() > tolerance and steps < max_steps:
        direction = -_two_loops(gradient, memory)
        slope = float(direction @ gradient)
        if slope >= 0:  # rounding has spoilt the memory
            memory.clear()
            direction, slope = -gradient, -float(gradient @ gradient)
        length = 1.0 if memory else min(1.0, 1.0 / float(np.abs(gradient).sum()))
        while True:
            moved = at + length * direction
            new_loss, new_gradient = evaluate(moved)
            if new_loss <= loss + SUFFICIENT * length * slope or length < 1e-12:
                break
            length /= 2
        change, turn = moved - at, new_gradient - gradient
        if float(change @ turn) > 1e-12 * float(turn @ turn):
            memory.append((change, turn))
        steps += 1
        if new_loss >= loss and length < 1e-12:
            break  # no further in double precision
        at, loss, gradient = moved, new_loss, new_gradient
    return Fit(at[:-1], float(at[-1]), loss, float(np.abs(gradient).max()), steps)


def _two_loops(gradient: Array, memory: deque[tuple[Array, Array]]) -> Array:
    """Algorithm 7.4: the inverse Hessian's estimate times the gradient."""
    result, scales = gradient.copy(), []
    for change, turn in reversed(memory):
        scale = float(change @ result) / float(change @ turn)
        result = result - scale * turn
        scales.append(scale)
    if memory:
        change, turn = memory[-1]
        result = result * (float(change @ turn) / float(turn @ turn))
    for (change, turn), scale in zip(memory, reversed(scales), strict=True):
        result = result + change * (scale - float(turn @ result) / float(change @ turn))
    return result


def expit(values: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    made: Array = 0.5 * (1 + np.tanh(0.5 * values))
    return made


def log_loss(logits: Array, targets: NDArray[Any], weights: Array | None = None) -> float:
    """Mean (or weighted mean) of -ln p of the targets."""
    signs = 2.0 * np.asarray(targets, dtype=np.float64) - 1
    return float(np.average(np.logaddexp(0, -signs * logits), weights=weights))


def auc(scores: NDArray[Any], targets: NDArray[Any]) -> float:
    """P(a positive scores above a negative), ties half (Mann and Whitney 1947); NaN without both."""
    positives = np.asarray(targets).astype(bool)
    count, others = int(positives.sum()), int((~positives).sum())
    if not count or not others:
        return float("nan")
    _, where, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[where]
    return float((ranks[positives].sum() - count * (count + 1) / 2) / (count * others))
