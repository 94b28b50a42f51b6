"""Quality against what it costs: the Pareto-optimal models, a table for plots, and the plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.tools.lm_bench.metrics import metric
from tuneutils.tools.lm_bench.report import Report, forgetting, to_csv

#: Deterministic costs, and those of the run logs; all are better when lower.
COSTS = {
    "trainable_parameters": "trainable parameters",
    "bytes": "bytes on disk",
    "bits_per_weight": "bits a weight",
    "forgetting": "forgetting on general text (bits per byte)",
}
RUN_COSTS = {
    "train_s": "training time (s)",
    "train_peak_rss_bytes": "peak memory in training (bytes)",
    "peak_rss_bytes": "peak memory in inference (bytes)",
    "decode_ms_per_token": "decode time (ms a token)",
}
LOGARITHMIC = {"trainable_parameters", "bytes"}


def quality_metric(report: Report, given: str | None) -> tuple[str, str]:
    """``(task, metric)`` of the trade-off: the one named, or the first task's first.

    Raises:
        ToolError: no such task or metric in the report.
    """
    tasks = report["tasks"]
    if given is None:
        name = next((n for n in tasks if n != "general"), next(iter(tasks)))
        return name, tasks[name]["metrics"][0]
    task, _, name = given.rpartition(":")
    if task not in tasks or name not in tasks[task]["metrics"]:
        known = [f"{t}:{m}" for t in tasks for m in tasks[t]["metrics"]]
        raise ToolError(f"--quality {given}: not among {', '.join(known)}", code=ExitCode.USAGE)
    return task, name


def points(
    report: Report, quality: tuple[str, str], runs: Mapping[str, Mapping[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """One row a model that has the quality metric: its costs, its quality, both with intervals."""
    rows = []
    for model in report["models"]:
        found = model["results"].get(quality[0], {}).get(quality[1])
        if found is None:
            continue
        info, lost = model["info"], forgetting(model) or {}
        row: dict[str, Any] = {
            "label": model["label"],
            "method": info.get("method") or model["label"],
            "metric": ":".join(quality),
            "quality": found["value"],
            "quality_low": found["low"],
            "quality_high": found["high"],
            "trainable_parameters": info.get("trainable_parameters"),
            "bytes": info.get("bytes"),
            "bits_per_weight": info.get("bits_per_weight"),
            "forgetting": lost.get("value"),
            "forgetting_low": lost.get("low"),
            "forgetting_high": lost.get("high"),
        }
        if runs is not None:
            row.update({key: runs.get(model["label"], {}).get(key) for key in RUN_COSTS})
        rows.append(row)
    return rows


def pareto(rows: Sequence[Mapping[str, Any]], cost: str, better: str | None) -> list[str]:
    """Labels of the models that no other beats in quality and cost at once, cheapest first.

    One model beats another when it is at least as good in both and better in one; intervals are not
    regarded. Models without the cost are left out.
    """
    sign = -1 if better == "higher" else 1
    known = [(r[cost], sign * r["quality"], r["label"]) for r in rows if r.get(cost) is not None]
    kept = [
        a
        for a in known
        if not any(b[0] <= a[0] and b[1] <= a[1] and (b[0] < a[0] or b[1] < a[1]) for b in known)
    ]
    return [label for _, _, label in sorted(kept)]


def choice(report: Report, quality: tuple[str, str]) -> dict[str, Any]:
    """The models whose quality is within 1 % of the original's, and the smallest of them.

    The original is the baseline; without one, the best model.
    """
    better = metric(report["tasks"][quality[0]]["kind"], quality[1]).better
    rows = points(report, quality)
    best = next((r for r in rows if r["label"] == report["baseline"]), None)
    if best is None:
        best = min(rows, key=lambda r: -r["quality"] if better == "higher" else r["quality"])
    limit = best["quality"] * (0.99 if better == "higher" else 1.01)
    near = [r for r in rows if (r["quality"] >= limit if better == "higher" else r["quality"] <= limit)]
    sized = [r for r in near if r["bytes"] is not None]
    smallest = min(sized, key=lambda r: r["bytes"])["label"] if sized else None
    return {"best": best["label"], "within": [r["label"] for r in near], "smallest": smallest}


def choice_line(report: Report, runs: Mapping[str, Mapping[str, Any]]) -> str:
    """``smallest within 1 % of base: q8, fastest within 1 %: q8``; speed comes from the run logs."""
    found = report["choice"]
    speeds = {n: runs.get(n, {}).get("decode_tokens_per_s") for n in found["within"]}
    known = {n: s for n, s in speeds.items() if s is not None}
    fastest = max(known, key=lambda n: known[n]) if known else "not measured"
    return (
        f"{report['quality']}: smallest within 1 % of {found['best']}: {found['smallest']}, "
        f"fastest within 1 %: {fastest}"
    )


def fronts(report: Report, quality: tuple[str, str], rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """The Pareto-optimal models by each cost that at least two models have."""
    better = metric(report["tasks"][quality[0]]["kind"], quality[1]).better
    return {
        cost: pareto(rows, cost, better)
        for cost in (*COSTS, *RUN_COSTS)
        if sum(r.get(cost) is not None for r in rows) > 1
    }


def write_plots(
    folder: Path,
    report: Report,
    quality: tuple[str, str],
    rows: Sequence[dict[str, Any]],
    front: Mapping[str, Sequence[str]],
) -> None:
    """``tradeoff.csv`` and, with matplotlib, ``tradeoff.png`` and ``.svg`` with a panel for each cost."""
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
        figure = Figure(figsize=(5.2 * len(front), 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        for i, (cost, labels) in enumerate(front.items()):
            axes = figure.add_subplot(1, len(front), i + 1)
            _panel(axes, cost, labels, rows)
            axes.set_ylabel(": ".join(quality))
            _baseline(axes, report, quality)
        figure.savefig(folder / "tradeoff.png", dpi=110, metadata={"Software": None})
        figure.savefig(folder / "tradeoff.svg", metadata={"Date": None, "Creator": None})


def _panel(axes: Any, cost: str, labels: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
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
        axes.annotate(row["label"], (row[cost], row["quality"]), (4, 4), textcoords="offset points")
    front = sorted((r for r in known if r["label"] in labels), key=lambda r: (r[cost], r["quality"]))
    axes.plot([r[cost] for r in front], [r["quality"] for r in front], "--", color="C0", linewidth=0.8)
    if cost in LOGARITHMIC and all(r[cost] > 0 for r in known):
        axes.set_xscale("log")
    axes.set_xlabel({**COSTS, **RUN_COSTS}[cost])
    axes.grid(alpha=0.3)


def _bars(row: Mapping[str, Any], key: str) -> Any:
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    if low is None or high is None:
        return None
    return [[max(0.0, row[key] - low)], [max(0.0, high - row[key])]]


def _baseline(axes: Any, report: Report, quality: tuple[str, str]) -> None:
    """A line at the baseline's quality, which has no training cost to stand at."""
    for model in report["models"]:
        if model["label"] == report["baseline"] and quality[0] in model["results"]:
            value = model["results"][quality[0]][quality[1]]["value"]
            axes.axhline(value, color="0.3", linestyle=":", linewidth=0.8)
            axes.text(0.01, value, f" {model['label']}", transform=axes.get_yaxis_transform(), va="bottom")
