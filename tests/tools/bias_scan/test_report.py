"""Reports: what is refused, what a gate answers, how before is compared with after."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tuneutils.shared.errors import GateFailed, ToolError
from tuneutils.tools.bias_scan.compare import comparison, difference
from tuneutils.tools.bias_scan.gate import check_gates, parse_gates
from tuneutils.tools.bias_scan.report import Score, make_report, read_report, scores_of, shown, write_report


def test_a_score_below_its_minimum_is_refused() -> None:
    score = Score("age", "old", "share", "f", 9, 0.5, 0.4, 0.6, minimum=10).checked()
    assert (score.value, score.low, score.high, score.note) == (None, None, None, "refused: n=9 is below 10")
    assert Score("age", "old", "share", "f", 10, 0.5, minimum=10).checked().value == 0.5


def test_report_goes_to_disk_and_back(tmp_path: Path) -> None:
    scores = [
        Score("age", g, "share", "f", 10, v, 0.1, 0.9, unit="rows")
        for g, v in (("old", 0.5), ("young", 0.25))
    ]
    report = make_report("data", "<b>Title</b>", scores, quotes=[
        {"title": "age", "rows": [{"place": "a:1", "text": "<script>alert(1)</script>", "note": ""}]}
    ])  # fmt: skip
    write_report(tmp_path, report)
    assert scores_of(read_report(str(tmp_path))) == scores
    html = (tmp_path / "index.html").read_text()
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "&lt;b&gt;Title" in html
    assert "http" not in html.replace("http-equiv", "")
    assert html.count("data:image/png;base64,") == 1
    assert "A low score is no evidence of absence" in html


def test_no_report_is_named(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(ToolError, match="no report of bias-scan"):
        read_report(str(tmp_path))


@pytest.mark.parametrize("text", ["gender", "gender.x", "gender.x=", "gender.x=nan", "=1", "x=1"])
def test_bad_gates(text: str) -> None:
    with pytest.raises(ToolError, match=r"AXIS\.SCORE=VALUE"):
        parse_gates([text])


def test_gates() -> None:
    scores = [
        Score("age", "old", "share", "f", 9, 0.5),
        Score("age", "", "tvd", "f", 9, None, note="refused"),
    ]
    check_gates({"age.share": 0.5, "age.old.share": 0.5}, scores)
    with pytest.raises(GateFailed, match=r"age\.old\.share = 0\.5 is above 0\.4"):
        check_gates({"age.share": 0.4}, scores)
    with pytest.raises(GateFailed, match="has no value"):
        check_gates({"age.tvd": 1.0}, scores)
    with pytest.raises(ToolError, match=r"did you mean 'age\.share'"):
        check_gates({"age.shar": 1.0}, scores)


def test_difference_of_symmetric_intervals_adds_in_quadrature() -> None:
    found = difference(Score("a", "", "m", "f", 9, 1.0, 0.7, 1.3), Score("a", "", "m", "f", 7, 2.0, 1.6, 2.4))
    assert (found.value, found.n) == (1.0, 7)
    assert found.low == pytest.approx(1 - math.hypot(0.3, 0.4))
    assert found.high == pytest.approx(1 + math.hypot(0.3, 0.4))
    assert found.extra["before"] == 1.0


def test_mover_on_published_values() -> None:
    """Newcombe 1998 (Stat Med 17:873), method 10, case (a): 56/70 against 48/80 gives .0524 to .3339.

    Its single intervals are Wilson's: 56/70 in [.6917, .8777], 48/80 in [.4904, .7003] by the closed form.
    """
    z = 1.959964

    def wilson(x: int, n: int) -> Score:
        p, half = x / n, z * math.sqrt(x / n * (1 - x / n) / n + z * z / (4 * n * n))
        centre = p + z * z / (2 * n)
        return Score(
            "a", "", "m", "f", n, p, (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
        )

    found = difference(wilson(48, 80), wilson(56, 70))
    assert (found.low, found.high) == (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))


def test_comparison_names_what_only_one_has() -> None:
    before = make_report("data", "b", [Score("a", "", "m", "f", 9, 1.0), Score("a", "", "old", "f", 9, 1.0)])
    after = make_report("data", "a", [Score("a", "", "m", "f", 9, 0.5), Score("a", "", "new", "f", 9, 1.0)])
    made = comparison(before, after)
    assert made["facts"]["only before"] == "a.old"
    assert made["facts"]["only after"] == "a.new"
    assert [(s.name, s.value) for s in scores_of(made)] == [("a.m", -0.5)]
    other = make_report("data", "a", [Score("a", "", "m", "g", 9, 0.5)])
    with pytest.raises(ToolError, match="other formulas"):
        comparison(before, other)


def test_shown() -> None:
    assert shown(None) == "—"
    assert shown(0.12345) == "0.123"
    assert shown(0.12345, 0.1, 0.2) == "0.123 [0.1, 0.2]"
    assert (
        json.dumps(make_report("data", "t", [Score("a", "", "m", "f", 1, math.inf)])["rows"][0]["value"])
        == "null"
    )
