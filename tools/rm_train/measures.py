"""What a reward model is worth, in numbers with intervals, from scores alone.

Intervals are 95 % percentile bootstrap intervals; comparisons of one prompt are resampled together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tuneutils.shared.evaluate import ratio_estimate

Floats = NDArray[np.float64]
RESAMPLES = 2000
BINS = 10
DIFFERENCE_BINS = 5


def estimate(values: ArrayLike, clusters: Sequence[str], seed: int) -> dict[str, Any]:
    """A mean with its interval."""
    return ratio_estimate(values, clusters=clusters, seed=seed, resamples=RESAMPLES).as_json()


def correct(differences: ArrayLike, targets: ArrayLike) -> Floats:
    """1 where the model prefers what most raters do, ½ where it cannot tell; NaN where they are even."""
    d, p = _floats(differences), _floats(targets)
    made = 0.5 * (1 + np.sign(d) * np.sign(p - 0.5))
    return np.where(p == 0.5, np.nan, made)


def cross_entropy(differences: ArrayLike, targets: ArrayLike) -> Floats:
    """Of the preference given the Bradley–Terry probability σ(difference), in nats."""
    d, p = _floats(differences), _floats(targets)
    return p * np.logaddexp(0, -d) + (1 - p) * np.logaddexp(0, d)


def reliability(
    differences: ArrayLike, targets: ArrayLike, clusters: Sequence[str], seed: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Confidence σ(|difference|) of the preferred side against how often raters prefer it too.

    Gives bins of equal width from ½ to 1, and the expected calibration error Σ n_b/n |accuracy_b -
    confidence_b| over them (Guo et al. 2017, equation 3).

    Noise adds to every |gap|, so the estimate is too high, and a resample's is higher by as much again: the
    percentile interval may lie above the truth altogether (it never holds 0). The interval is therefore the
    basic one, the percentiles mirrored at the estimate (Davison and Hinkley 1997, section 5.2), and starts
    at 0 where noise alone, the resampled gaps less their mean, makes as large an error in one of twenty. On
    simulated scores of 60 to 1000 pairs, calibrated or too sure, it holds the truth in 88 to 95 % of samples.
    """
    d, p = _floats(differences), _floats(targets)
    confidence = 1 / (1 + np.exp(-np.abs(d)))
    observed = np.where(d > 0, p, np.where(d < 0, 1 - p, 0.5))
    at = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    columns = np.zeros((len(d), BINS, 3))
    columns[np.arange(len(d)), at] = np.stack([np.ones_like(d), confidence, observed], axis=1)
    sums = columns.sum(0)
    bins = [
        {
            "low": 0.5 + b / (2 * BINS),
            "high": 0.5 + (b + 1) / (2 * BINS),
            "confidence": float(sums[b, 1] / sums[b, 0]),
            "accuracy": float(sums[b, 2] / sums[b, 0]),
            "n": int(sums[b, 0]),
        }
        for b in range(BINS)
        if sums[b, 0]
    ]
    return bins, _calibration_interval(columns.reshape(len(d), -1), clusters, seed)


def _calibration_interval(columns: Floats, clusters: Sequence[str], seed: int) -> dict[str, Any]:
    sums, resamples = _resamples(columns, clusters, seed)
    whole = sums.sum(0, keepdims=True)
    value = float(_calibration_error(whole)[0])
    made: dict[str, Any] = {"value": value, "low": None, "high": None}
    if len(resamples):
        noise = np.array(resamples)
        noise.reshape(len(noise), -1, 3)[..., 1:] -= whole.reshape(1, -1, 3)[..., 1:]
        low, high = 2 * value - np.percentile(_calibration_error(resamples), [97.5, 2.5])
        if value <= np.percentile(_calibration_error(noise), 95):
            low = 0.0
        made |= {"low": max(0.0, float(low)), "high": float(np.clip(high, value, 1.0))}
    return {**made, "n": len(columns), "clusters": len(sums)}


def _calibration_error(sums: Floats) -> Floats:
    cells = sums.reshape(len(sums), -1, 3)
    gaps = np.abs(cells[..., 2] - cells[..., 1]).sum(1)
    made: Floats = gaps / cells[..., 0].sum(1)
    return made


def by_bin(
    hits: Floats, sizes: Floats, edges: Sequence[float], clusters: Sequence[str], seed: int
) -> list[dict[str, Any]]:
    """Accuracy in bins [edge, next edge) of another quantity; the last bin holds its upper edge too."""
    made = []
    for i, (low, high) in enumerate(pairwise(edges)):
        last = i == len(edges) - 2
        inside = (sizes >= low) & ((sizes <= high) if last else (sizes < high)) & np.isfinite(hits)
        if inside.any():
            at = np.flatnonzero(inside)
            found = estimate(hits[at], [clusters[j] for j in at], seed)
            made.append({"from": float(low), "to": float(high), "accuracy": found})
    return made


def quantile_edges(sizes: Floats, count: int = DIFFERENCE_BINS) -> list[float]:
    """Edges of up to ``count`` bins with as many values each."""
    return sorted(set(np.quantile(sizes, np.linspace(0, 1, count + 1)).tolist()))


def correlations(x: ArrayLike, y: ArrayLike, clusters: Sequence[str], seed: int) -> dict[str, Any]:
    """Pearson's and Spearman's; the latter's ranks are those of the whole sample in every resample."""
    pairs = {
        "pearson": (_floats(x), _floats(y)),
        "spearman": (average_ranks(_floats(x)), average_ranks(_floats(y))),
    }
    made = {}
    for name, (a, b) in pairs.items():
        a, b = a - a.mean(), b - b.mean()
        columns = np.stack([np.ones_like(a), a, b, a * a, b * b, a * b], axis=1)
        made[name] = resampled(columns, _correlation, clusters, seed)
    return made


def _correlation(sums: Floats) -> Floats:
    n, a, b, aa, bb, ab = sums.T
    with np.errstate(invalid="ignore", divide="ignore"):
        made: Floats = (ab - a * b / n) / np.sqrt((aa - a * a / n) * (bb - b * b / n))
    return made


def average_ranks(values: Floats) -> Floats:
    """Ranks from 1; equal values share the mean of theirs."""
    unique, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    del unique
    last = np.cumsum(counts)
    made: Floats = (last - (counts - 1) / 2)[inverse].astype(np.float64)
    return made


def resampled(
    columns: Floats, statistic: Callable[[Floats], Floats], clusters: Sequence[str], seed: int
) -> dict[str, Any]:
    """A statistic of column sums with its interval.

    Args:
        columns: ``(n, k)``.
        statistic: ``(m, k)`` sums → ``(m,)``; NaN where it is not defined.
    """
    sums, resamples = _resamples(columns, clusters, seed)
    value = float(statistic(sums.sum(0, keepdims=True))[0])
    made: dict[str, Any] = {"value": value if math.isfinite(value) else None, "low": None, "high": None}
    if len(resamples) and math.isfinite(value):
        low, high = np.nanpercentile(statistic(resamples), [2.5, 97.5])
        made |= {"low": float(low), "high": float(high)}
    return {**made, "n": len(columns), "clusters": len(sums)}


def _resamples(columns: Floats, clusters: Sequence[str], seed: int) -> tuple[Floats, Floats]:
    """Column sums of each cluster, and of each bootstrap resample of them; none of a single cluster."""
    order = {label: i for i, label in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros((len(order), columns.shape[1]))
    np.add.at(sums, [order[c] for c in clusters], columns)
    count = len(sums)
    if count < 2:
        return sums, np.zeros((0, columns.shape[1]))
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return sums, draws @ sums


def best_of_n(scores: Sequence[float], values: Sequence[float], n: int) -> float:
    """Expected value of the best-scored of ``n`` candidates drawn without replacement from N ≥ n.

    Exact for the N at hand, and so unbiased for n fresh ones: the candidate of rank i (from 1, ascending)
    is the best of C(i - 1, n - 1) of the C(N, n) subsets (Hilton and Gao 2022, Measuring Goodhart's law).
    Candidates of equal score share the mean of their values.
    """
    count = len(scores)
    if not 1 <= n <= count:
        raise ValueError(f"best of {n} of {count} candidates")
    order = np.argsort(np.asarray(scores, np.float64), kind="stable")
    ranked, worth = _floats(scores)[order], _floats(values)[order]
    for score in np.unique(ranked):
        worth[ranked == score] = worth[ranked == score].mean()
    weights = [math.comb(i, n - 1) / math.comb(count, n) for i in range(count)]
    return float(np.dot(weights, worth))


def best_of_n_curve(
    pools: Sequence[tuple[Sequence[float], Sequence[float] | None]], seed: int
) -> list[dict[str, Any]]:
    """For each n the mean over prompts that have n candidates or more.

    ``reward`` is the model's own score of its choice, ``value`` what the choice is worth by the records,
    ``kl`` = log n - (n - 1)/n an upper bound of the KL from the candidates' distribution (Beirami et al.
    2024, arXiv 2401.01879).
    """
    made: list[dict[str, Any]] = []
    for n in range(1, max((len(s) for s, _ in pools), default=0) + 1):
        usable = [(s, v) for s, v in pools if len(s) >= n]
        each = [str(i) for i in range(len(usable))]
        point: dict[str, Any] = {"n": n, "kl": math.log(n) - (n - 1) / n, "prompts": len(usable)}
        point["reward"] = estimate([best_of_n(s, s, n) for s, _ in usable], each, seed)
        worth = [best_of_n(s, v, n) for s, v in usable if v is not None]
        if worth:
            point["value"] = estimate(worth, each[: len(worth)], seed)
        made.append(point)
    return made


def human_ceiling(
    votes: Sequence[Sequence[float]], differences: ArrayLike, clusters: Sequence[str], seed: int
) -> dict[str, Any] | None:
    """Agreement of one rater with the majority of the others, and of the model with the same majorities.

    Each rater of an item is left out in turn; an even vote agrees by half, and where the others are evenly
    split there is nothing to agree with. None where no item has such a majority.
    """
    d = _floats(differences)
    raters: list[float] = []
    model: list[float] = []
    labels: list[str] = []
    for values, difference, cluster in zip(votes, d, clusters, strict=True):
        signs = np.sign(np.asarray(values, np.float64))
        for sign in signs:
            majority = np.sign(signs.sum() - sign)
            if len(signs) > 1 and majority:
                raters.append(0.5 * (1 + sign * majority))
                model.append(0.5 * (1 + np.sign(difference) * majority))
                labels.append(cluster)
    if not raters:
        return None
    return {"rater": estimate(raters, labels, seed), "model": estimate(model, labels, seed)}


def _floats(values: ArrayLike) -> Floats:
    return np.array(values, dtype=np.float64)
