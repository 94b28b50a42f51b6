"""The evaluation as a picture whose bytes depend on the numbers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from tuneutils.tools.rm_train.scored import Scored

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STYLE: dict[Any, Any] = {
    "figure.dpi": 110,
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def draw(report: Mapping[str, Any], scored: Sequence[Scored], path: Path) -> None:
    """Reliability, accuracy by difference, score against length, best of n."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(8, 6), layout="constrained")
        _reliability(axes[0, 0], report.get("calibration", []))
        _by_difference(axes[0, 1], report.get("by_difference", []))
        _length(axes[1, 0], report["normalisation"], scored)
        _best_of_n(axes[1, 1], report.get("best_of_n", []))
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)


def _reliability(axis: Any, bins: Sequence[Mapping[str, Any]]) -> None:
    axis.plot([0.5, 1], [0.5, 1], color="grey", linewidth=0.8)
    axis.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], marker="o")
    for b in bins:
        axis.annotate(str(b["n"]), (b["confidence"], b["accuracy"]), fontsize=6)
    axis.set(title="reliability (pairs a bin)", xlabel="confidence σ(|Δ|)", ylabel="accuracy", ylim=(0, 1.03))


def _by_difference(axis: Any, bins: Sequence[Mapping[str, Any]]) -> None:
    for b in bins:
        found = b["accuracy"]
        middle = (b["from"] + b["to"]) / 2
        axis.errorbar([middle], [found["value"]], yerr=_error(found), fmt="o", color="C0", capsize=3)
    axis.axhline(0.5, color="grey", linewidth=0.8)
    axis.set(title="accuracy by difference", xlabel="|Δ| (raw)", ylabel="accuracy", ylim=(0, 1.03))


def _length(axis: Any, normalisation: Mapping[str, float], scored: Sequence[Scored]) -> None:
    for name, color in (("chosen", "C0"), ("rejected", "C1")):
        lengths = [getattr(p, name).completion for one in scored for p in one.pairs]
        if lengths:
            scores = np.concatenate([getattr(one, name) for one in scored])
            axis.scatter(
                lengths, (scores - normalisation["mean"]) / normalisation["std"], s=4, label=name, color=color
            )
            axis.legend(fontsize=7)
    axis.set(title="score and length", xlabel="completion (tokens)", ylabel="score (normalised)")


def _best_of_n(axis: Any, points: Sequence[Mapping[str, Any]]) -> None:
    key = "value" if any("value" in p for p in points) else "reward"
    found = [(p["n"], p[key]) for p in points if key in p]
    for n, estimate in found:
        axis.errorbar([n], [estimate["value"]], yerr=_error(estimate), fmt="o", color="C0", capsize=3)
    axis.plot([n for n, _ in found], [e["value"] for _, e in found], color="C0")
    label = "share of comparisons won, or reward given" if key == "value" else "own score"
    axis.set(title="best of n", xlabel="n", ylabel=label)


def _error(found: Mapping[str, Any]) -> list[list[float]]:
    low = found["value"] if found["low"] is None else found["low"]
    high = found["value"] if found["high"] is None else found["high"]
    return [[max(0.0, found["value"] - low)], [max(0.0, high - found["value"])]]
