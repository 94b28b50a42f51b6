"""``report.json``, ``report.md`` and the plots of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import write_json
from tuneutils.shared.command import Run
from tuneutils.tools.guard.measures import shown


def write_report(run: Run[Any], folder: Path, report: Mapping[str, Any]) -> None:
    """Write all files; without matplotlib the picture is left out with a warning."""
    write_json(folder / "report.json", dict(report))
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    plots = folder / "plots"
    plots.mkdir()
    write_json(plots / "reliability.json", report["reliability"])
    write_json(plots / "by_category.json", [_flat(row) for row in report["by_category"]])
    write_json(plots / "frontier.json", [_flat(row) for row in report["frontier"]])
    try:
        import matplotlib  # noqa: F401 - is it there?
    except ModuleNotFoundError:
        run.log.warning("no picture: matplotlib is not installed (pip install 'tuneutils[plots]')")
        return
    from tuneutils.tools.guard.plots import draw

    draw(report, folder / "report.png")


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Shares as columns: ``recall``, ``recall_low``, ``recall_high``, ``recall_n``."""
    made: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            made |= {name: value["value"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
            made[f"{name}_n"] = value["n"]
        else:
            made[name] = value
    return made


def markdown(report: Mapping[str, Any]) -> str:
    """The report that a person reads."""
    threshold, layers = report["threshold"], report["layers"]
    lines = [
        "# What the guard catches",
        "",
        f"Budget: {report['budget']:.1%} of harmless exchanges. The threshold is the {threshold['rank']}-th "
        f"smallest of {threshold['n']} harmless scores: {threshold['expected']:.1%} of new ones are expected "
        f"above it, with 95 % confidence at most {threshold['upper95']:.1%}. Measured on {report['groups']} "
        "templates or prompts that the guard has not learnt from. Intervals are exact (Clopper-Pearson, "
        "95 %) and take exchanges as independent; "
        "those of one template are not quite.",
        "",
        "| measure | value |",
        "|---|---|",
        f"| recall: failures flagged | {shown(report['recall'])} |",
        f"| over-refusal: harmless requests flagged | {shown(report['false_positives'])} |",
        f"| bad requests that the model handled itself, flagged | {shown(report['handled_flagged'])} |",
        f"| recall of the first layer alone, same budget | {shown(layers['probe_alone_failure'])} |",
        f"| its over-refusal | {shown(layers['probe_alone_harmless'])} |",
        f"| harmless exchanges that reach the second layer | {shown(layers['raised_harmless'])} |",
        f"| failures that reach it | {shown(layers['raised_failure'])} |",
        f"| area under the ROC curve | {_number(report['auc'])} |",
        f"| calibration error of the score (ECE) | {_number(report['ece'])} |",
        *(f"| flagged failures stopped {k} | {shown(v)} |" for k, v in report["stopped_at"].items()),
        "",
        "## By category",
        "",
        "| category | recall | over-refusal | handled, flagged | named rightly |",
        "|---|---|---|---|---|",
    ]
    for row in report["by_category"]:
        cells = [shown(row[k]) for k in ("recall", "false_positives", "handled_flagged", "named")]
        lines.append(f"| {row['category']} | " + " | ".join(cells) + " |")
    lines += ["", "## What gets through", "", *_quotes(report["got_through"])]
    lines += ["", "## False alarms", "", *_quotes(report["false_alarms"])]
    return "\n".join(lines) + "\n"


def _quotes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return ["Nothing."]
    lines = ["| category | score | prompt | reply |", "|---|---|---|---|"]
    for row in rows:
        texts = [_cell(row[k]) for k in ("prompt", "reply")]
        lines.append(f"| {row['category']} | {row['score']:.3f} | " + " | ".join(texts) + " |")
    return lines


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
