"""``bias-scan data``: a pass over the records, scores from its tallies, a report."""

from __future__ import annotations

import numpy as np

from tuneutils.shared.artifact import describe_input
from tuneutils.shared.command import Run, Summary
from tuneutils.shared.lexicons import Lexicon, load, load_file, names_lexicon
from tuneutils.shared.records import Reader
from tuneutils.tools.bias_scan.counts import Window
from tuneutils.tools.bias_scan.gate import check_gates, parse_gates
from tuneutils.tools.bias_scan.params import DataParams
from tuneutils.tools.bias_scan.report import Score, make_report, scores_of, write_report
from tuneutils.tools.bias_scan.scan import Settings, Tally, scan
from tuneutils.tools.bias_scan.texts import check_fields

TVD = "total variation from uniform: 1/2 sum |1/G - p_g|, p_g the group's share of mentions"


def scan_data(run: Run[DataParams]) -> Summary:
    """Scan the streams of ``run.inputs`` and write the report to ``run.output``."""
    params = run.params
    gates = parse_gates(params.fail_above)
    check_fields(params.field)
    lexicons = lexicons_of(params)
    quarantine = None
    inputs = [describe_input("records", path) for path in run.inputs]
    inputs += [describe_input("lexicon", path) for path in params.lexicon]
    with run.artifact("report", inputs) as art:
        if run.on_error == "quarantine":
            quarantine = art.work / "quarantine.jsonl"
        reader = Reader(run.inputs, on_error=run.on_error, quarantine=quarantine)
        settings = Settings(
            tuple(lexicons), Window(params.window, params.decay), params.field, params.sample, run.seed
        )
        with run.progress(None, "scan", "rows") as progress:
            tally = scan(reader, settings, params.workers, progress)
        report = make_report(
            "data", "Groups of people in the data", scores(tally), facts={"rows": tally.counts.rows}
        )
        write_report(art.dir, report)
        art.metrics = {s.name: s.value for s in scores_of(report)}
    check_gates(gates, scores_of(report))
    return {"output": run.output, "rows": tally.counts.rows}


def lexicons_of(params: DataParams) -> list[Lexicon]:
    """The lexicons of the axes; names join gender and ethnicity."""
    made = []
    for axis in params.axis if params.lang == "en" else ("gender",):
        lexicon = load(axis, params.lang)
        if params.names and params.lang == "en" and axis in ("gender", "ethnicity"):
            names = names_lexicon(axis)
            lexicon = Lexicon(axis, "en", lexicon.terms + names.terms, lexicon.licence, lexicon.source)
        made.append(lexicon)
    return made + [load_file(path, params.lang) for path in params.lexicon]


def scores(tally: Tally) -> list[Score]:
    """All scores of a scan."""
    made = []
    for axis, name in enumerate(tally.matcher.axes):
        counts = tally.counts.mentions.sum(axis=0)[tally.matcher.group_axis == axis]
        shares = counts / max(1, counts.sum())
        value = float(np.abs(1 / len(shares) - shares).sum() / 2) if counts.sum() else None
        made.append(Score(name, "", "representation", TVD, int(counts.sum()), value, unit="mentions"))
    return made
