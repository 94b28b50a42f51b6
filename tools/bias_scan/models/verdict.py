"""Scores of several models → the rows of one report, and the gates upon them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tuneutils.shared.artifact import Artifact, Input
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ExitCode, GateFailed, ToolError, UpToDate, nearest
from tuneutils.tools.bias_scan.models.estimates import Measure, Settings, differences, estimate
from tuneutils.tools.bias_scan.report import CAVEAT, Score, read_report, scores_of, shown

#: The ending of a metric that says by how much bias changed.
CHANGE = "-bias-change"


def scores(
    measured: Mapping[str, Sequence[Measure]], baseline: str | None, settings: Settings
) -> list[Score]:
    """Every score of every model, then paired differences from the baseline.

    Args:
        measured: label of a model → its measures. With one model alone its label is left out of the groups.
    """
    alone = len(measured) == 1
    made = [estimate(m, settings, "" if alone else label) for label, ms in measured.items() for m in ms]
    if baseline is None:
        return made
    base = {m.key: m for m in measured[baseline]}
    for label, ms in measured.items():
        if label == baseline:
            continue
        for m in ms:
            if m.key in base and m.formula == base[m.key].formula:
                made += differences(m, base[m.key], settings, label, baseline)
    return made


def open_report(
    run: Run[Any], inputs: Sequence[Input], limits: Mapping[str, float], labels: Sequence[str]
) -> Artifact:
    """The report to be written. One that is up to date still has its gates asked.

    Raises:
        UpToDate: it is there and passes.
        GateFailed: it is there and does not.
    """
    try:
        return run.artifact("report", inputs)
    except UpToDate:
        found = scores_of(read_report(str(run.output)))
        check_above(limits, found, labels)
        check_fall(run.params.require_fall, found, labels)
        raise


def check_names(
    required: Sequence[str], limits: Mapping[str, float], baseline: str | None, tests: Sequence[str]
) -> None:
    """Before any work: gates name tests that are measured, and ``--require-fall`` needs a baseline.

    Raises:
        ToolError: exit 2.
    """
    if required and baseline is None:
        raise ToolError(
            f"--require-fall {required[0]}: needs --baseline, from which to fall", code=ExitCode.USAGE
        )
    given = [("--require-fall", name) for name in required] + [("--fail-above", name) for name in limits]
    for flag, name in given:
        test, dot, _ = name.partition(".")
        if not dot or test not in tests:
            raise ToolError(
                f"{flag} {name}: must be TEST.SCORE of {', '.join(tests)}{nearest(test, tests)}",
                code=ExitCode.USAGE,
            )


def check_fall(required: Sequence[str], found: Sequence[Score], labels: Sequence[str]) -> None:
    """Fail unless the bias of every model fell from the baseline's, with an interval that excludes zero.

    ``TEST.SCORE`` names the score over the whole set, ``TEST.GROUP.SCORE`` that of one part.

    Raises:
        ToolError: no score has that name (2).
        GateFailed: which did not fall (1).
    """
    names = _by_name([s for s in found if s.metric.endswith(CHANGE)], labels)
    failures = []
    for name in required:
        for score in _named(f"--require-fall {name}", f"{name}{CHANGE}", names):
            if score.high is None or not score.high < 0.0:
                why = score.note if score.value is None else shown(score.value, score.low, score.high)
                failures.append(f"{score.name}: {why}, not below zero")
    _fail(failures)


def check_above(limits: Mapping[str, float], found: Sequence[Score], labels: Sequence[str]) -> None:
    """Fail when a named score of any model is above its limit, or has no value. Names as in ``check_fall``.

    Raises:
        ToolError: no score has that name (2).
        GateFailed: which are above (1).
    """
    names = _by_name(found, labels)
    failures = []
    for name, limit in limits.items():
        for score in _named(f"--fail-above {name}", name, names):
            if score.value is None:
                failures.append(f"{score.name} has no value ({score.note})")
            elif score.value > limit:
                failures.append(f"{score.name} = {score.value:.4g} is above {limit:g}")
    _fail(failures)


def _by_name(found: Sequence[Score], labels: Sequence[str]) -> dict[str, list[Score]]:
    """Scores by their name without the model's label."""
    names: dict[str, list[Score]] = {}
    for score in found:
        label, _, part = score.group.partition(":")
        group = part if len(labels) > 1 and label in labels else score.group
        names.setdefault(".".join(p for p in (score.axis, group, score.metric) if p), []).append(score)
    return names


def _named(flag: str, name: str, names: Mapping[str, list[Score]]) -> list[Score]:
    if name not in names:
        raise ToolError(
            f"{flag}: no such score{nearest(name, names)}; report.json names all", code=ExitCode.USAGE
        )
    return names[name]


def _fail(failures: Sequence[str]) -> None:
    if failures:
        more = f" (and {len(failures) - 3} more)" if len(failures) > 3 else ""
        raise GateFailed("; ".join(failures[:3]) + more)


def table(found: Sequence[Score], whole: bool = False) -> str:
    """Scores as lines of text with their formulas and the caveat; refused ones are counted.

    Args:
        whole: only scores over whole sets, without those of their parts.
    """
    lines = [["test", "group", "score", "value [95 % interval]", "n", "ties"]]
    formulas: dict[str, str] = {}
    refused = 0
    for s in found:
        if s.value is None:
            refused += 1
            continue
        if whole and ":" in s.group:
            continue
        value = shown(s.value, s.low, s.high)
        lines.append([s.axis, s.group or "all", s.metric, value, str(s.n), str(s.extra.get("ties", "-"))])
        if not s.metric.endswith(("-difference", "-bias-change")):
            formulas[f"{s.axis} {s.metric}"] = s.formula
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    rows = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    notes = [f"{name}: {text}" for name, text in formulas.items()]
    if refused:
        notes.append(f"{refused} scores have no value, most for too small an n; report.json says why of each")
    return "\n".join(["scores", *rows, *notes, CAVEAT])
