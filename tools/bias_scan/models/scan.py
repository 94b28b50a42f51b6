"""``bias-scan model``: test sets through models, scores with intervals, paired differences, a report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from tuneutils.shared.artifact import Artifact, Input, describe_input
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ExitCode, ToolError, nearest
from tuneutils.shared.models import model_input
from tuneutils.shared.records import Located, Reader, open_writer
from tuneutils.shared.streams import Record
from tuneutils.tools.bias_scan.gate import parse_gates
from tuneutils.tools.bias_scan.models import load as loading
from tuneutils.tools.bias_scan.models.estimates import Measure, Settings
from tuneutils.tools.bias_scan.models.labels import labelled
from tuneutils.tools.bias_scan.models.params import TESTS, ModelParams
from tuneutils.tools.bias_scan.models.verdict import (
    check_above,
    check_fall,
    check_names,
    open_report,
    scores,
    table,
)
from tuneutils.tools.bias_scan.report import make_report, scores_of, write_report

BUILTIN = "builtin"
ITEMS = "items.jsonl.gz"
#: Which kinds of model a test can be put to.
KINDS = dict.fromkeys(TESTS, loading.LANGUAGE)
KINDS |= {"weat": (*loading.LANGUAGE, "vectors"), "consistency": (*loading.LANGUAGE, "classifier", "reward")}
Measured = tuple[list[Measure], list[Record]]


@dataclass(frozen=True)
class TestSet:
    """A test and its items, in the form that the test works on."""

    __test__ = False
    test: str
    path: str
    items: list[Any]


def scan_models(run: Run[ModelParams]) -> dict[str, Any]:
    """Run ``bias-scan model``; gives the summary.

    Raises:
        GateFailed: a gate says no; the report is written all the same.
        ToolError: bad input, with its place; nothing is written then.
    """
    params = run.params
    models = labelled(run.inputs, params.baseline)
    asked = _asked(params.set)
    gates = parse_gates(params.fail_above)
    check_names(params.require_fall, gates, params.baseline, list(asked))
    kinds = [_kind(run, path, list(asked)) for _, path in models]
    labels = [label for label, _ in models]
    inputs = [_model_input(model, kind, len(models) > 1) for model, kind in zip(models, kinds, strict=True)]
    inputs += [describe_input(test, path) for test, path in asked.items() if path != BUILTIN]
    art = open_report(run, inputs, gates, labels)
    with art:
        sets = [_read(run, art, test, path) for test, path in asked.items()]
        measured, items = _measure(run, models, kinds, sets)
        settings = Settings(run.seed, params.resamples, params.min_items)
        found = scores(measured, params.baseline, settings)
        report = make_report("model", _title(models), found, facts=_facts(run, sets))
        write_report(art.dir, report)
        with open_writer(art.dir / ITEMS) as writer:
            for item in items:
                writer.write(item)
        found = scores_of(report)
        art.metrics = {s.name: s.value for s in found}
    run.log.info("%s", table(found, whole=len(found) > 60))
    check_above(gates, found, labels)
    check_fall(params.require_fall, found, labels)
    return {"output": run.output, "metrics": art.metrics}


def _asked(given: Sequence[str]) -> dict[str, str]:
    """``{"crows-pairs": path}`` of ``--set``."""
    made: dict[str, str] = {}
    for text in given:
        test, equals, path = text.partition("=")
        if test not in TESTS or not equals or not path:
            raise ToolError(
                f"--set {text}: write TEST=RECORDS with a test of {', '.join(TESTS)}{nearest(test, TESTS)}",
                code=ExitCode.USAGE,
            )
        if path == BUILTIN and test not in ("weat", "seat"):
            raise ToolError(
                f"--set {text}: only weat and seat are built in; bring it in with data-import builtin:{test}",
                code=ExitCode.USAGE,
            )
        if test in made:
            raise ToolError(f"--set {text}: {test} is given twice", code=ExitCode.USAGE)
        made[test] = path
    return made


def _kind(run: Run[ModelParams], path: str, tests: Sequence[str]) -> str:
    kind = loading.kind_of(path, trust_remote_code=run.params.trust_remote_code)
    for test in tests:
        if kind not in KINDS[test]:
            raise ToolError(
                f"{path}: is {kind}; {test} is put to {', '.join(KINDS[test])} models", code=ExitCode.USAGE
            )
    return kind


def _model_input(model: tuple[str, str], kind: str, several: bool) -> Input:
    """Labels are in the report, so another label is another input."""
    label, path = model
    role = f"model:{label}" if several else "model"
    return describe_input(role, path) if kind == "vectors" else model_input(path, role)


def _read(run: Run[ModelParams], art: Artifact, test: str, path: str) -> TestSet:
    """The records of a set as items, bad ones refused by ``--on-error``."""
    if path == BUILTIN:
        from tuneutils.tools.bias_scan.models import embeddings

        text = (files("tuneutils.tools.bias_scan") / "data" / "weat.jsonl").read_text(encoding="utf-8")
        return TestSet(test, path, [embeddings.parse(json.loads(line)) for line in text.splitlines()])
    quarantine = art.work / f"quarantine-{test}.jsonl" if run.on_error == "quarantine" else None
    parse = _parser(test)
    reader = Reader([path], on_error=run.on_error, quarantine=quarantine)
    parsed: list[tuple[Located, list[Any]]] = []
    empty = 0
    for located in reader.located():
        try:
            if items := parse(located.record):
                parsed.append((located, items))
            else:
                empty += 1
        except ValueError as exc:
            reader.refuse(located, str(exc))
    if not parsed:
        raise ToolError(f"{path}: no record of {test} left ({reader.stats.refused} refused)")
    if reader.stats.refused:
        run.log.warning("%s: %d records refused", path, reader.stats.refused)
    if empty:
        run.log.info("%s: %d without an item of %s", path, empty, test)
    kept = _sample([_source(located, test) for located, _ in parsed], run.params.sample, run.seed)
    return TestSet(test, path, [item for i in kept for item in parsed[i][1]])


def _source(located: Located, test: str) -> str:
    """What is sampled as one: a record, or a source with its twins."""
    record = located.record
    return str(record.get("twin_of", record.get("id"))) if test == "consistency" else located.place


def _sample(keys: Sequence[str], wanted: int | None, seed: int) -> list[int]:
    """Positions of the records of ``wanted`` keys drawn at random; all without a number."""
    distinct = list(dict.fromkeys(keys))
    if wanted is None or wanted >= len(distinct):
        return list(range(len(keys)))
    drawn = np.random.default_rng(seed).choice(len(distinct), wanted, replace=False)
    chosen = {distinct[i] for i in drawn}
    return [i for i, key in enumerate(keys) if key in chosen]


def _parser(test: str) -> Callable[[Record], list[Any]]:
    """A record → its items."""
    from tuneutils.tools.bias_scan.models import bbq, crows_pairs, embeddings, likelihood, pronouns, stereoset

    if test == "winobias":
        return pronouns.parse_winobias
    if test == "winogender":
        return pronouns.parse_winogender
    if test == "consistency":
        from tuneutils.tools.bias_scan.models import consistency

        return consistency.parse
    one: dict[str, Callable[[Record], Any]] = {
        "crows-pairs": crows_pairs.parse,
        "stereoset": stereoset.parse,
        "bbq": bbq.parse,
        "weat": embeddings.parse,
        "seat": embeddings.parse,
        "likelihood": likelihood.parse,
    }
    return lambda record: [one[test](record)]


def put(test: str, model: Any, items: Sequence[Any], seed: int) -> Measured:
    """Put one test to one loaded model."""
    from tuneutils.tools.bias_scan.models import (
        bbq,
        consistency,
        crows_pairs,
        embeddings,
        likelihood,
        pronouns,
        stereoset,
    )

    if test in ("weat", "seat"):
        return embeddings.measure(test, model, items, seed)
    if test in ("winobias", "winogender"):
        return pronouns.measure(test, model, items)
    modules: dict[str, Any] = {"crows-pairs": crows_pairs, "stereoset": stereoset, "bbq": bbq}
    modules |= {"likelihood": likelihood, "consistency": consistency}
    made: Measured = modules[test].measure(model, items)
    return made


def _measure(
    run: Run[ModelParams], models: Sequence[tuple[str, str]], kinds: Sequence[str], sets: Sequence[TestSet]
) -> tuple[dict[str, list[Measure]], list[Record]]:
    """One model after another, so that one alone is in memory."""
    measured: dict[str, list[Measure]] = {}
    items: list[Record] = []
    with run.progress(len(models) * len(sets), "tests", "tests") as bar:
        for (label, path), kind in zip(models, kinds, strict=True):
            model = loading.load(
                path,
                kind,
                device=run.device,
                dtype=run.dtype,
                batch_tokens=run.params.batch_tokens,
                trust_remote_code=run.params.trust_remote_code,
            )
            measured[label] = []
            for one in sets:
                try:
                    found, rows = put(one.test, model, one.items, run.seed)
                except (ValueError, ToolError) as exc:
                    raise ToolError(f"{one.test} on {label}: {exc}") from exc
                measured[label] += found
                items += [
                    {"model": label, "test": one.test, "item": i, **_finite(r)} for i, r in enumerate(rows)
                ]
                bar.update()
            del model
    return measured, items


def _finite(row: Record) -> Record:
    """Scores to nine digits, as in the report."""
    return {k: _rounded(v) for k, v in row.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return value


def _title(models: Sequence[tuple[str, str]]) -> str:
    return f"Bias of {', '.join(label for label, _ in models)}"


def _facts(run: Run[ModelParams], sets: Sequence[TestSet]) -> dict[str, Any]:
    """What the page says first."""
    facts: dict[str, Any] = {s.test: f"{len(s.items)} items of {s.path}" for s in sets}
    if run.params.sample is not None:
        facts["sample"] = f"at most {run.params.sample} records of each set, seed {run.seed}"
    if run.params.baseline is not None:
        facts["baseline"] = run.params.baseline
    facts["interval"] = (
        f"percentile bootstrap over units, {run.params.resamples} resamples; differences paired"
    )
    facts["contamination"] = "not looked for here; bias-scan leaks TRAIN --against SET does"
    return facts
