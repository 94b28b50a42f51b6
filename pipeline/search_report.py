"""What the learning-rate search found: each method's scale by validation, its result on the test records.

The scale is chosen on one set of records and the result read on another, so that the choice does not
flatter the result. Intervals resample items and seeds at once: every seed is scored on the same items, so
the two are crossed, and each is drawn by itself (the pigeonhole bootstrap, Owen 2007, Annals of Applied
Statistics 1:386). The deviation of the drawn seeds is stretched by sqrt(S / (S - 1)), without which a
bootstrap of S seeds has (S - 1) / S of their variance (Rao and Wu 1988).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneutils.shared.evaluate import RESAMPLES
from tuneutils.tools.lm_bench.report import shown, to_csv
from tuneutils.tools.lm_bench.tradeoff import pareto

METRIC = "bits_per_byte"
COSTS = {"trainable_parameters": "trainable parameters", "forgetting": "forgetting"}
_CHUNK_VALUES = 4_000_000

Floats = NDArray[np.float64]
Items = dict[str, dict[str, list[dict[str, Any]]]]


class SearchError(Exception):
    """The experiments cannot be compared; the message says why."""


@dataclass(frozen=True)
class Run:
    """One finished experiment.

    Attributes:
        learning_rates: by method.
        report: ``report.json`` of its trade-off.
        items: model → task → items, in the report's order.
    """

    scale: float
    seed: int
    learning_rates: Mapping[str, float]
    report: Mapping[str, Any]
    items: Items

    def value(self, label: str, task: str) -> float:
        """A model's bits per byte."""
        model = next(m for m in self.report["models"] if m["label"] == label)
        return float(model["results"][task][METRIC]["value"])


@dataclass(frozen=True)
class Choice:
    """A method's scale.

    Attributes:
        valid: scale → mean over seeds of the validation bits per byte.
        edge: the best is the smallest or the largest scale tried: a better one may lie outside.
    """

    scale: float
    valid: Mapping[float, float]
    edge: bool


def check(runs: Sequence[Run], tasks: Sequence[str]) -> None:
    """Refuse experiments that measured different things, or that lack a task or the base."""
    first = runs[0]
    if first.report.get("baseline") is None:
        raise SearchError("the reports have no baseline to compare with")
    for task in tasks:
        found = first.report["tasks"].get(task)
        if found is None or METRIC not in found["metrics"]:
            raise SearchError(
                f"no {METRIC} of {task!r} in the reports, which have {', '.join(first.report['tasks'])}; "
                "name it in bench.records"
            )
    for run in runs[1:]:
        if run.report["tasks"] != first.report["tasks"]:
            raise SearchError(f"scale {run.scale:g}, seed {run.seed}: measured on other records or settings")
        if methods(run) != methods(first):
            raise SearchError(f"scale {run.scale:g}, seed {run.seed} has other methods: {methods(run)}")


def methods(run: Run) -> list[str]:
    """The models but the base."""
    return [m["label"] for m in run.report["models"] if m["label"] != run.report["baseline"]]


def choose(runs: Sequence[Run], method: str, task: str) -> Choice:
    """The scale with the lowest mean over seeds; of equal ones the smallest."""
    by_scale: dict[float, list[float]] = {}
    for run in runs:
        by_scale.setdefault(run.scale, []).append(run.value(method, task))
    if len({len(values) for values in by_scale.values()}) > 1:
        raise SearchError(f"{method}: not every scale has the same number of seeds")
    means = {scale: float(np.mean(by_scale[scale])) for scale in sorted(by_scale)}
    best = min(means, key=lambda scale: means[scale])
    return Choice(best, means, best in (min(means), max(means)))


def sums(run: Run, label: str, task: str) -> Floats:
    """``(clusters, 2)`` negative log-likelihoods in bits, and bytes; an item without a cluster is one."""
    made: dict[Any, Floats] = {}
    for i, item in enumerate(run.items[label][task]):
        row = np.array([item["nll"] / np.log(2), item["bytes"]], dtype=np.float64)
        key = item.get("cluster", i)
        made[key] = made[key] + row if key in made else row
    return np.stack(list(made.values()))


def paired_interval(
    ours: Floats, theirs: Floats, *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """Mean over seeds of the difference of two ratios, with its 95 % interval over items and seeds.

    Args:
        ours, theirs: ``(seeds, items, 2)`` numerators and denominators; item ``i`` is the same on both
            sides and for all seeds, and row ``j`` of both belongs to the same seed.

    Returns:
        ``value, low, high``, and the value of each seed. With one seed the interval is over items alone.
    """
    if ours.shape != theirs.shape:
        raise SearchError(f"the same items are needed on both sides, there are {ours.shape}, {theirs.shape}")
    seeds, items = ours.shape[:2]
    columns = np.concatenate([ours, theirs], axis=2).transpose(1, 0, 2).reshape(items, -1)

    def differences(weights: Floats) -> Floats:
        total = (weights @ columns).reshape(len(weights), seeds, 4)
        made: Floats = total[..., 0] / total[..., 1] - total[..., 2] / total[..., 3]
        return made

    each = differences(np.ones((1, items)))[0]
    rng = np.random.default_rng(seed)
    stretch = np.sqrt(seeds / (seeds - 1)) if seeds > 1 else 1.0
    drawn = []
    step = max(1, _CHUNK_VALUES // items)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        found = differences(rng.multinomial(items, np.full(items, 1 / items), size=size).astype(np.float64))
        picks = rng.integers(0, seeds, size=(size, seeds))
        mean = found.mean(1)
        drawn.append(mean + stretch * (np.take_along_axis(found, picks, axis=1).mean(1) - mean))
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    return {"value": float(each.mean()), "low": float(low), "high": float(high), "each": each.tolist()}


def verdict(interval: Mapping[str, Any]) -> str:
    """Bits per byte are better when lower; an interval with zero in it shows nothing."""
    if interval["high"] < 0:
        return "better than the base"
    return "worse than the base" if interval["low"] > 0 else "no difference from the base shown"


def summarise(runs: Sequence[Run], valid: str, test: str, general: str | None = "general") -> dict[str, Any]:
    """The whole result, as plain data.

    Raises:
        SearchError: the runs cannot be compared.
    """
    if valid == test:
        raise SearchError(f"{valid!r} cannot both choose the scale and be the test")
    general = general if general in runs[0].report["tasks"] else None
    check(runs, [valid, test])
    names = methods(runs[0])
    choices = {name: choose(runs, name, valid) for name in names}
    chosen = {name: _at(runs, choice.scale) for name, choice in choices.items()}
    best = min(names, key=lambda name: choices[name].valid[choices[name].scale])
    base = runs[0].report["baseline"]

    def compared(name: str, task: str, other: str) -> dict[str, Any]:
        others = chosen.get(other, chosen[name])
        ours, theirs = ([sums(r, label, task) for r in side] for label, side in
                        ((name, chosen[name]), (other, others)))  # fmt: skip
        return paired_interval(np.stack(ours), np.stack(theirs))

    rows = []
    for name in names:
        choice, cells = choices[name], chosen[name]
        row: dict[str, Any] = {
            "method": name,
            "scale": choice.scale,
            "learning_rate": cells[0].learning_rates[name],
            "at_edge": int(choice.edge),
            "valid": choice.valid[choice.scale],
            "test": float(np.mean([c.value(name, test) for c in cells])),
            "difference": compared(name, test, base),
            "against_best": None if name == best else compared(name, test, best),
            "forgetting": compared(name, general, base) if general else None,
            "trainable_parameters": _info(cells[0], name).get("trainable_parameters"),
        }
        rows.append({**row, "verdict": verdict(row["difference"])})
    return {
        "metric": METRIC,
        "valid": valid,
        "test": test,
        "general": general,
        "baseline": base,
        "scales": sorted({r.scale for r in runs}),
        "seeds": sorted({r.seed for r in runs}),
        "n": {task: len(runs[0].items[base][task]) for task in filter(None, (valid, test, general))},
        "best_by_validation": best,
        "methods": rows,
        "grid": [_grid_row(r, name, valid) for name in names for r in _sorted(runs)],
        "pareto": _fronts(rows),
        "interval": f"95 % bootstrap over items and seeds, crossed and paired, {RESAMPLES:,} resamples",
    }


def _at(runs: Sequence[Run], scale: float) -> list[Run]:
    return [r for r in _sorted(runs) if r.scale == scale]


def _sorted(runs: Sequence[Run]) -> list[Run]:
    return sorted(runs, key=lambda r: (r.scale, r.seed))


def _info(run: Run, label: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(m["info"] for m in run.report["models"] if m["label"] == label)
    return found


def _grid_row(run: Run, name: str, valid: str) -> dict[str, Any]:
    return {
        "method": name,
        "scale": run.scale,
        "learning_rate": run.learning_rates[name],
        "seed": run.seed,
        "valid": run.value(name, valid),
    }


def _fronts(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    flat = [
        {
            "label": r["method"],
            "quality": r["test"],
            "trainable_parameters": r["trainable_parameters"],
            "forgetting": (r["forgetting"] or {}).get("value"),
        }
        for r in rows
    ]
    fronts = {cost: pareto(flat, cost, "lower") for cost in COSTS}
    return {cost: labels for cost, labels in fronts.items() if labels}


def table(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One flat row a method."""
    rows = []
    for row in result["methods"]:
        flat = {k: v for k, v in row.items() if not isinstance(v, dict) and v is not None}
        for key in ("difference", "against_best", "forgetting"):
            found = row[key] or {}
            flat |= {
                key: found.get("value"),
                f"{key}_low": found.get("low"),
                f"{key}_high": found.get("high"),
            }
        flat |= {f"pareto_{cost}": int(row["method"] in front) for cost, front in result["pareto"].items()}
        rows.append({**flat, "n": result["n"][result["test"]], "seeds": len(result["seeds"])})
    return rows


def markdown(result: Mapping[str, Any]) -> str:
    """The result for people."""
    scales, seeds, n = result["scales"], result["seeds"], result["n"]
    base, best = result["baseline"], result["best_by_validation"]
    grid = ", ".join(f"{s:g}" for s in scales)
    header = ["method", "learning rate", "scale", result["valid"], result["test"], f"− {base}", "",
              f"− {best}", "forgetting", "trainable"]  # fmt: skip
    on_test = f"{result['test']} (n {n[result['test']]})"
    lines = [
        "# Learning-rate search",
        "",
        f"Bits per byte, lower is better; {len(scales)} learning rates a method (its own × {grid}), "
        f"{len(seeds)} seeds ({', '.join(map(str, seeds))}). The rate is chosen by the mean on "
        f"{result['valid']} (n {n[result['valid']]}); the result is the mean on {on_test}"
        + (f", forgetting on {result['general']} (n {n[result['general']]})." if result["general"] else "."),
        "",
        "| " + " | ".join(header) + " |",
        "|---" * len(header) + "|",
    ]
    for row in result["methods"]:
        cells = [
            row["method"], f"{row['learning_rate']:g}", f"{row['scale']:g}" + " (edge)" * row["at_edge"],
            f"{row['valid']:.4f}", f"{row['test']:.4f}", shown(row["difference"], signed=True),
            row["verdict"], shown(row["against_best"], signed=True), shown(row["forgetting"], signed=True),
            str(row["trainable_parameters"]),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_remarks(result)]) + "\n"


def _remarks(result: Mapping[str, Any]) -> list[str]:
    rows, best = result["methods"], result["best_by_validation"]
    remarks = [f"Intervals: {result['interval']}; not corrected for the number of methods."]
    if len(result["seeds"]) == 1:
        remarks.append("One seed: the intervals are over items alone and say nothing of another seed.")
    edges = [r["method"] for r in rows if r["at_edge"]]
    if edges:
        remarks.append(
            f"Best at the edge of the grid, so that a better rate may lie outside: {', '.join(edges)}."
        )
    null = [r["method"] for r in rows if r["difference"]["low"] <= 0 <= r["difference"]["high"]]
    if null:
        remarks.append(f"Null result against {result['baseline']}, zero is inside: {', '.join(null)}.")
    tied = [
        r["method"] for r in rows if r["against_best"] and
        r["against_best"]["low"] <= 0 <= r["against_best"]["high"]
    ]  # fmt: skip
    if tied:
        remarks.append(f"Not told apart from {best}, the best by validation: {', '.join(tied)}.")
    for cost, labels in result["pareto"].items():
        remarks.append(f"Pareto-optimal in {result['test']} and {COSTS[cost]}: {', '.join(labels)}.")
    return [line for remark in remarks for line in (remark, "")][:-1]


def write(folder: Path, result: Mapping[str, Any]) -> None:
    """``report.json``, ``report.md``, ``table.csv``, ``grid.csv``; matplotlib: ``search.png``, ``.svg``."""
    import importlib.util
    import json

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown(result), encoding="utf-8")
    (folder / "table.csv").write_text(to_csv(table(result)), encoding="utf-8")
    (folder / "grid.csv").write_text(to_csv(result["grid"]), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is not None:
        _draw(folder, result)


def _draw(folder: Path, result: Mapping[str, Any]) -> None:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "tuneutils", "svg.fonttype": "path", "font.size": 8}):
        figure = Figure(figsize=(15.6, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        _curves(figure.add_subplot(1, 3, 1), result)
        _intervals(figure.add_subplot(1, 3, 2), result)
        _front(figure.add_subplot(1, 3, 3), result)
        figure.savefig(folder / "search.png", dpi=110, metadata={"Software": None})
        figure.savefig(folder / "search.svg", metadata={"Date": None, "Creator": None})


def _curves(axes: Any, result: Mapping[str, Any]) -> None:
    """Validation by scale, a point a seed; a ring at the chosen one."""
    for i, row in enumerate(result["methods"]):
        cells = [g for g in result["grid"] if g["method"] == row["method"]]
        means = [np.mean([g["valid"] for g in cells if g["scale"] == s]) for s in result["scales"]]
        axes.plot(result["scales"], means, color=f"C{i}", label=row["method"], linewidth=1)
        axes.plot([g["scale"] for g in cells], [g["valid"] for g in cells], ".", color=f"C{i}", markersize=3)
        axes.plot(row["scale"], row["valid"], "o", color=f"C{i}", fillstyle="none")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate over the method's own")
    axes.set_ylabel(f"{result['valid']}: bits per byte")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


def _intervals(axes: Any, result: Mapping[str, Any]) -> None:
    """The test difference of each method with its interval; a point a seed."""
    rows = result["methods"]
    for i, row in enumerate(rows):
        found = row["difference"]
        bars = [[found["value"] - found["low"]], [found["high"] - found["value"]]]
        axes.errorbar(found["value"], i, xerr=np.abs(bars), fmt="o", color=f"C{i}", capsize=2, linewidth=1)
        axes.plot(found["each"], [i] * len(found["each"]), "|", color="0.4")
    axes.axvline(0, color="0.3", linestyle=":", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [r["method"] for r in rows])
    axes.invert_yaxis()
    axes.set_xlabel(f"{result['test']}: bits per byte − {result['baseline']}, 95 % interval")
    axes.grid(alpha=0.3)


def _front(axes: Any, result: Mapping[str, Any]) -> None:
    """The test result against trainable parameters; filled where Pareto-optimal."""
    front = result["pareto"].get("trainable_parameters", [])
    for i, row in enumerate(result["methods"]):
        if row["trainable_parameters"] is None:
            continue
        filled = "full" if row["method"] in front else "none"
        axes.plot(row["trainable_parameters"], row["test"], "o", color=f"C{i}", fillstyle=filled)
        axes.annotate(
            row["method"], (row["trainable_parameters"], row["test"]), (4, 4), textcoords="offset points"
        )
    axes.set_xscale("log")
    axes.set_xlabel("trainable parameters (filled: Pareto-optimal)")
    axes.set_ylabel(f"{result['test']}: bits per byte")
    axes.grid(alpha=0.3)
