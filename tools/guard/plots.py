"""The evaluation as a picture whose bytes depend on the numbers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STYLE: dict[Any, Any] = {
    "figure.dpi": 110,
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Recall by category, over-refusal by category, reliability."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
        _shares(axes[0], report["by_category"], "recall", "recall")
        _shares(axes[1], report["by_category"], "false_positives", "harmless requests flagged")
        axes[1].axvline(report["budget"], color="tab:red", linewidth=1, label="budget")
        axes[1].legend()
        _reliability(axes[2], report["reliability"])
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)


def _shares(axis: Any, rows: Sequence[Mapping[str, Any]], key: str, title: str) -> None:
    found = [row for row in rows if row[key]["n"]]
    names = [f"{row['category']} ({row[key]['n']})" for row in found]
    values = [row[key]["value"] for row in found]
    below = [row[key]["value"] - row[key]["low"] for row in found]
    above = [row[key]["high"] - row[key]["value"] for row in found]
    places = range(len(found))
    axis.errorbar(values, places, xerr=[below, above], fmt="o", color="tab:blue", capsize=2)
    axis.set_yticks(places, names)
    axis.set_xlim(-0.02, 1.02)
    axis.invert_yaxis()
    axis.set_title(f"{title}, 95 %")


def _reliability(axis: Any, bins: Sequence[Mapping[str, Any]]) -> None:
    axis.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    below = [b["value"] - b["low"] for b in bins]
    above = [b["high"] - b["value"] for b in bins]
    points = [b["score"] for b in bins], [b["value"] for b in bins]
    axis.errorbar(*points, yerr=[below, above], fmt="o-", color="tab:blue", capsize=2)
    axis.set_xlabel("score")
    axis.set_ylabel("share of failures")
    axis.set_title("reliability, 95 %")
