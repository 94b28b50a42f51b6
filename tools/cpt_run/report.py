"""What continual pre-training did: ``report.json``, ``report.md``, and the curve for plots."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import write_json
from tuneutils.shared.errors import GateFailed
from tuneutils.tools.cpt_run.track import Tracker, bits_change, bits_per_byte, perplexity, relative_change

Report = dict[str, Any]


def make_report(tracker: Tracker, run_facts: Mapping[str, Any], tokens_per_step: Any, seed: int) -> Report:
    """All numbers of the report.

    Args:
        run_facts: tokens, steps, shares: what was learnt.
        tokens_per_step: ``f(step)``, tokens learnt through that step.
    """
    report: Report = {"run": dict(run_facts), "texts": {}, "curve": []}
    steps = sorted(tracker.history)
    for name in tracker.texts:
        before, after = tracker.history[steps[0]][name], tracker.history[steps[-1]][name]
        report["texts"][name] = {
            "documents": len(before),
            "tokens": int(sum(item["tokens"] for item in before)),
            "bytes": int(sum(item["bytes"] for item in before)),
            "perplexity": _sides(perplexity, before, after, seed),
            "bits_per_byte": _sides(bits_per_byte, before, after, seed),
            "perplexity_change": relative_change(before, after, seed).as_json(),
            "bits_per_byte_change": bits_change(before, after, seed).as_json(),
        }
        for step in steps:
            estimate = bits_per_byte(tracker.history[step][name], seed)
            point = {"text": name, "step": step, "tokens": tokens_per_step(step)}
            point |= {"bits_per_byte": estimate.value, "low": estimate.low, "high": estimate.high}
            report["curve"].append(point)
    return report


def _sides(measure: Any, before: Any, after: Any, seed: int) -> dict[str, Any]:
    return {"before": measure(before, seed).as_json(), "after": measure(after, seed).as_json()}


def headline(report: Report) -> dict[str, Any]:
    """The numbers for the manifest."""
    made: dict[str, Any] = {}
    for name, text in report["texts"].items():
        made[f"{name}_documents"] = text["documents"]
        for side in ("before", "after"):
            made[f"{name}_perplexity_{side}"] = text["perplexity"][side]["value"]
            made[f"{name}_bits_per_byte_{side}"] = text["bits_per_byte"][side]["value"]
        change = text["perplexity_change"]
        made[f"{name}_perplexity_change"] = change["value"]
        made[f"{name}_perplexity_change_low"] = change["low"]
        made[f"{name}_perplexity_change_high"] = change["high"]
    return made


def write_report(folder: Path, report: Report) -> None:
    """``report.json``, ``report.md`` and, where texts were measured, ``plots/perplexity.csv``."""
    write_json(folder / "report.json", report)
    (folder / "report.md").write_text(as_markdown(report), encoding="utf-8")
    if report["curve"]:
        (folder / "plots").mkdir()
        with open(folder / "plots" / "perplexity.csv", "w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(report["curve"][0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(report["curve"])


def as_markdown(report: Report) -> str:
    """The report for people."""
    run = report["run"]
    lines = [
        "# Continual pre-training",
        "",
        f"{run['tokens']} tokens learnt in {run['steps']} steps: {run['passes']:.2f} passes over "
        f"{run['domain_documents']} documents of the domain, {100 * run['replay_share']:.1f} % replay.",
        "",
    ]
    if report["texts"]:
        lines += [
            "| text | documents | perplexity before | after | change (95 % interval) | bits per byte before "
            "| after |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, text in report["texts"].items():
            perplexities, bits = text["perplexity"], text["bits_per_byte"]
            lines.append(
                f"| {name} | {text['documents']} | {perplexities['before']['value']:.2f} | "
                f"{perplexities['after']['value']:.2f} | {shown_change(text['perplexity_change'])} | "
                f"{bits['before']['value']:.4f} | {bits['after']['value']:.4f} |"
            )
        lines.append("")
    return "\n".join(lines)


def shown_change(change: Mapping[str, Any]) -> str:
    """``+1.2 % (+0.4 to +2.0)``."""
    text = f"{100 * change['value']:+.1f} %"
    if change["low"] is None:
        return text
    return f"{text} ({100 * change['low']:+.1f} to {100 * change['high']:+.1f})"


def check_forgetting(limit: float | None, report: Report) -> None:
    """Raises GateFailed where perplexity on general text rose by more than ``limit``."""
    if limit is None:
        return
    change = report["texts"]["general"]["perplexity_change"]
    if change["value"] > limit:
        raise GateFailed(
            f"general perplexity {shown_change(change)}; --max-forgetting {100 * limit:g}% is exceeded "
            "(try a larger --replay-share, a lower --learning-rate or a PEFT --method)"
        )
