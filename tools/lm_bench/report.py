"""From measured items to a report: estimates, paired differences, tables; and back from a report to items."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import MANIFEST, load_manifest, write_json
from tuneutils.shared.errors import ExitCode, ToolError, nearest
from tuneutils.shared.evaluate import RESAMPLES
from tuneutils.shared.records import open_writer, read
from tuneutils.tools.lm_bench.measured import Measured
from tuneutils.tools.lm_bench.metrics import Metric, difference, estimate, metric

SCHEMA = 1
REPORT, ITEMS, TABLE, TEXT = "report.json", "items.jsonl.gz", "table.csv", "report.md"
INFO = (
    "method",
    "trainable_parameters",
    "total_parameters",
    "bytes",
    "bits_per_weight",
    "base_bytes",
    "dtype",
    "quantization",
)

COST_COLUMNS = (
    "load_s",
    "ttft_s",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "bandwidth_share",
    "peak_rss_bytes",
    "train_s",
)

Report = dict[str, Any]


def is_report(path: str) -> bool:
    """Whether a path is a report that ``lm-bench`` wrote."""
    folder = Path(path)
    return (folder / MANIFEST).is_file() and load_manifest(folder).get("kind") == "report"


def load_report(path: str) -> list[Measured]:
    """The models of a report with their items; one model takes the folder's name.

    Raises:
        ToolError: the report is not this tool's, or damaged.
    """
    folder = Path(path)
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        models = [
            Measured(m["label"], m["info"], {n: report["tasks"][n] for n in m["results"]})
            for m in report["models"]
        ]
        by_label = {m.label: m for m in models}
        for row in read(folder / ITEMS, allow_empty=True):
            model, task = row.pop("model"), row.pop("task")
            by_label[model].items.setdefault(task, []).append(row)
    except (OSError, ValueError, KeyError) as exc:
        raise ToolError(f"{path}: a damaged report, or of another tool: {exc!r}; measure again") from exc
    if len(models) == 1:
        models[0].label = folder.resolve().name
    return models


def build(models: Sequence[Measured], baseline: str | None, seed: int) -> Report:
    """All estimates and, against the baseline, paired differences.

    Raises:
        ToolError: two models' items cannot be compared (other records or settings), or bear one label.
    """
    _check_labels(models)
    tasks = _common_tasks(models)
    base = _find(models, baseline) if baseline else None
    warnings = _warnings(models, base)
    rows = []
    for model in models:
        row: Report = {"label": model.label, "info": model.info, "results": {}}
        if base is not None and model is not base:
            row["differences"] = {}
        for name, items in model.items.items():
            defined = [metric(tasks[name]["kind"], m) for m in tasks[name]["metrics"]]
            row["results"][name] = {m.name: estimate(m, items, seed).as_json() for m in defined}
            if "differences" in row and base is not None and name in base.items:
                row["differences"][name] = _differences(defined, model, base, name, seed)
        rows.append(row)
    described = {
        name: {**task, "formulas": {m: metric(task["kind"], m).formula for m in task["metrics"]}}
        for name, task in tasks.items()
    }
    return {
        "schema": SCHEMA,
        "seed": seed,
        "interval": f"95 % percentile bootstrap, {RESAMPLES:,} resamples, paired for differences",
        "baseline": base.label if base else None,
        "tasks": described,
        "models": rows,
        "warnings": warnings,
    }


def _differences(
    defined: Sequence[Metric], model: Measured, base: Measured, name: str, seed: int
) -> dict[str, Any]:
    items, base_items = model.items[name], base.items[name]
    if len(items) != len(base_items):
        raise ToolError(
            f"{name}: {model.label} has {len(items)} items and {base.label} {len(base_items)}; "
            "measure both again"
        )
    return {m.name: difference(m, items, base_items, seed).as_json() for m in defined}


def _check_labels(models: Sequence[Measured]) -> None:
    labels = [m.label for m in models]
    for label in labels:
        if labels.count(label) > 1:
            raise ToolError(f"two models are called {label!r}; name them with NAME=PATH", code=ExitCode.USAGE)


def _common_tasks(models: Sequence[Measured]) -> dict[str, dict[str, Any]]:
    """Every task, once it is sure that all models that have it mean the same by it."""
    tasks: dict[str, dict[str, Any]] = {}
    first: dict[str, str] = {}
    for model in models:
        for name, task in model.exams.items():
            task = {k: task[k] for k in ("kind", "metrics", "settings")}
            known = tasks.setdefault(name, task)
            if known != task:
                keys = sorted({*known["settings"], *task["settings"]})
                what = [k for k in keys if known["settings"].get(k) != task["settings"].get(k)]
                raise ToolError(
                    f"{name}: {first[name]} and {model.label} were measured differently "
                    f"({', '.join(what) or 'metrics'}); measure them with the same options"
                )
            first.setdefault(name, model.label)
    return tasks


def _find(models: Sequence[Measured], label: str) -> Measured:
    for model in models:
        if model.label == label:
            return model
    labels = [m.label for m in models]
    raise ToolError(
        f"--baseline {label}: no such model among {', '.join(labels)}{nearest(label, labels)}",
        code=ExitCode.USAGE,
    )


def _warnings(models: Sequence[Measured], base: Measured | None) -> list[str]:
    if base is None:
        return []
    own = base.info.get("dtype")
    return [
        f"{m.label} was measured in {m.info.get('dtype')}, the baseline {base.label} in {own}: "
        "part of the difference is rounding"
        for m in models
        if m.info.get("dtype") != own
    ]


def forgetting(row: Report) -> dict[str, Any] | None:
    """Bits per byte that a model lost on the general text against the baseline, or None."""
    found: dict[str, Any] | None = row.get("differences", {}).get("general", {}).get("bits_per_byte")
    return found


def table(report: Report) -> list[dict[str, Any]]:
    """One flat row a model: info, each metric with its interval, its difference with its interval."""
    rows = []
    for model in report["models"]:
        row: dict[str, Any] = {"label": model["label"], **{k: model["info"].get(k) for k in INFO}}
        for task, described in report["tasks"].items():
            for name in described["metrics"]:
                key = f"{task}:{name}"
                row.update(_spread(key, model["results"].get(task, {}).get(name)))
                row["n" if len(report["tasks"]) == 1 else f"{task}:n"] = (
                    model["results"].get(task, {}).get(name, {}).get("n")
                )
                if report["baseline"] is not None:
                    found = model.get("differences", {}).get(task, {}).get(name)
                    row.update(_spread(f"{key}_diff", found))
        if report["baseline"] is not None and "general" in report["tasks"]:
            row.update(_spread("forgetting", forgetting(model)))
        rows.append(row)
    return rows


def _spread(key: str, estimated: dict[str, Any] | None) -> dict[str, Any]:
    found = estimated or {}
    return {key: found.get("value"), f"{key}_low": found.get("low"), f"{key}_high": found.get("high")}


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """CSV with the union of the rows' columns, in order of appearance; nothing for None."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n", restval="")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.8g}" if isinstance(v, float) else v for k, v in row.items()})
    return buffer.getvalue()


def to_markdown(report: Report) -> str:
    """The report for people: a table of each task, the differences, the settings."""
    lines = ["# Benchmark report", ""]
    for name, task in report["tasks"].items():
        rows = [m for m in report["models"] if name in m["results"]]
        lines += [f"## {name}", "", _settings(task), ""]
        against = report["baseline"]
        header = ["model", "n", *task["metrics"]]
        header += [f"{m} − {against}" for m in task["metrics"]] if against else []
        lines += ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        for row in rows:
            results = row["results"][name]
            cells = [row["label"], str(next(iter(results.values()))["n"])]
            cells += [shown(results[m]) for m in task["metrics"]]
            if against:
                found = row.get("differences", {}).get(name, {})
                cells += [shown(found.get(m), signed=True) for m in task["metrics"]]
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", *(f"- {m}: {formula}" for m, formula in task["formulas"].items()), ""]
    lines += [f"Intervals: {report['interval']}, seed {report['seed']}.", ""]
    lines += [f"Warning: {w}." for w in report["warnings"]]
    if "choice" in report:
        lines.append(f"Smallest within 1 % of {report['choice']['best']}: {report['choice']['smallest']}.")
    for axis, labels in report.get("pareto", {}).items():
        lines.append(f"Pareto-optimal in quality and {axis}: {', '.join(labels)}.")
    return "\n".join(lines).rstrip() + "\n"


def _settings(task: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in task["settings"].items() if v is not None and k != "sha256")


def shown(estimated: dict[str, Any] | None, *, signed: bool = False) -> str:
    """``1.234 [1.200, 1.270]``."""
    if estimated is None:
        return ""
    sign = "+" if signed else ""
    text = f"{estimated['value']:{sign}.4g}"
    if estimated["low"] is not None:
        text += f" [{estimated['low']:{sign}.4g}, {estimated['high']:{sign}.4g}]"
    return text


def write(folder: Path, report: Report, models: Sequence[Measured]) -> None:
    """The report's files."""
    write_json(folder / REPORT, report)
    (folder / TABLE).write_text(to_csv(table(report)), encoding="utf-8")
    (folder / TEXT).write_text(to_markdown(report), encoding="utf-8")
    with open_writer(folder / ITEMS) as writer:
        for model in models:
            for task, items in model.items.items():
                for item in items:
                    writer.write({"model": model.label, "task": task, **item})


def to_text(report: Report, runs: dict[str, dict[str, Any]]) -> str:
    """An aligned table for a terminal: a line a model, metrics with intervals, then costs."""
    header = ["model", "trainable", "bytes"]
    headlines = [(t, m) for t, task in report["tasks"].items() for m in task["metrics"][:2]]
    header += [f"{t}:{m}" for t, m in headlines]
    costs = [c for c in COST_COLUMNS if any(c in run for run in runs.values())]
    against = report["baseline"]
    if against:
        header += [f"{t}:{m} − {against}" for t, m in headlines if t != "general"]
        header += ["forgetting"] if "general" in report["tasks"] else []
    lines = [[*header, *costs]]
    for model in report["models"]:
        info, results, found = model["info"], model["results"], model.get("differences", {})
        line = [model["label"], _count(info.get("trainable_parameters")), _count(info.get("bytes"))]
        line += [shown(results.get(t, {}).get(m)) for t, m in headlines]
        if against:
            line += [shown(found.get(t, {}).get(m), signed=True) for t, m in headlines if t != "general"]
            line += [shown(forgetting(model), signed=True)] if "general" in report["tasks"] else []
        line += [_count(runs.get(model["label"], {}).get(c)) for c in costs]
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    for axis, labels in report.get("pareto", {}).items():
        text.append(f"Pareto-optimal in {report['quality']} and {axis}: {', '.join(labels)}")
    return "\n".join(text)


def _count(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
