"""Scores of models as statistics of sums over units, with paired-bootstrap intervals and differences.

Every score is a function of column sums over units (pairs of sentences, target terms, twins), so one
bootstrap serves all: units are drawn with replacement, columns summed, the statistic taken again. Two
models on the same units are compared on the same draws. Units with equal rows are drawn together by their
number, which gives the same distribution and makes a million predictions as cheap as their few patterns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tuneutils.tools.bias_scan.intervals import percentiles
from tuneutils.tools.bias_scan.report import Score

Floats = NDArray[np.float64]
#: ``(resamples, columns)`` sums to ``(resamples,)`` values; NaN where there is none.
Statistic = Callable[[Floats], Floats]
RESAMPLES = 10_000
CHUNK_VALUES = 4_000_000
ALIKE = "all units are alike, so that resampling shows no spread"


@dataclass(frozen=True)
class Measure:
    """One score of one model on one set.

    Attributes:
        columns: ``(units, k)``, what is summed.
        n: items behind it; more than units where several make one unit.
        group: the part of the set, empty for all of it.
        neutral: the value that shows no bias; None where the score is one of quality (accuracy, LMS).
        ties: items whose sides scored equal; None where there are no sides.
        minimum: the n below which the score is refused, if not ``Settings.min_items``.
        extra: further numbers.
    """

    test: str
    metric: str
    formula: str
    columns: Floats
    statistic: Statistic
    n: int
    group: str = ""
    neutral: float | None = None
    ties: int | None = None
    unit: str = "items"
    minimum: int | None = None
    extra: Mapping[str, float | int] = field(default_factory=dict)
    note: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.test, self.group, self.metric

    @property
    def value(self) -> float | None:
        """The score; None where the statistic has no value."""
        if not len(self.columns):
            return None
        found = float(_quiet(self.statistic, self.columns.sum(axis=0, keepdims=True))[0])
        return found if np.isfinite(found) else None

    def least(self, settings: Settings) -> int:
        """The n below which it is refused."""
        return settings.min_items if self.minimum is None else min(self.minimum, settings.min_items)

    def score(self, model: str = "", **changes: Any) -> Score:
        """The report's row without its value; ``model`` goes before the group."""
        group = ":".join(part for part in (model, self.group) if part)
        extra = {"ties": self.ties, "units": len(self.columns), "neutral": self.neutral, **self.extra}
        kept = {k: v for k, v in extra.items() if v is not None}
        named = {
            "axis": self.test,
            "group": group,
            "metric": self.metric,
            "formula": self.formula,
            "n": self.n,
        }
        return Score(**{**named, "unit": self.unit, "extra": kept, "note": self.note, **changes})


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


def estimate(measure: Measure, settings: Settings, model: str = "") -> Score:
    """The score with its interval."""
    row = {"minimum": measure.least(settings), "value": measure.value}
    if measure.value is None:
        return measure.score(model, **row, note=measure.note or "nothing to divide by")
    low, high = _bounds(measure.columns, settings, measure.statistic)
    return measure.score(model, **row, low=low, high=high, note=_note(measure.note, measure.columns))


def differences(
    measure: Measure, base: Measure, settings: Settings, model: str, baseline: str
) -> list[Score]:
    """The paired difference of one score of two models over the same units, and the change of bias.

    ``METRIC-bias-change`` is the change of the distance from the neutral value: below zero, bias fell.

    Raises:
        ValueError: the two were not measured on the same units.
    """
    if measure.columns.shape != base.columns.shape:
        raise ValueError("the two models were not measured on the same items")
    common = {
        "minimum": measure.least(settings),
        "formula": f"{model} minus {baseline}, paired: {measure.formula}",
    }
    plain = {**common, "metric": f"{measure.metric}-difference", "extra": _sides(measure, base, settings)}
    if measure.value is None or base.value is None:
        return [measure.score(model, **plain, note="no value on one side")]
    k = measure.columns.shape[1]
    both = np.concatenate([measure.columns, base.columns], axis=1)

    def change(sums: Floats) -> Floats:
        return measure.statistic(sums[:, :k]) - base.statistic(sums[:, k:])

    low, high = _bounds(both, settings, change)
    note = _note("", both)
    made = [measure.score(model, **plain, value=measure.value - base.value, low=low, high=high, note=note)]
    neutral = measure.neutral
    if neutral is None:
        return made

    def distance(sums: Floats) -> Floats:
        old = np.abs(base.statistic(sums[:, k:]) - neutral)
        return np.abs(measure.statistic(sums[:, :k]) - neutral) - old

    at = abs(measure.value - neutral) - abs(base.value - neutral)
    low, high = _bounds(both, settings, distance)
    formula = f"change of |score - {neutral:g}| from {baseline} to {model}, paired: {measure.formula}"
    named = {"metric": f"{measure.metric}-bias-change", "formula": formula, "extra": {"units": len(both)}}
    return [*made, measure.score(model, **{**common, **named}, value=at, low=low, high=high, note=note)]


def _sides(measure: Measure, base: Measure, settings: Settings) -> dict[str, float | int | None]:
    """Both scores with their intervals, for the plot of before against after."""
    made: dict[str, float | int | None] = {"units": len(measure.columns)}
    for name, side in (("before", base), ("after", measure)):
        low, high = _bounds(side.columns, settings, side.statistic)
        made |= {name: side.value, f"{name}_low": low, f"{name}_high": high}
    return made


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


def _bounds(columns: Floats, settings: Settings, statistic: Statistic) -> tuple[float | None, float | None]:
    """Percentiles of the resamples; none where all units are alike."""
    if _alike(columns):
        return None, None
    return percentiles(_quiet(statistic, resampled_sums(columns, settings.seed, settings.resamples)))


def _alike(columns: Floats) -> bool:
    return len(columns) < 2 or bool((columns == columns[0]).all())


def _note(note: str, columns: Floats) -> str:
    return "; ".join(part for part in (note, ALIKE if _alike(columns) else "") if part)


def _quiet(statistic: Statistic, sums: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(statistic(sums), dtype=np.float64)
