"""Intervals of statistics that are no plain ratio: a bootstrap over buckets, a jackknife over shards."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

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
    return _drawn(len(values), seed, resamples) @ values


@lru_cache(maxsize=2)
def _drawn(rows: int, seed: int, resamples: int) -> Floats:
    """``(resamples, rows)``: how often each row is drawn."""
    return (
        np.random.default_rng(seed)
        .multinomial(rows, np.full(rows, 1 / rows), size=resamples)
        .astype(np.float64)
    )


def percentiles(values: Floats) -> Bounds:
    """The 2.5th and 97.5th percentile of the resamples that have a value; Nones if under half have one."""
    good = values[np.isfinite(values)]
    if len(good) < max(2, len(values) / 2):
        return None, None
    low, high = np.percentile(good, [2.5, 97.5])
    return float(low), float(high)


def jackknife(statistic: Callable[[Floats], Floats], shards: Floats) -> list[tuple[float | None, Bounds]]:
    """Statistics of summed shards and their 95 % intervals, by the delete-a-group jackknife (Kott 2001).

    Args:
        statistic: ``(m,)`` values of the sum of shards; NaN where one has none.
        shards: ``(K, ...)``; those that are all zero are left out, as they say nothing of the spread.

    Returns:
        Each value with ``value -+ t(.975, K-1) * SE``; no interval where a shard less leaves no value.
    """
    whole = shards.sum(axis=0)
    values = statistic(whole)
    parts = [part for part in shards if part.any()]
    k = len(parts)
    if k < 2:
        return [(None if np.isnan(v) else float(v), (None, None)) for v in values]
    left = np.stack([statistic(whole - part) for part in parts])
    spread = T_975[k - 2] * np.sqrt((k - 1) / k * ((left - left.mean(axis=0)) ** 2).sum(axis=0))
    return [
        (None, (None, None))
        if np.isnan(v)
        else (float(v), (None, None) if np.isnan(s) else (float(v - s), float(v + s)))
        for v, s in zip(values, spread)
    ]
