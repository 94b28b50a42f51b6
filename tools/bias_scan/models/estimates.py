"""Scores of models as statistics of sums over units, with paired-bootstrap intervals and differences.

Every score is a function of column sums over units (pairs of sentences, target terms, twins), so one bootstrap
serves all: units are drawn with replacement, columns summed, the statistic taken again. Two models on the same
units are compared on the same draws. Units with equal rows are drawn together by their number, which gives the
same distribution and makes a million predictions as cheap as their few patterns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tuneutils.tools.bias_scan.intervals import percentiles, rounded

Floats = NDArray[np.float64]
#: ``(resamples, columns)`` sums to ``(resamples,)`` values; NaN where there is none.
Statistic = Callable[[Floats], Floats]
RESAMPLES = 10_000
CHUNK_VALUES = 4_000_000
NO_EVIDENCE = "A low score is no evidence that bias is absent: it says what this test, with this formula, found."


@dataclass(frozen=True)
class Measure:
    """One score of one model on one set.

    Attributes:
        columns: ``(units, k)``, what is summed.
        n: items behind it; more than units where several make one unit.
        neutral: the value that shows no bias; None where the score is one of quality (accuracy, LMS).
        ties: items whose sides scored equal.
        more: further keys of the row.
    """

    test: str
    metric: str
    formula: str
    columns: Floats
    statistic: Statistic
    n: int
    axis: str = "all"
    group: str = "all"
    neutral: float | None = None
    ties: int = 0
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.test, self.metric, self.axis, self.group

    @property
    def value(self) -> float | None:
        """The score; None where the statistic has no value."""
        if not len(self.columns):
            return None
        found = float(_quiet(self.statistic, self.columns.sum(axis=0, keepdims=True))[0])
        return found if np.isfinite(found) else None


@dataclass(frozen=True)
class Settings:
    """How scores are estimated: below ``min_items`` they are refused."""

    seed: int = 0
    resamples: int = RESAMPLES
    min_items: int = 30


def ratio(sums: Floats) -> Floats:
    """First column over second."""
    made: Floats = sums[:, 0] / sums[:, 1]
    return made


def percent(sums: Floats) -> Floats:
    """First column over second, in per cent."""
    return 100.0 * ratio(sums)


def share(hits: ArrayLike) -> Floats:
    """``(n, 2)`` columns of a mean: the values, and ones."""
    values = np.asarray(hits, dtype=np.float64)
    return np.stack([values, np.ones_like(values)], axis=1)


def cluster(columns: ArrayLike, labels: Sequence[Any]) -> Floats:
    """Sums of the rows of each label, in order of first appearance: ``(labels, k)``."""
    values = np.asarray(columns, dtype=np.float64)
    order = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    sums = np.zeros((len(order), values.shape[1]))
    np.add.at(sums, [order[label] for label in labels], values)
    return sums


def estimate(measure: Measure, model: str, settings: Settings) -> dict[str, Any]:
    """The row of a score: value, interval, n, ties, formula; or why it is refused."""
    row = _labels(measure, model)
    reason = _refusal(measure, settings)
    if reason:
        return {**row, "value": None, "low": None, "high": None, "refused": reason}
    low, high = _interval(measure.columns, measure.statistic, settings)
    return rounded({**row, "value": measure.value, "low": low, "high": high, **measure.more})


def difference(measure: Measure, base: Measure, model: str, baseline: str, settings: Settings) -> dict[str, Any]:
    """The row of a paired difference of one score of two models over the same units.

    ``bias_change`` is the change of the distance from the neutral value: below zero, bias fell.

    Raises:
        ValueError: the two were not measured on the same units.
    """
    row = {**_labels(measure, model), "baseline": baseline}
    del row["ties"]
    if measure.columns.shape != base.columns.shape:
        raise ValueError("the two models were not measured on the same items")
    reason = _refusal(measure, settings) or _refusal(base, settings)
    if reason:
        return {**row, "value": None, "low": None, "high": None, "refused": reason}
    k = measure.columns.shape[1]
    both = np.concatenate([measure.columns, base.columns], axis=1)
    sums = resampled_sums(both, settings.seed, settings.resamples)
    new, old = _quiet(measure.statistic, sums[:, :k]), _quiet(base.statistic, sums[:, k:])
    assert measure.value is not None and base.value is not None
    low, high = _bounds(both, new - old)
    row |= {"value": measure.value - base.value, "low": low, "high": high}
    if measure.neutral is not None:
        change = np.abs(new - measure.neutral) - np.abs(old - measure.neutral)
        fell_low, fell_high = _bounds(both, change)
        at = abs(measure.value - measure.neutral) - abs(base.value - measure.neutral)
        row["bias_change"] = {"value": at, "low": fell_low, "high": fell_high}
    return rounded(row)


def resampled_sums(columns: Floats, seed: int, resamples: int) -> Floats:
    """``(resamples, k)`` sums over units drawn with replacement."""
    patterns, counts = np.unique(columns, axis=0, return_counts=True)
    units = len(columns)
    rng = np.random.default_rng(seed)
    size = max(1, CHUNK_VALUES // len(patterns))
    made = [
        rng.multinomial(units, counts / units, size=min(size, resamples - start)) @ patterns
        for start in range(0, resamples, size)
    ]
    return np.concatenate(made)


def _interval(columns: Floats, statistic: Statistic, settings: Settings) -> tuple[float | None, float | None]:
    if len(columns) < 2:
        return None, None
    return _bounds(columns, _quiet(statistic, resampled_sums(columns, settings.seed, settings.resamples)))


def _bounds(columns: Floats, values: Floats) -> tuple[float | None, float | None]:
    """Percentiles; none where all units are alike, of which resampling shows no spread."""
    if len(columns) < 2 or (columns == columns[0]).all():
        return None, None
    return percentiles(values)


def _refusal(measure: Measure, settings: Settings) -> str | None:
    if measure.n < settings.min_items:
        return f"n {measure.n} is below --min-items {settings.min_items}"
    if measure.value is None:
        return "no value: nothing to divide by"
    return None


def _labels(measure: Measure, model: str) -> dict[str, Any]:
    row: dict[str, Any] = {"model": model, "test": measure.test, "axis": measure.axis, "group": measure.group}
    row |= {"metric": measure.metric, "formula": measure.formula, "n": measure.n, "units": len(measure.columns)}
    return row | {"ties": measure.ties, "neutral": measure.neutral}


def _quiet(statistic: Statistic, sums: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(statistic(sums), dtype=np.float64)
