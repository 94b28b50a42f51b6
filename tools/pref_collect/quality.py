"""Agreement, bias and consistency of votes, with intervals from resampled items.

Krippendorff's α: K. Krippendorff (2011), Computing Krippendorff's Alpha-Reliability, section C.
Cohen's κ: J. Cohen (1960), and weighted (1968); its mean over pairs of raters is Light's κ (1971).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneutils.shared.evaluate import ratio_estimate
from tuneutils.shared.records import Record

Floats = NDArray[np.float64]
LEVELS = ("nominal", "ordinal", "interval")
FEWEST_SHARED = 5  # items of two raters below which their κ says nothing
_CHUNK = 256


def unit_coincidences(counts: Floats) -> Floats:
    """Each unit's coincidences ``(U, V, V)`` from its counts of values ``(U, V)``.

    Units with fewer than two values have none: nothing can be paired.
    """
    sizes = counts.sum(1)
    pairs = counts[:, :, None] * counts[:, None, :]
    pairs -= counts[:, :, None] * np.eye(counts.shape[1])
    return np.asarray(pairs / np.maximum(sizes - 1, 1)[:, None, None] * (sizes >= 2)[:, None, None])


def alpha_of(coincidences: Floats, values: Floats, level: str) -> Floats:
    """Krippendorff's α ``(R,)`` of coincidence matrices ``(R, V, V)``; NaN where only one value occurs.

    Args:
        values: ``(V,)``, ascending; their distances count for ``interval`` alone.
        level: one of ``LEVELS``.
    """
    marginals = coincidences.sum(-1)
    total = marginals.sum(-1)
    distance = _distances(marginals, values, level)
    observed = (coincidences * distance).sum((-1, -2))
    expected = (marginals[:, :, None] * marginals[:, None, :] * distance).sum((-1, -2))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected > 0, 1 - (total - 1) * observed / expected, np.nan)


def _distances(marginals: Floats, values: Floats, level: str) -> Floats:
    """Squared distances between values ``(R, V, V)``."""
    size = len(values)
    if level == "nominal":
        return np.broadcast_to(1 - np.eye(size), (len(marginals), size, size))
    if level == "interval":
        return np.broadcast_to(np.subtract.outer(values, values) ** 2, (len(marginals), size, size))
    # Ordinal: how many values lie between two ranks, half of each end's own counted.
    upto = np.cumsum(marginals, -1) - marginals / 2
    return np.asarray((upto[:, :, None] - upto[:, None, :]) ** 2)


def krippendorff_alpha(counts: Floats, values: Floats, level: str) -> float:
    """α of counts ``(U, V)``: how many raters gave each unit each value."""
    return float(alpha_of(unit_coincidences(counts).sum(0, keepdims=True), values, level)[0])


def kappa_of(confusion: Floats, weights: str = "none") -> Floats:
    """Cohen's κ ``(R,)`` of confusion matrices ``(R, V, V)``; NaN where chance alone agrees fully.

    Args:
        weights: ``none``, ``linear`` or ``quadratic`` in the difference of ranks.
    """
    ranks = np.arange(confusion.shape[-1])
    apart = np.abs(np.subtract.outer(ranks, ranks))
    cost = {"none": (apart > 0) * 1.0, "linear": apart * 1.0, "quadratic": apart**2.0}[weights]
    total = confusion.sum((-1, -2))
    expected = confusion.sum(-1)[:, :, None] * confusion.sum(-2)[:, None, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        chance = (expected * cost).sum((-1, -2)) / total
        return np.where(chance > 0, 1 - (confusion * cost).sum((-1, -2)) / chance, np.nan)


class Resamples:
    """How often each of ``n`` units is in each bootstrap sample: the same samples for every statistic."""

    def __init__(self, n: int, resamples: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.weights = np.empty((resamples, n), dtype=np.uint8)
        for start in range(0, resamples, _CHUNK):
            rows = min(_CHUNK, resamples - start)
            self.weights[start : start + rows] = rng.multinomial(n, np.full(n, 1 / n), size=rows)

    def sums(self, values: Floats, units: Sequence[int] | None = None) -> Floats:
        """Sums ``(R, …)`` of ``values (n, …)`` over each sample; ``units`` are the rows' units."""
        flat = values.reshape(len(values), -1)
        weights = self.weights if units is None else self.weights[:, list(units)]
        chunks = [weights[i : i + _CHUNK] @ flat for i in range(0, len(weights), _CHUNK)]
        return np.concatenate(chunks).reshape(len(weights), *values.shape[1:])


def interval(value: float, samples: Floats, n: int) -> dict[str, Any] | None:
    """A value with its 95 % percentile interval; None where the value is undefined."""
    if not np.isfinite(value):
        return None
    usable = samples[np.isfinite(samples)]
    low, high = np.percentile(usable, [2.5, 97.5]) if n > 1 and len(usable) else (None, None)
    as_float = (None if low is None else float(low), None if high is None else float(high))
    return {"value": float(value), "low": as_float[0], "high": as_float[1], "n": n}


def category(row: Record, mode: str) -> str:
    """What a vote says without its strength: a, b, tie, both-bad; to rate, good, bad, fair."""
    if mode == "rate":
        return "good" if row["value"] > 4 else "bad" if row["value"] < 4 else "fair"
    if row["both_bad"]:
        return "both-bad"
    return "a" if row["value"] > 0 else "b" if row["value"] < 0 else "tie"


def agreement(rows: Sequence[Record], mode: str, resamples: int, seed: int) -> dict[str, Any]:
    """α at three levels and κ between raters, of first votes on items that two raters or more answered.

    ``nominal`` and ``kappa`` compare what was preferred; the others the point of the scale (an answer
    "both bad" is its middle).
    """
    by_item: dict[str, list[Record]] = defaultdict(list)
    for row in rows:
        by_item[row["item"]].append(row)
    shared = [votes for votes in by_item.values() if len({v["rater"] for v in votes}) > 1]
    if not shared:
        return {"items": 0, "alpha": {}, "kappa": {}, "pairs": []}
    scale = np.arange(1, 8) if mode == "rate" else np.arange(-3, 4)
    names = sorted({category(row, mode) for row in rows})
    kinds = np.arange(len(names))
    samples = Resamples(len(shared), resamples, seed)
    alpha = {}
    for level in LEVELS:
        values = kinds if level == "nominal" else scale
        counts = np.zeros((len(shared), len(values)))
        for i, votes in enumerate(shared):
            for row in votes:
                counts[i, _rank(row, mode, level, names)] += 1
        units = unit_coincidences(counts)
        points = values.astype(np.float64)
        value = float(alpha_of(units.sum(0, keepdims=True), points, level)[0])
        alpha[level] = interval(value, alpha_of(samples.sums(units), points, level), len(shared))
    return {"items": len(shared), "alpha": alpha, **_kappas(shared, mode, names, samples)}


def _rank(row: Record, mode: str, level: str, names: Sequence[str]) -> int:
    if level == "nominal":
        return names.index(category(row, mode))
    return int(row["value"]) - (1 if mode == "rate" else -3)


def _kappas(
    shared: list[list[Record]], mode: str, names: Sequence[str], samples: Resamples
) -> dict[str, Any]:
    """κ of each pair of raters, and its mean."""
    units: dict[tuple[str, str], list[tuple[int, Record, Record]]] = defaultdict(list)
    for i, votes in enumerate(shared):
        for one, other in combinations(sorted(votes, key=lambda v: str(v["rater"])), 2):
            if one["rater"] != other["rater"]:
                units[one["rater"], other["rater"]].append((i, one, other))
    pairs, means = [], {}
    enough = {names_: found for names_, found in sorted(units.items()) if len(found) >= FEWEST_SHARED}
    for name, level, weights, size in (
        ("nominal", "nominal", "none", len(names)),
        ("quadratic", "ordinal", "quadratic", 7),
    ):
        points, drawn = [], []
        for found in enough.values():
            cells = np.zeros((len(found), size, size))
            for j, (_, one, other) in enumerate(found):
                cells[j, _rank(one, mode, level, names), _rank(other, mode, level, names)] = 1
            points.append(float(kappa_of(cells.sum(0, keepdims=True), weights)[0]))
            drawn.append(kappa_of(samples.sums(cells, [i for i, _, _ in found]), weights))
        pairs.append([interval(p, d, len(f)) for p, d, f in zip(points, drawn, enough.values())])
        finite = [i for i, p in enumerate(points) if np.isfinite(p)]
        if finite:
            with np.errstate(invalid="ignore"):
                mean = np.mean([drawn[i] for i in finite], axis=0)
            means[name] = interval(float(np.mean([points[i] for i in finite])), mean, len(shared))
    listed = [
        {"raters": list(who), "nominal": nominal, "quadratic": quadratic}
        for who, nominal, quadratic in zip(enough, *pairs)
    ]
    return {"kappa": means, "pairs": listed}


def share(hits: Sequence[bool], clusters: Sequence[str], resamples: int, seed: int) -> dict[str, Any] | None:
    """A share with its interval; votes on one item are resampled together."""
    if not hits:
        return None
    found = ratio_estimate(
        np.asarray(hits, dtype=np.float64), clusters=list(clusters), seed=seed, resamples=resamples
    )
    return {"value": found.value, "low": found.low, "high": found.high, "n": found.n}


def left_share(rows: Sequence[Record], resamples: int, seed: int) -> dict[str, Any] | None:
    """How often the left answer is preferred, where one is: ½ without position bias."""
    decided = [row for row in rows if row["value"] and not row["both_bad"]]
    hits = [(row["value"] > 0) == (row["left"] == "a") for row in decided]
    return share(hits, [row["item"] for row in decided], resamples, seed)


def self_consistency(rows: Sequence[Record], mode: str, resamples: int, seed: int) -> dict[str, Any]:
    """How often a rater's second vote on an item is like the first."""
    first = {(r["rater"], r["item"]): r for r in rows if not r["repeat"]}
    pairs = [
        (first[key], row) for row in rows if row["repeat"] and (key := (row["rater"], row["item"])) in first
    ]
    items = [one["item"] for one, _ in pairs]
    same = [category(one, mode) == category(other, mode) for one, other in pairs]
    exact = [one["value"] == other["value"] for one, other in pairs]
    return {
        "same_preference": share(same, items, resamples, seed),
        "same_point": share(exact, items, resamples, seed),
        "mean_points_apart": float(np.mean([abs(a["value"] - b["value"]) for a, b in pairs]))
        if pairs
        else None,
    }


def gold_accuracy(rows: Sequence[Record], mode: str, resamples: int, seed: int) -> dict[str, Any] | None:
    """How often a vote on a gold item is the known answer; a rating may be one point off."""
    gold = [row for row in rows if row.get("gold") is not None and not row["repeat"]]
    if mode == "rate":
        hits = [abs(row["value"] - int(row["gold"])) <= 1 for row in gold]
    else:
        hits = [category(row, mode) == row["gold"] for row in gold]
    return share(hits, [row["item"] for row in gold], resamples, seed)


def seconds(rows: Sequence[Record]) -> dict[str, float]:
    """Quantiles of the time from handing out to answering."""
    times = np.array([row["seconds"] for row in rows], dtype=np.float64)
    return {name: float(np.quantile(times, q)) for name, q in (("p10", 0.1), ("median", 0.5), ("p90", 0.9))}
