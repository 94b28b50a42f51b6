"""What both scans write: ``report.json`` for machines, ``index.html`` for people, plots, and a comparison.

A report is a JSON object::

    {"schema": 1, "kind": "data" | "model" | "compare", "title": …, "caveat": CAVEAT, "facts": {name: value},
     "rows": [Score.as_json(), …], "tables": [{"title", "columns", "rows"}, …],
     "quotes": [{"title", "rows": [{"place", "text", "note"}, …]}, …]}

Rows are keyed by ``axis``, ``group`` and ``metric``. ``facts``, ``tables`` and ``quotes`` may be missing, and
so may ``plots``, the metrics to draw: without it all are drawn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import write_json
from tuneutils.shared.errors import ExitCode, ToolError

SCHEMA = 1
CAVEAT = (
    "A low score is no evidence of absence: it says that this formula found little in these texts with these "
    "terms, not that there is no bias."
)
Report = dict[str, Any]
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Score:
    """One number of a report.

    Attributes:
        axis: ``gender``; of a model's scores also the test set (``crows-pairs``).
        group: ``female``, ``female:male`` for a pair, empty for the axis as a whole.
        metric: short and stable; ``axis.metric`` or ``axis.group.metric`` is what a gate names.
        formula: the formula's name, with its source.
        n: what was counted, in ``unit``.
        value: None where there is none, for the reason in ``note``.
        low, high: 95 % interval; None where none can be given.
        minimum: the n below which the score is refused.
        note: why there is no value, ties, and what else the reader must know.
        extra: further numbers of the metric, such as ``{"chance": …}``.
    """

    axis: str
    group: str
    metric: str
    formula: str
    n: int
    value: float | None = None
    low: float | None = None
    high: float | None = None
    minimum: int = 0
    unit: str = "items"
    note: str = ""
    extra: Mapping[str, float | int | None] = field(default_factory=dict)

    def checked(self) -> Score:
        """The same, without a value if n is below the minimum."""
        if self.n >= self.minimum:
            return self
        note = f"refused: n={self.n} is below {self.minimum}"
        return replace(self, value=None, low=None, high=None, note=note, extra={})

    @property
    def key(self) -> Key:
        return self.axis, self.group, self.metric

    @property
    def name(self) -> str:
        return ".".join(part for part in self.key if part)

    def as_json(self) -> dict[str, Any]:
        made = {k: rounded(v) for k, v in vars(self).items()}
        return {k: v for k, v in made.items() if v not in ("", {}) or k == "group"}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Score:
        known = {k: row[k] for k in cls.__dataclass_fields__ if k in row}
        return cls(**known)


def make_report(kind: str, title: str, scores: Sequence[Score], **more: Any) -> Report:
    """A report of scores, each refused below its minimum; ``more``: facts, tables, quotes."""
    rows = [score.checked().as_json() for score in scores]
    return {"schema": SCHEMA, "kind": kind, "title": title, "caveat": CAVEAT, "rows": rows, **rounded(more)}


def scores_of(report: Report) -> list[Score]:
    return [Score.from_json(row) for row in report["rows"]]


def write_report(folder: Path, report: Report) -> None:
    """``report.json``, ``plots/*.png`` and ``index.html``, which holds all it shows."""
    from tuneutils.tools.bias_scan.page import page
    from tuneutils.tools.bias_scan.plots import draw

    write_json(folder / "report.json", report)
    plots = draw(report, folder / "plots")
    (folder / "index.html").write_text(page(report, plots), encoding="utf-8")


def read_report(path: str) -> Report:
    """A report from its folder or its ``report.json``.

    Raises:
        ToolError: it is not there (66) or no such report (65).
    """
    place = Path(path)
    file = place / "report.json" if place.is_dir() else place
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except OSError as exc:
        reason = (exc.strerror or "").lower()
        raise ToolError(f"{file}: cannot read: {reason}", code=ExitCode.MISSING_INPUT) from exc
    except ValueError as exc:
        raise ToolError(f"{file}: not JSON: {exc}") from exc
    if not isinstance(report, dict) or report.get("schema") != SCHEMA or "rows" not in report:
        raise ToolError(
            f"{file}: no report of bias-scan (schema {SCHEMA}); bias-scan data or model makes one"
        )
    return report


def rounded(value: Any) -> Any:
    """Floats to nine significant digits, within lists and objects; what is not finite becomes None."""
    if isinstance(value, Mapping):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.9g}") if value - value == 0 else None
    return value


def shown(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """``0.123 [0.1, 0.15]``; a dash without a value."""
    if value is None:
        return "—"
    return f"{value:.3g}" if low is None or high is None else f"{value:.3g} [{low:.3g}, {high:.3g}]"
