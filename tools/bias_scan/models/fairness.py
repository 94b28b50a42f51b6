"""Group fairness of predictions, as Fairlearn defines it: parity of selection, equalised odds.

The selection rate is the share of positive predictions, TPR and FPR that share among positive and negative
labels. The difference of demographic parity is the largest rate less the smallest over groups, that of
equalised odds the larger of the differences of TPR and FPR; ratios are the smallest over the largest
(Agarwal et al. 2018; Hardt et al. 2016).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tuneutils.tools.bias_scan.models.estimates import Floats, Measure, ratio

TEST = "fairness"
#: Columns of each group: n, positive predictions, positive labels, both, correct.
WIDTH = 5


def columns(
    groups: Sequence[str], predictions: Sequence[bool], labels: Sequence[bool] | None
) -> tuple[list[str], Floats]:
    """The names of the groups and ``(n, groups * WIDTH)`` columns."""
    names = sorted(set(groups))
    at = np.array([names.index(g) for g in groups])
    p = np.asarray(predictions, dtype=np.float64)
    y = np.zeros_like(p) if labels is None else np.asarray(labels, dtype=np.float64)
    made = np.zeros((len(p), len(names), WIDTH))
    made[np.arange(len(p)), at] = np.stack([np.ones_like(p), p, y, p * y, p == y], axis=1)
    return names, made.reshape(len(p), -1)


def measures(
    groups: Sequence[str], predictions: Sequence[bool], labels: Sequence[bool] | None
) -> list[Measure]:
    """The disparities over all groups, and each group's rates; without labels only those of selection."""
    names, sums = columns(groups, predictions, labels)
    made = []
    for metric, formula, statistic, neutral, labelled in DISPARITIES:
        if labels is not None or not labelled:
            made.append(
                Measure(TEST, metric, formula, sums, statistic, len(groups), neutral=neutral, unit="records")
            )
    for i, name in enumerate(names):
        own = sums[sums[:, i * WIDTH] > 0, i * WIDTH : (i + 1) * WIDTH]
        for metric, formula, top, bottom, labelled in RATES:
            if labels is not None or not labelled:
                parts = np.stack([top(own), bottom(own)], axis=1)
                count = int(parts[:, 1].sum())
                made.append(Measure(TEST, metric, formula, parts, ratio, count, name, unit="records"))
    return made


def _table(sums: Floats) -> Floats:
    return sums.reshape(len(sums), -1, WIDTH)


def selection(sums: Floats) -> Floats:
    """``(R, groups)`` selection rates."""
    t = _table(sums)
    made: Floats = t[..., 1] / t[..., 0]
    return made


def true_positive(sums: Floats) -> Floats:
    t = _table(sums)
    made: Floats = t[..., 3] / t[..., 2]
    return made


def false_positive(sums: Floats) -> Floats:
    t = _table(sums)
    made: Floats = (t[..., 1] - t[..., 3]) / (t[..., 0] - t[..., 2])
    return made


def spread(rates: Floats) -> Floats:
    made: Floats = rates.max(axis=-1) - rates.min(axis=-1)
    return made


def least_ratio(rates: Floats) -> Floats:
    made: Floats = rates.min(axis=-1) / rates.max(axis=-1)
    return made


def _both(of: Callable[[Floats], Floats], worst: Callable[..., Any]) -> Callable[[Floats], Floats]:
    return lambda sums: worst(of(true_positive(sums)), of(false_positive(sums)))


DISPARITIES: tuple[tuple[str, str, Callable[[Floats], Floats], float, bool], ...] = (
    ("demographic-parity-difference", "max - min selection rate", lambda s: spread(selection(s)), 0.0, False),
    ("demographic-parity-ratio", "min / max selection rate", lambda s: least_ratio(selection(s)), 1.0, False),
    ("equalized-odds-difference", "larger of max - min TPR and FPR", _both(spread, np.maximum), 0.0, True),
    ("equalized-odds-ratio", "smaller of min / max TPR and FPR", _both(least_ratio, np.minimum), 1.0, True),
    ("equal-opportunity-difference", "max - min TPR", lambda s: spread(true_positive(s)), 0.0, True),
)
RATES: tuple[tuple[str, str, Callable[[Floats], Any], Callable[[Floats], Any], bool], ...] = (
    ("selection-rate", "positive predictions / records", lambda c: c[:, 1], lambda c: c[:, 0], False),
    ("accuracy", "correct / records", lambda c: c[:, 4], lambda c: c[:, 0], True),
    ("tpr", "positive predictions / positive labels", lambda c: c[:, 3], lambda c: c[:, 2], True),
    (
        "fpr",
        "positive predictions / negative labels",
        lambda c: c[:, 1] - c[:, 3],
        lambda c: c[:, 0] - c[:, 2],
        True,
    ),
)
