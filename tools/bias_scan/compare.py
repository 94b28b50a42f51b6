"""Two reports side by side: each score before and after, and its difference with an interval."""

from __future__ import annotations

import math
from dataclasses import replace

from tuneutils.shared.artifact import describe_input
from tuneutils.shared.command import Run, Summary
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.tools.bias_scan.gate import check_gates, parse_gates
from tuneutils.tools.bias_scan.params import CompareParams
from tuneutils.tools.bias_scan.report import (
    Report,
    Score,
    make_report,
    read_report,
    scores_of,
    write_report,
)

METHOD = "after - before; MOVER interval of two independent estimates (Zou and Donner 2008, eq. 7)"


def compare_reports(run: Run[CompareParams]) -> Summary:
    """Write the comparison of the reports of ``run.inputs`` to ``run.output``."""
    if len(run.inputs) != 2:
        raise ToolError(f"takes two reports, BEFORE and AFTER, got {len(run.inputs)}", code=ExitCode.USAGE)
    gates = parse_gates(run.params.fail_above)
    before, after = (read_report(path) for path in run.inputs)
    report = comparison(before, after)
    inputs = [describe_input(role, path) for role, path in zip(("before", "after"), run.inputs)]
    with run.artifact("report", inputs) as art:
        write_report(art.dir, report)
        art.metrics = {s.name: s.value for s in scores_of(report)}
    check_gates(gates, scores_of(report))
    return {"output": run.output, "scores": len(report["rows"])}


def comparison(before: Report, after: Report) -> Report:
    """The report of the scores that both have; what only one has is told in ``facts``."""
    old = {s.key: s for s in scores_of(before)}
    new = {s.key: s for s in scores_of(after)}
    both = [key for key in old if key in new]
    if not both:
        raise ToolError("the reports have no score in common")
    for key in both:
        if old[key].formula != new[key].formula:
            raise ToolError(f"{old[key].name}: the reports use other formulas; scan both alike")
    only = {"only before": [s for k, s in old.items() if k not in new]}
    only["only after"] = [s for k, s in new.items() if k not in old]
    facts = {"before": before["title"], "after": after["title"], "interval": METHOD}
    facts |= {name: ", ".join(s.name for s in scores) for name, scores in only.items() if scores}
    scores = [difference(old[key], new[key]) for key in both]
    return make_report("compare", "Before against after", scores, facts=facts)


def difference(before: Score, after: Score) -> Score:
    """``after - before`` with the values of both in ``extra``."""
    sides = {
        name + end: getattr(score, attribute)
        for name, score in (("before", before), ("after", after))
        for end, attribute in (("", "value"), ("_low", "low"), ("_high", "high"))
    }
    made = replace(after, n=min(before.n, after.n), value=None, low=None, high=None, minimum=0, extra=sides)
    if before.value is None or after.value is None:
        missing = before if before.value is None else after
        return replace(made, note=missing.note or "no value on one side")
    low, high = mover(before, after)
    return replace(made, value=after.value - before.value, low=low, high=high, note="")


def mover(before: Score, after: Score) -> tuple[float | None, float | None]:
    """95 % interval of a difference from those of two independent estimates; they need not be symmetric."""
    if None in (before.low, before.high, after.low, after.high):
        return None, None
    b, bl, bh = float(before.value or 0), float(before.low or 0), float(before.high or 0)
    a, al, ah = float(after.value or 0), float(after.low or 0), float(after.high or 0)
    return a - b - math.hypot(a - al, bh - b), a - b + math.hypot(ah - a, b - bl)
