"""What the student kept of its teacher, and whether the teacher helped: numbers with paired intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneutils.shared.divergences_model import Comparison
from tuneutils.shared.evaluate import RESAMPLES, Estimate, paired_difference, ratio_estimate

Column = Sequence[Comparison]


#: Metrics that compare a model with the teacher token by token, which needs one vocabulary.
DISTANCES = ("kl", "agreement", "win_rate_kl")


def describe(models: dict[str, Column], seed: int) -> dict[str, Any]:
    """The report on one set of sequences.

    Args:
        models: name → what it does on each sequence: ``student``, ``baseline`` where there is one, and
            ``teacher`` unless its vocabulary is another.
    """
    student = models["student"]
    made: dict[str, Any] = {
        "sequences": len(student),
        "tokens": sum(c.tokens for c in student),
        "models": {name: _one(column, seed) for name, column in models.items()},
    }
    if "teacher" in models:
        made["kept"] = {n: retention(models["teacher"], c, seed) for n, c in models.items() if n != "teacher"}
    if "baseline" in models:
        made["against_baseline"] = _against(student, models["baseline"], seed)
    if "teacher" not in models:
        for part in (*made["models"].values(), made.get("against_baseline", {})):
            for name in DISTANCES:
                part.pop(name, None)
    return made


def _one(column: Column, seed: int) -> dict[str, Any]:
    tokens = [c.tokens for c in column]
    return {
        "perplexity": ratio_estimate([c.nll for c in column], tokens, transform=np.exp, seed=seed).as_json(),
        "kl": ratio_estimate([c.kl for c in column], tokens, seed=seed).as_json(),
        "agreement": ratio_estimate([c.agree for c in column], tokens, seed=seed).as_json(),
        "accuracy": ratio_estimate([c.correct for c in column], tokens, seed=seed).as_json(),
        "calibration_error": calibration_error(column, seed).as_json(),
    }


def _against(student: Column, other: Column, seed: int) -> dict[str, Any]:
    """Differences, student less other, over the same sequences, and how often the student wins."""
    tokens = [c.tokens for c in student]

    def difference(field: str) -> dict[str, Any]:
        ours, theirs = ([getattr(c, field) for c in side] for side in (student, other))
        return paired_difference(ours, theirs, tokens, tokens, seed=seed).as_json()

    return {
        "nll": difference("nll"),
        "kl": difference("kl"),
        "agreement": difference("agree"),
        "accuracy": difference("correct"),
        "calibration_error": calibration_difference(student, other, seed).as_json(),
        "win_rate": win_rate(student, other, "nll", seed).as_json(),
        "win_rate_kl": win_rate(student, other, "kl", seed).as_json(),
    }


def win_rate(one: Column, other: Column, field: str, seed: int) -> Estimate:
    """Share of the sequences on which ``one`` has the lower ``field`` (nll, kl); equals count half."""
    wins = [
        0.5 * ((getattr(a, field) < getattr(b, field)) + (getattr(a, field) <= getattr(b, field)))
        for a, b in zip(one, other, strict=True)
    ]
    return ratio_estimate(wins, seed=seed)


def retention(teacher: Column, student: Column, seed: int) -> dict[str, Any]:
    """``accuracy``: right next tokens over the teacher's; ``lost_nll``: nats a token more than its."""
    tokens = [c.tokens for c in student]
    ours, theirs = ([c.nll for c in column] for column in (student, teacher))
    made = {"lost_nll": paired_difference(ours, theirs, tokens, tokens, seed=seed).as_json()}
    if sum(c.correct for c in teacher):
        kept = _ratio_of([c.correct for c in student], [c.correct for c in teacher], seed)
        made["accuracy"] = kept.as_json()
    return made


def _ratio_of(top: Sequence[float], bottom: Sequence[float], seed: int) -> Estimate:
    """A ratio of sums; resamples in which the bottom is 0 have no ratio, and are left out."""
    columns = np.stack([np.asarray(top, float), np.asarray(bottom, float)], 1)
    value = columns[:, 0].sum() / columns[:, 1].sum()
    if len(columns) < 2:
        return Estimate(value, None, None, len(columns), len(columns))
    sums = resampled(columns, seed)
    sums = sums[sums[:, 1] > 0]
    low, high = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5])
    return Estimate(float(value), float(low), float(high), len(columns), len(columns))


def calibration_error(column: Column, seed: int) -> Estimate:
    """Expected calibration error of the next token (Guo et al. 2017, arXiv 1706.04599, equation 5)."""
    return _calibration([column], seed, lambda values: values[0])


def calibration_difference(one: Column, other: Column, seed: int) -> Estimate:
    """The difference of two calibration errors over the same sequences."""
    return _calibration([one, other], seed, lambda values: values[0] - values[1])


def _calibration(columns: Sequence[Column], seed: int, combine: Any) -> Estimate:
    n = len(columns[0])
    stacked = [np.stack([c.bins.ravel() for c in column]) for column in columns]
    width = columns[0][0].bins.shape
    value = combine([ece(s.sum(0).reshape(width)) for s in stacked])
    if n < 2:
        return Estimate(float(value), None, None, n, n)
    drawn = combine([ece(resampled(s, seed).reshape(-1, *width)) for s in stacked])
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high), n, n)


def ece(bins: NDArray[np.float64]) -> Any:
    """``sum |right - confidence| / tokens`` of ``(..., bins, 3)`` sums: tokens, confidence, right."""
    return np.abs(bins[..., 2] - bins[..., 1]).sum(-1) / bins[..., 0].sum(-1)


def resampled(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Sums ``(RESAMPLES, columns)`` over bootstrap resamples of the rows ``(n, columns)``; by seed alone."""
    counts = np.random.default_rng(seed).multinomial(len(values), [1 / len(values)] * len(values), RESAMPLES)
    return counts @ values


def one_line(name: str, made: dict[str, Any]) -> str:
    """A set's report in a line for people."""

    def shown(value: dict[str, Any], digits: int = 3) -> str:
        if value["low"] is None:
            return f"{value['value']:.{digits}f}"
        return f"{value['value']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"

    student = made["models"]["student"]
    parts = [f"perplexity {shown(student['perplexity'], 1)}"]
    parts += [
        f"{label} {shown(student[key])}"
        for key, label in (("kl", "KL"), ("agreement", "agreement"))
        if key in student
    ]
    if "accuracy" in made.get("kept", {}).get("student", {}):
        parts.append(f"accuracy kept {shown(made['kept']['student']['accuracy'])}")
    line = f"{name} (n = {made['sequences']}): " + ", ".join(parts)
    if against := made.get("against_baseline"):
        rest = [f"{key} {shown(against[key])}" for key in ("kl", "nll", "win_rate") if key in against]
        line += "; less the baseline's: " + ", ".join(rest)
    return line


def finite(made: Any) -> bool:
    """Whether every number of a report is one."""
    if isinstance(made, dict):
        return all(map(finite, made.values()))
    return not isinstance(made, float) or math.isfinite(made)
