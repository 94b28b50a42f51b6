"""Intervals of statistics that are no plain ratio: a bootstrap over buckets, a jackknife over shards."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Bounds = tuple[float | None, float | None]
RESAMPLES = 2000
#: Quantile .975 of Student's t with 1 to 7 degrees of freedom.
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646)


def resampled_sums(columns: ArrayLike, seed: int, resamples: int = RESAMPLES) -> Floats:
    """``(resamples, columns)``: sums over rows drawn with replacement.

    Args:
        columns: ``(rows, columns)``.
    """
    values = np.asarray(columns, dtype=np.float64)
    rng = np.random.default_rng(seed)
    return rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=resamples) @ values


def percentiles(values: Floats) -> Bounds:
    """The 2.5th and 97.5th percentile of the resamples that have a value; Nones if under half have one."""
    good = values[np.isfinite(values)]
    if len(good) < max(2, len(values) / 2):
        return None, None
    low, high = np.percentile(good, [2.5, 97.5])
    return float(low), float(high)


def jackknife(statistic: Callable[[Floats], float | None], shards: Floats) -> tuple[float | None, Bounds]:
    """A statistic of summed shards and its 95 % interval, by the delete-a-group jackknife (Kott 2001).

    Args:
        statistic: of the sum of shards; None where it has no value.
        shards: ``(K, ...)``; those that are all zero are left out, as they say nothing of the spread.

    Returns:
        The value and ``value -+ t(.975, K-1) * SE``; no interval where a shard less leaves no value.
    """
    whole = shards.sum(axis=0)
    value = statistic(whole)
    parts = [part for part in shards if part.any()]
    if value is None or len(parts) < 2:
        return value, (None, None)
    left = [statistic(whole - part) for part in parts]
    if any(v is None for v in left):
        return value, (None, None)
    each = np.array(left, dtype=np.float64)
    k = len(each)
    spread = T_975[k - 2] * float(np.sqrt((k - 1) / k * ((each - each.mean()) ** 2).sum()))
    return value, (value - spread, value + spread)
