"""The quality report of a study: ``report.json`` and ``index.html``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import write_json
from tuneutils.shared.command import Run, Summary
from tuneutils.shared.records import Record
from tuneutils.tools.pref_collect import quality
from tuneutils.tools.pref_collect.params import ReportParams
from tuneutils.tools.pref_collect.votes import Votes, load_votes


def report(run: Run[ReportParams]) -> Summary:
    """Write the report of the study or votes of ``run.inputs`` to ``run.output``."""
    votes = load_votes(run)
    with run.artifact("report", votes.inputs) as art:
        found = measure(votes, run.params.resamples, run.seed)
        write_json(art.dir / "report.json", found)
        (art.dir / "index.html").write_text(page(found), encoding="utf-8")
        art.metrics, art.licence, art.source = headline(found), votes.licence, votes.source
        if votes.simulated:
            art.extra["simulated"] = True
    for name, entry in headline(found).items():
        if isinstance(entry, dict):
            run.log.info("%s %s", name, shown(entry))
    return {"output": run.output, **headline(found)}


def measure(votes: Votes, resamples: int, seed: int) -> dict[str, Any]:
    """All numbers of the report."""
    rows, mode = votes.rows, votes.mode
    first = [row for row in rows if not row["repeat"]]
    plain = [row for row in first if row.get("gold") is None]
    raters = sorted({row["rater"] for row in rows})
    found = {
        "mode": mode,
        "simulated": votes.simulated,
        "votes": len(rows),
        "items": len({row["item"] for row in rows}),
        "raters": len(raters),
        "votes_per_item": _histogram(plain),
        "choices": _choices(first, mode),
        "agreement": quality.agreement(plain, mode, resamples, seed),
        "consistency": quality.self_consistency(rows, mode, resamples, seed),
        "gold_accuracy": quality.gold_accuracy(rows, mode, resamples, seed),
        "seconds": quality.seconds(rows),
        "per_rater": [_of_rater(rows, rater, mode, resamples, seed) for rater in raters],
    }
    if mode == "compare":
        found["left_share"] = quality.left_share(first, resamples, seed)
    return found


def _choices(rows: Sequence[Record], mode: str) -> dict[str, int]:
    """How often each point of the scale was chosen, from the best of A (or the best) downwards."""
    scale = [*range(7, 0, -1)] if mode == "rate" else [*range(3, -4, -1), "both-bad"]
    found = Counter("both-bad" if row.get("both_bad") else row["value"] for row in rows)
    return {str(point): found[point] for point in scale}


def _histogram(rows: Sequence[Record]) -> dict[str, int]:
    """How many items have one vote, two votes, …"""
    per_item = Counter(row["item"] for row in rows)
    return {str(n): count for n, count in sorted(Counter(per_item.values()).items())}


def _of_rater(rows: Sequence[Record], rater: str, mode: str, resamples: int, seed: int) -> dict[str, Any]:
    own = [row for row in rows if row["rater"] == rater]
    first = [row for row in own if not row["repeat"]]
    return {
        "rater": rater,
        "simulated": any(row["simulated"] for row in own),
        "votes": len(own),
        "seconds": quality.seconds(own),
        "left_share": quality.left_share(first, resamples, seed) if mode == "compare" else None,
        "consistency": quality.self_consistency(own, mode, resamples, seed)["same_preference"],
        "gold_accuracy": quality.gold_accuracy(own, mode, resamples, seed),
    }


def headline(found: dict[str, Any]) -> dict[str, Any]:
    """The numbers that the manifest repeats."""
    out: dict[str, Any] = {name: found[name] for name in ("votes", "items", "raters")}
    for level, entry in found["agreement"]["alpha"].items():
        out[f"alpha_{level}"] = entry
    for name, entry in found["agreement"]["kappa"].items():
        out[f"kappa_{name}"] = entry
    out["left_share"] = found.get("left_share")
    out["self_consistency"] = found["consistency"]["same_preference"]
    out["gold_accuracy"] = found["gold_accuracy"]
    out["median_seconds"] = found["seconds"]["median"]
    return {name: value for name, value in out.items() if value is not None}


def shown(entry: dict[str, Any] | None) -> str:
    """``0.61 [0.52, 0.69], n 120``."""
    if entry is None:
        return "–"
    bounds = "" if entry["low"] is None else f" [{entry['low']:.2f}, {entry['high']:.2f}]"
    return f"{entry['value']:.2f}{bounds}, n {entry['n']}"


def page(found: dict[str, Any]) -> str:
    """The report as one HTML file that needs nothing beside it."""
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template("report.html").render(
        report=found, shown=shown, most=max(found["choices"].values())
    )
