"""A report as one HTML page: nothing is loaded from elsewhere, all text is escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

from tuneutils.tools.bias_scan.report import Report, Score, scores_of, shown

#: Of groups that are never named these say nothing more; report.json has them.
NOT_SHOWN_AT_ZERO = ("share", "rows")


def page(report: Report, plots: Mapping[str, Path]) -> str:
    """The page; plots are held in it."""
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    by_axis: dict[str, list[Score]] = {}
    for score in scores_of(report):
        if score.value != 0.0 or score.metric not in NOT_SHOWN_AT_ZERO:
            by_axis.setdefault(score.axis, []).append(score)
    formulas = dict.fromkeys((score.metric, score.formula) for score in scores_of(report))
    images = {
        name: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
        for name, path in plots.items()
    }
    optional = {key: report.get(key, []) for key in ("tables", "quotes")}
    return templates.get_template("report.html").render(
        report=report,
        facts=report.get("facts", {}),
        by_axis=by_axis,
        formulas=formulas,
        images=images,
        shown=shown,
        **optional,
    )
