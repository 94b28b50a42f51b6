"""``bias-scan data``: a pass over the records, scores from its tallies, a report."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tuneutils.shared.artifact import Artifact, describe_input
from tuneutils.shared.command import Run, Summary
from tuneutils.shared.errors import ExitCode, ToolError, UpToDate, require
from tuneutils.shared.lexicons import Lexicon, available, load, load_file, names_lexicon
from tuneutils.shared.records import Reader
from tuneutils.tools.bias_scan.compare import comparison
from tuneutils.tools.bias_scan.gate import check_gates, parse_gates
from tuneutils.tools.bias_scan.near import MAX_WORDS, Window
from tuneutils.tools.bias_scan.params import DataParams
from tuneutils.tools.bias_scan.quotes import frequent_terms, leaning_words, worst_rows
from tuneutils.tools.bias_scan.report import (
    Report,
    make_report,
    read_report,
    scores_of,
    shown,
    write_report,
)
from tuneutils.tools.bias_scan.scan import Settings, scan
from tuneutils.tools.bias_scan.scores import Scores
from tuneutils.tools.bias_scan.stopwords import stop_words
from tuneutils.tools.bias_scan.tally import Tally
from tuneutils.tools.bias_scan.targets import parse_targets
from tuneutils.tools.bias_scan.texts import check_fields

TITLE = "Groups of people in the data"
#: Names of months: inside a sentence and with a capital they are no names either.
MONTHS = ("april", "may", "june", "august")
#: Ordinary words as well, which the list does not say of them.
WORDS = frozenset({"polish"})


def scan_data(run: Run[DataParams]) -> Summary:
    """Scan the streams of ``run.inputs`` and write the report to ``run.output``."""
    params = run.params
    gates = parse_gates(params.fail_above)
    check_fields(params.field)
    if params.sentiment:
        require("vaderSentiment", "scan")
    before = read_report(params.compare) if params.compare else None
    settings = settings_of(run)
    targets = parse_targets(params.target, settings.matcher)
    inputs = [describe_input("records", path) for path in run.inputs]
    inputs += [describe_input("lexicon", path) for path in params.lexicon]
    inputs += [describe_input("before", params.compare)] if params.compare else []
    try:
        with run.artifact("report", inputs) as art:
            tally = _scan(run, settings, art)
            report = report_of(tally, params, targets, run.seed)
            write_report(art.dir, report)
            if before is not None:
                compared = comparison(before, report)
                (art.dir / "compare").mkdir()
                write_report(art.dir / "compare", compared)
            art.metrics = {s.name: s.value for s in scores_of(report) if s.value is not None}
            art.extra["lexicons"] = [_cited(lexicon) for lexicon in settings.lexicons]
    except UpToDate:
        check_gates(gates, scores_of(read_report(str(run.output))))
        raise
    _tell(run, report, tally)
    check_gates(gates, scores_of(report))
    return {"output": run.output, "rows": tally.rows, "scores": len(art.metrics)}


def settings_of(run: Run[DataParams]) -> Settings:
    """What the scan looks for and keeps."""
    params = run.params
    window = Window(params.window, params.decay)
    lexicons = tuple(lexicons_of(params))
    # Terms that are function words count near another mention, as with GenBit; names that look so do not.
    terms = {t.text for one in lexicons for t in one.terms if "capital" not in t.flags}
    stop = stop_words(params.lang) - terms
    return Settings(lexicons, window, stop, params.field, params.sample, run.seed)


def lexicons_of(params: DataParams) -> list[Lexicon]:
    """The lexicons of the axes; names join gender and ethnicity.

    A name that is a term of another list as well (Christian, China) or a month is passed over.
    """
    axes = tuple(dict.fromkeys(params.axis))
    shipped = [axis for axis in axes if params.lang in available()[axis]]
    if not shipped:
        raise ToolError(f"--lang {params.lang}: no lexicon of {', '.join(axes)}", code=ExitCode.USAGE)
    made = [_with_words(load(axis, params.lang)) for axis in shipped]
    if params.names and params.lang == "en":
        taken = {term.text for axis in available() for term in load(axis).terms} | set(MONTHS)
        made = [
            _with_names(lexicon, taken) if lexicon.name in ("gender", "ethnicity") else lexicon
            for lexicon in made
        ]
    own = [load_file(path, params.lang) for path in params.lexicon]
    for lexicon in own:
        if sum(lexicon.name == other.name for other in (*made, *own)) > 1:
            raise ToolError(
                f"--lexicon: two lists are named {lexicon.name!r}; a file's name up to the dot is its axis",
                code=ExitCode.USAGE,
            )
    return made + own


def _with_words(lexicon: Lexicon) -> Lexicon:
    terms = tuple(replace(t, flags=t.flags | {"word"}) if t.text in WORDS else t for t in lexicon.terms)
    return replace(lexicon, terms=terms)


def _with_names(lexicon: Lexicon, taken: set[str]) -> Lexicon:
    names = names_lexicon(lexicon.name)
    known = {term.text for term in lexicon.terms}
    terms = [
        replace(term, flags=term.flags | {"place"}) if term.text in taken else term
        for term in names.terms
        if term.text not in known
    ]
    licence, source = f"{lexicon.licence} AND {names.licence}", f"{lexicon.source}; names: {names.source}"
    return Lexicon(lexicon.name, lexicon.language, (*lexicon.terms, *terms), licence, source)


def _scan(run: Run[DataParams], settings: Settings, art: Artifact) -> Tally:
    quarantine = art.work / "quarantine.jsonl" if run.on_error == "quarantine" else None
    reader = Reader(run.inputs, on_error=run.on_error, quarantine=quarantine)
    with run.progress(None, "scan", "rows") as progress:
        if run.params.ray:
            from tuneutils.tools.bias_scan.ray_scan import ray_scan

            tally = ray_scan(reader, settings, run.params.ray)
        else:
            tally = scan(reader, settings, run.params.workers, progress)
    if not tally.rows:
        refused = f" ({reader.stats.refused} refused)" if reader.stats.refused else ""
        raise ToolError(
            f"{', '.join('<stdin>' if p == '-' else p for p in reader.paths)}: no records{refused}"
        )
    if reader.stats.refused:
        run.log.warning("%d bad records left out", reader.stats.refused)
    return tally


def report_of(tally: Tally, params: DataParams, targets: dict[int, Any], seed: int) -> Report:
    """The report of a finished scan."""
    found = Scores(tally, targets, params.min_mentions, seed)
    scores = found.all()
    if params.sentiment:
        from tuneutils.tools.bias_scan.affect import sentiment

        scores += sentiment(tally)
    return make_report(
        "data",
        TITLE,
        scores,
        plots=["share", "genbit", "sentiment"],
        facts=_facts(tally, found),
        tables=[frequent_terms(tally), *leaning_words(found, params.words)],
        quotes=worst_rows(found, tally, params.quotes),
    )


def _facts(tally: Tally, found: Scores) -> dict[str, Any]:
    matcher = tally.matcher
    facts: dict[str, Any] = {
        "rows": tally.rows,
        "rows that name a group": tally.with_mention,
        "words": tally.tokens,
        "terms looked for": len(matcher.terms),
        "chance": "what the score would be on average if words, or mentions, fell to the groups at random",
    }
    passed = [f"{axis} {n}" for axis, n in zip(matcher.axes, tally.ambiguous.tolist()) if n]
    if passed:
        facts["ambiguous, passed over"] = ", ".join(passed)
    if matcher.clashes:
        facts["terms of several groups, the first counts"] = "; ".join(matcher.clashes[:20])
    pruned = sum(near.pruned for near in tally.near)
    if pruned:
        facts["rare words forgotten"] = (
            f"{pruned}, each with a count up to {max(n.pruned_below for n in tally.near):.1f}: more than "
            f"{MAX_WORDS} different words a shard; association is of the {len(found.words)} kept"
        )
    return facts


def _cited(lexicon: Lexicon) -> dict[str, str]:
    return {"axis": lexicon.name, "licence": lexicon.licence, "source": lexicon.source}


def _tell(run: Run[DataParams], report: Report, tally: Tally) -> None:
    run.log.info("%d rows, %d name a group", tally.rows, tally.with_mention)
    for score in scores_of(report):
        if score.value is not None and score.metric in ("representation", "genbit"):
            value = shown(score.value, score.low, score.high)
            chance = score.extra.get("chance")
            beside = f", by chance {chance:.3g}" if isinstance(chance, float) else ""
            run.log.info("%s %s%s, n=%d", score.name, value, beside, score.n)
    run.log.info("%s", report["caveat"])
