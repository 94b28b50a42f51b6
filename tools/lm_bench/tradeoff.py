"""Quality against what it costs: the Pareto-optimal models, and which of them to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.tools.lm_bench.metrics import metric
from tuneutils.tools.lm_bench.params import COSTS, RUN_COSTS
from tuneutils.tools.lm_bench.report import Report, forgetting


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


def fronts(
    report: Report, quality: tuple[str, str], rows: Sequence[dict[str, Any]], costs: Sequence[str] = ()
) -> dict[str, list[str]]:
    """The Pareto-optimal models by each of ``costs`` (all of them if empty) that at least two models have."""
    better = metric(report["tasks"][quality[0]]["kind"], quality[1]).better
    return {
        cost: pareto(rows, cost, better)
        for cost in costs or (*COSTS, *RUN_COSTS)
        if sum(r.get(cost) is not None for r in rows) > 1
    }
