"""Plots whose bytes depend on the numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from tuneutils.tools.model_card.facts import Facts

STYLE = {
    "figure.dpi": 110,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
#: matplotlib writes its version into a PNG unless told otherwise.
METADATA = {"Software": None}


def draw(facts: Facts, log: Sequence[dict[str, Any]], folder: Path) -> dict[str, str]:
    """Draw what there is to draw; plot's name → path relative to the card."""
    made = {}
    with plt.rc_context(STYLE):
        if any("loss" in e or "eval_loss" in e for e in log):
            folder.mkdir(exist_ok=True)
            training_curve(log, folder / "training.png")
            made["training"] = f"{folder.name}/training.png"
        estimates = [e for _, _, report in facts.reports for e in _estimates(report)]
        if estimates:
            folder.mkdir(exist_ok=True)
            intervals(estimates, folder / "results.png")
            made["results"] = f"{folder.name}/results.png"
    return made


def training_curve(log: Sequence[dict[str, Any]], path: Path) -> None:
    """Training and held-out loss over steps, learning rate below."""
    rates = [(e["step"], e["learning_rate"]) for e in log if "learning_rate" in e]
    figure, axes = plt.subplots(
        2 if rates else 1, 1, figsize=(6, 4), sharex=True, squeeze=False,
        height_ratios=[3, 1] if rates else [1], layout="constrained",
    )  # fmt: skip
    for key, label, marker in (("loss", "training loss", "."), ("eval_loss", "held-out loss", "o")):
        points = [(e["step"], e[key]) for e in log if e.get(key) is not None]
        if points:
            axes[0, 0].plot(*zip(*points), marker=marker, label=label)
    axes[0, 0].set_ylabel("loss (nats a token)")
    axes[0, 0].legend()
    if rates:
        axes[1, 0].plot(*zip(*rates), color="grey")
        axes[1, 0].set_ylabel("learning rate")
    axes[-1, 0].set_xlabel("step")
    _save(figure, path)


def _estimates(report: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(task and metric, model, estimate) in the report's order."""
    return [
        (f"{task}\n{metric}", str(model["label"]), found)
        for model in report["models"]
        for task, metrics in model["results"].items()
        for metric, found in metrics.items()
    ]


def intervals(estimates: Sequence[tuple[str, str, dict[str, Any]]], path: Path) -> None:
    """One panel a metric: each model's value with its interval."""
    panels = list(dict.fromkeys(name for name, _, _ in estimates))
    models = list(dict.fromkeys(model for _, model, _ in estimates))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    shape = (3.2 * columns, (0.9 + 0.3 * len(models)) * rows)
    figure, axes = plt.subplots(rows, columns, figsize=shape, squeeze=False, layout="constrained")
    for axis, panel in zip(axes.flat, panels):
        for name, model, found in estimates:
            if name == panel:
                value = found["value"]
                low, high = found.get("low", value), found.get("high", value)
                error = [[max(0.0, value - low)], [max(0.0, high - value)]]
                axis.errorbar([value], [models.index(model)], xerr=error, fmt="o", capsize=3, color="C0")
        axis.set_title(panel, fontsize=8)
        axis.set_yticks(range(len(models)), models)
        axis.set_ylim(len(models) - 0.5, -0.5)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata=METADATA)
    plt.close(figure)
