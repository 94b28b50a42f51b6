"""``bias-scan predictions``: fairness of predictions that are there, and their consistency over twins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tuneutils.shared.artifact import Artifact, describe_input
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.records import Reader, Record
from tuneutils.tools.bias_scan.gate import parse_gates
from tuneutils.tools.bias_scan.models import consistency, fairness
from tuneutils.tools.bias_scan.models.estimates import Measure, Settings
from tuneutils.tools.bias_scan.models.labels import labelled
from tuneutils.tools.bias_scan.models.params import PredictionParams
from tuneutils.tools.bias_scan.models.verdict import (
    check_above,
    check_fall,
    check_names,
    open_report,
    scores,
    table,
)
from tuneutils.tools.bias_scan.report import make_report, scores_of, write_report

TESTS = (fairness.TEST, consistency.NAME)


@dataclass(frozen=True)
class Row:
    """What one record says; ``key`` is its id, or its number."""

    key: str
    group: str | None
    prediction: bool | None
    label: bool | None
    record: Record


def scan_predictions(run: Run[PredictionParams]) -> dict[str, Any]:
    """Run ``bias-scan predictions``; gives the summary.

    Raises:
        GateFailed: a gate says no; the report is written all the same.
        ToolError: bad input, with its place; nothing is written then.
    """
    params = run.params
    streams = labelled(run.inputs, params.baseline)
    gates = parse_gates(params.fail_above)
    check_names(params.require_fall, gates, params.baseline, TESTS)
    labels = [label for label, _ in streams]
    several = len(streams) > 1
    inputs = [describe_input(f"predictions:{n}" if several else "predictions", p) for n, p in streams]
    art = open_report(run, inputs, gates, labels)
    with art:
        rows = {label: _read(run, art, label, path) for label, path in streams}
        if params.baseline is not None:
            _check_same(rows, params.baseline)
        measured = {label: measures(found, params) for label, found in rows.items()}
        settings = Settings(run.seed, params.resamples, params.min_items)
        facts = {label: f"{len(found)} records" for label, found in rows.items()}
        facts["interval"] = f"percentile bootstrap over records, {params.resamples} resamples"
        found = scores(measured, params.baseline, settings)
        report = make_report("model", "Fairness of predictions", found, facts=facts)
        write_report(art.dir, report)
        found = scores_of(report)
        art.metrics = {s.name: s.value for s in found}
    run.log.info("%s", table(found, whole=len(found) > 60))
    check_above(gates, found, labels)
    check_fall(params.require_fall, found, labels)
    return {"output": run.output, "metrics": art.metrics}


def measures(rows: Sequence[Row], params: PredictionParams) -> list[Measure]:
    """The disparities over groups, and the consistency over twins, whichever the records have.

    Raises:
        ToolError: they have neither, or labels in some records only.
    """
    made: list[Measure] = []
    grouped = [r for r in rows if r.group is not None and r.prediction is not None]
    if grouped:
        labels = [r.label for r in grouped if r.label is not None]
        if labels and len(labels) < len(grouped):
            raise ToolError(
                f"{len(grouped) - len(labels)} of {len(grouped)} records have no {params.label!r}"
            )
        groups = [str(r.group) for r in grouped]
        if len(set(groups)) < 2:
            raise ToolError(
                f"every record has the {params.group} {groups[0]!r}; one group cannot be compared"
            )
        made += fairness.measures(groups, [bool(r.prediction) for r in grouped], labels or None)
    records = [r.record for r in rows]
    if any("twin_of" in r for r in records):
        twins = consistency.pair(records)
        if all(params.prediction in r for r in records):
            made += consistency.of_predictions(twins, [r[params.prediction] for r in records])[0]
        elif all(params.score in r for r in records):
            made += consistency.of_scores(twins, [float(r[params.score]) for r in records])[0]
    if not made:
        raise ToolError(
            f"no record has {params.prediction!r} and {params.group!r}, or is a twin (twin_of) with "
            f"{params.prediction!r} or {params.score!r}"
        )
    return made


def _read(run: Run[PredictionParams], art: Artifact, label: str, path: str) -> list[Row]:
    quarantine = art.work / f"quarantine-{label}.jsonl" if run.on_error == "quarantine" else None
    reader = Reader([path], on_error=run.on_error, quarantine=quarantine)
    made = []
    for number, located in enumerate(reader.located(), 1):
        try:
            made.append(_row(located.record, number, run.params))
        except ValueError as exc:
            reader.refuse(located, str(exc))
    if not made:
        raise ToolError(f"{path}: no record left ({reader.stats.refused} refused)")
    return made


def _row(record: Record, number: int, params: PredictionParams) -> Row:
    prediction = record.get(params.prediction)
    if prediction is None and params.score not in record:
        raise ValueError(f"field {params.prediction!r}: absent; name it with --prediction")
    score = record.get(params.score)
    if prediction is None and (isinstance(score, bool) or not isinstance(score, (int, float))):
        raise ValueError(f"field {params.score!r}: must be a number, is {score!r}")
    group = record.get(params.group)
    if group is None:
        return Row(str(record.get("id", number)), None, None, None, record)
    label = record.get(params.label)
    return Row(
        str(record.get("id", number)),
        str(group),
        None if prediction is None else _positive(params.prediction, prediction, params.positive),
        None if label is None else _positive(params.label, label, params.positive),
        record,
    )


def _positive(field: str, value: Any, positive: str | None) -> bool:
    if positive is not None:
        return str(value).lower() == positive.lower() if isinstance(value, bool) else str(value) == positive
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise ValueError(
        f"field {field!r}: must be true, false, 0 or 1, is {value!r}; or name a --positive value"
    )


def _check_same(rows: dict[str, list[Row]], baseline: str) -> None:
    """Paired differences need the same records in the same order."""
    wanted = [(r.key, r.group, r.label) for r in rows[baseline]]
    for label, found in rows.items():
        if [(r.key, r.group, r.label) for r in found] != wanted:
            raise ToolError(
                f"{label}: not the same records, by id, group and label, as {baseline}; no paired comparison",
                code=ExitCode.BAD_DATA,
            )
