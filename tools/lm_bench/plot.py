"""The trade-off as a table for plots and as a picture: a panel a cost, quality upwards or downwards."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tuneutils.tools.lm_bench.params import COSTS, RUN_COSTS
from tuneutils.tools.lm_bench.report import Report, to_csv

LOGARITHMIC = {"trainable_parameters", "bytes"}
#: From here on, worst to best, quality has a logarithmic axis: one bad model would flatten all others.
WIDE = 4.0
COLUMNS = 2
#: Width of a character and height of a line of the labels, in points.
CHARACTER, LINE = 4.4, 8.5
#: A label so far from its point gets a line to it.
FAR = 16.0


def write_plots(
    folder: Path,
    report: Report,
    quality: tuple[str, str],
    rows: Sequence[dict[str, Any]],
    front: Mapping[str, Sequence[str]],
) -> None:
    """``tradeoff.csv`` and, with matplotlib, ``tradeoff.png`` and ``.svg``."""
    import importlib.util

    folder.mkdir(parents=True, exist_ok=True)
    flagged = [
        {**r, **{f"pareto_{c}": int(r["label"] in labels) for c, labels in front.items()}} for r in rows
    ]
    (folder / "tradeoff.csv").write_text(to_csv(flagged), encoding="utf-8")
    if front and importlib.util.find_spec("matplotlib") is not None:
        _draw(folder, report, quality, rows, front)


def _draw(
    folder: Path,
    report: Report,
    quality: tuple[str, str],
    rows: Sequence[dict[str, Any]],
    front: Mapping[str, Sequence[str]],
) -> None:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "tuneutils", "svg.fonttype": "path", "font.size": 8}):
        columns = min(COLUMNS, len(front))
        lines = -(-len(front) // columns)
        figure = Figure(figsize=(6.4 * columns, 4.6 * lines), layout="constrained")
        FigureCanvasAgg(figure)
        panels = []
        for i, (cost, labels) in enumerate(front.items()):
            axes = figure.add_subplot(lines, columns, i + 1)
            _panel(axes, cost, labels, rows)
            axes.set_ylabel(": ".join(quality))
            _baseline(axes, report, quality)
            panels.append((axes, cost, labels))
        figure.draw_without_rendering()  # the axes stand still from here on
        figure.set_layout_engine("none")
        for axes, cost, labels in panels:
            _label(axes, [r for r in rows if r.get(cost) is not None], cost, labels)
        figure.savefig(folder / "tradeoff.png", dpi=110, metadata={"Software": None})
        figure.savefig(folder / "tradeoff.svg", metadata={"Date": None, "Creator": None})


def _panel(axes: Any, cost: str, labels: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    from matplotlib.ticker import EngFormatter

    known = [r for r in rows if r.get(cost) is not None]
    for row in known:
        best = row["label"] in labels
        axes.errorbar(
            row[cost],
            row["quality"],
            yerr=_bars(row, "quality"),
            xerr=_bars(row, cost),
            fmt="o" if best else "x",
            color="C0" if best else "0.5",
            capsize=2,
            linewidth=1,
        )
    front = sorted((r for r in known if r["label"] in labels), key=lambda r: (r[cost], r["quality"]))
    axes.plot([r[cost] for r in front], [r["quality"] for r in front], "--", color="C0", linewidth=0.8)
    if cost in LOGARITHMIC and all(r[cost] > 0 for r in known):
        axes.set_xscale("log")
    values = [r["quality"] for r in known]
    if min(values) > 0 and max(values) > WIDE * min(values):
        axes.set_yscale("log")
    if cost.endswith("bytes"):
        axes.xaxis.set_major_formatter(EngFormatter("B"))
        axes.xaxis.set_minor_formatter(EngFormatter("B"))
    axes.margins(x=0.12, y=0.08)
    axes.set_xlabel({**COSTS, **RUN_COSTS}[cost])
    axes.grid(alpha=0.3)


def _bars(row: Mapping[str, Any], key: str) -> Any:
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    if low is None or high is None:
        return None
    return [[max(0.0, row[key] - low)], [max(0.0, high - row[key])]]


def _baseline(axes: Any, report: Report, quality: tuple[str, str]) -> None:
    """A line at the baseline's quality, which may have no cost to stand at."""
    for model in report["models"]:
        if model["label"] == report["baseline"] and quality[0] in model["results"]:
            value = model["results"][quality[0]][quality[1]]["value"]
            axes.axhline(value, color="0.3", linestyle=":", linewidth=0.8)


def _label(axes: Any, rows: Sequence[Mapping[str, Any]], cost: str, best: Sequence[str]) -> None:
    """Write each label where it covers no point and no other label, with a line to its point if it is far."""
    scale = 72 / axes.figure.dpi
    points = [tuple(axes.transData.transform((r[cost], r["quality"])) * scale) for r in rows]
    frame = axes.bbox.extents * scale
    offsets = place([r["label"] for r in rows], points, tuple(frame))
    for row, (x, y) in zip(rows, offsets, strict=True):
        far = math.hypot(x, y) > FAR
        axes.annotate(
            row["label"],
            (row[cost], row["quality"]),
            (x, y),
            textcoords="offset points",
            fontsize=7,
            color="C0" if row["label"] in best else "0.25",
            va="center",
            arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.5} if far else None,
        )


Box = tuple[float, float, float, float]


def place(
    labels: Sequence[str], points: Sequence[tuple[float, float]], frame: Box
) -> list[tuple[float, float]]:
    """Offsets, from each point to its label's left middle, at which labels cover neither points nor labels.

    Args:
        points: where the points are, in typographic points, as are all lengths.
        frame: left, bottom, right and top, which no label crosses.

    Returns:
        One offset a label: of rings of candidates around the point the first that is free, else the nearest.
    """
    taken: list[Box] = [(x - 3, y - 3, x + 3, y + 3) for x, y in points]
    found = []
    for label, (x, y) in zip(labels, points, strict=True):
        width = CHARACTER * len(label)
        candidates = list(_candidates(width))
        free = (c for c in candidates if _is_free(_box(x, y, c, width), taken, frame))
        offset = next(free, candidates[0])
        taken.append(_box(x, y, offset, width))
        found.append(offset)
    return found


def _candidates(width: float) -> list[tuple[float, float]]:
    rings = [(5.0, 5.0), (8.0, 10.0), (14.0, 19.0), (22.0, 28.0), (30.0, 38.0), (40.0, 50.0), (52.0, 64.0)]
    made = [(5.0, 0.0), (-5.0 - width, 0.0)]
    for across, up in rings:
        sides = (across, -across - width, -width / 2)
        made += list(itertools.product(sides, (up, -up)))
    return made


def _box(x: float, y: float, offset: tuple[float, float], width: float) -> Box:
    left, middle = x + offset[0], y + offset[1]
    return left, middle - LINE / 2, left + width, middle + LINE / 2


def _is_free(box: Box, taken: Sequence[Box], frame: Box) -> bool:
    inside = box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]
    return inside and not any(
        box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken
    )
