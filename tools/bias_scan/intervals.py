"""Bootstrap intervals of statistics that are no plain ratio."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
RESAMPLES = 2000


def resampled_sums(columns: ArrayLike, seed: int, resamples: int = RESAMPLES) -> Floats:
    """``(resamples, columns)``: sums over rows drawn with replacement.

    Args:
        columns: ``(rows, columns)``.
    """
    values = np.asarray(columns, dtype=np.float64)
    rng = np.random.default_rng(seed)
    made = [
        rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=min(200, resamples - at))
        for at in range(0, resamples, 200)
    ]
    return np.concatenate([counts @ values for counts in made])


def percentiles(values: Floats) -> tuple[float | None, float | None]:
    """The 2.5th and 97.5th percentile of the resamples that have a value; Nones if under half have one."""
    good = values[np.isfinite(values)]
    if len(good) < max(2, len(values) / 2):
        return None, None
    low, high = np.percentile(good, [2.5, 97.5])
    return float(low), float(high)


def interval(
    columns: ArrayLike, statistic: Callable[[Floats], Floats], seed: int, resamples: int = RESAMPLES
) -> tuple[float | None, float | None]:
    """95 % percentile interval of a statistic of column sums; None, None with fewer than two rows.

    Args:
        columns: ``(rows, columns)``.
        statistic: ``(resamples, columns)`` sums to ``(resamples,)`` values, NaN where it has none.
    """
    values = np.asarray(columns, dtype=np.float64)
    if len(values) < 2:
        return None, None
    return percentiles(statistic(resampled_sums(values, seed, resamples)))


def score(
    formula: str,
    value: float | None,
    bounds: tuple[float | None, float | None],
    n: int,
    **more: Any,
) -> dict[str, Any]:
    """A score as reports hold it: every one names its formula, its n and its interval."""
    low, high = bounds if value is not None else (None, None)
    return {
        "value": rounded(value),
        "low": rounded(low),
        "high": rounded(high),
        "n": n,
        "formula": formula,
        **more,
    }


def rounded(value: Any) -> Any:
    """Nine significant digits: sums made in another order agree."""
    if isinstance(value, Mapping):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{float(value):.9g}") if np.isfinite(value) else None
    return value
