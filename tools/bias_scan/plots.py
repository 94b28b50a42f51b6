"""A report's scores as pictures whose bytes depend on the numbers alone: one a metric and axis."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from tuneutils.tools.bias_scan.report import Report, Score, scores_of

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STYLE: dict[Any, Any] = {
    "figure.dpi": 110,
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
MOST_GROUPS = 30


def draw(report: Report, folder: Path) -> dict[str, Path]:
    """``AXIS.METRIC`` → the file, for every metric with two values or more on an axis.

    A report's ``plots``, if it has them, name the metrics to draw. A comparison's scores carry ``before`` and
    ``after`` in ``extra`` and are drawn as these.
    """
    found: dict[str, list[Score]] = {}
    for score in scores_of(report):
        if score.value is not None and score.metric in report.get("plots", [score.metric]):
            found.setdefault(f"{score.axis}.{score.metric}", []).append(score)
    made = {}
    for name, scores in found.items():
        if len(scores) > 1 or "before" in scores[0].extra:
            folder.mkdir(exist_ok=True)
            made[name] = folder / (re.sub(r"[^\w.-]", "_", name) + ".png")
            _draw(name, scores, made[name])
    return made


def _draw(name: str, scores: Sequence[Score], path: Path) -> None:
    ranked = sorted(scores, key=lambda s: -abs(s.value or 0.0))[:MOST_GROUPS]
    height = 0.9 + 0.22 * len(ranked)
    with plt.rc_context(STYLE):
        # Fixed margins: a layout engine takes longer than the drawing.
        figure = plt.figure(figsize=(6, height))
        axes = figure.add_axes((0.3, 0.5 / height, 0.66, 1 - 0.8 / height))
        if "before" in ranked[0].extra:
            _points(axes, ranked, "before", "C0", -0.12)
            _points(axes, ranked, "after", "C1", 0.12)
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderpad=0)
        else:
            _points(axes, ranked, "", "C0", 0.0)
        axes.set_yticks(range(len(ranked)), [(s.group or s.axis)[-28:] for s in ranked])
        axes.set_ylim(len(ranked) - 0.4, -0.6)
        left = f" (the {MOST_GROUPS} largest of {len(scores)})" if len(scores) > MOST_GROUPS else ""
        axes.set(xlabel=scores[0].metric)
        axes.set_title(name + left, loc="left")
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)


def _points(axes: Any, scores: Sequence[Score], side: str, colour: str, shift: float) -> None:
    """Each value with its interval; ``side`` is before, after, or nothing for the score itself."""
    rows = []
    for at, score in enumerate(scores):
        if side:
            value, low, high = (score.extra.get(side + end) for end in ("", "_low", "_high"))
        else:
            value, low, high = score.value, score.low, score.high
        if value is not None:
            below = 0.0 if low is None else max(0.0, value - low)
            rows.append((value, at + shift, below, 0.0 if high is None else max(0.0, high - value)))
    if rows:
        values, places, below, above = zip(*rows)
        bars, style = [below, above], {"fmt": "o", "markersize": 3, "capsize": 2}
        axes.errorbar(values, places, xerr=bars, color=colour, label=side or None, **style)
