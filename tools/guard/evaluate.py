"""How good a guard is on exchanges that it has not seen."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import describe_input
from tuneutils.shared.command import Run
from tuneutils.shared.errors import GateFailed, ToolError
from tuneutils.shared.guarding import Guard, Watch, load_guard
from tuneutils.shared.models import load_model, model_input, resolve
from tuneutils.shared.records import Reader
from tuneutils.tools.guard import measures
from tuneutils.tools.guard.bounds import share
from tuneutils.tools.guard.exchanges import Exchange, labelled, outcome, to_exchange
from tuneutils.tools.guard.judge import judge
from tuneutils.tools.guard.params import EvalParams
from tuneutils.tools.guard.report import write_report

#: Exchanges that the report quotes: what gets through, and false alarms, of each category.
QUOTED = 3
QUOTED_CHARACTERS = 160
BUDGETS = (0.01, 0.02, 0.05, 0.1, 0.2)


def evaluate(run: Run[EvalParams]) -> dict[str, Any]:
    """Run ``guard eval``; returns the summary."""
    params = run.params
    guard = load_guard(params.guard, model=params.model)
    model = params.model or str(guard.model["path"])
    resolve(model)
    inputs = [describe_input("records", path) for path in run.inputs]
    inputs += [describe_input("guard", params.guard), model_input(model)]
    training = json.loads((Path(params.guard) / "training.json").read_text(encoding="utf-8"))
    with run.artifact("report", inputs) as art:
        reader = Reader(
            run.inputs,
            on_error=run.on_error,
            quarantine=f"{run.output}.quarantine.jsonl",
            validate=labelled(params.label, params.fails_above),
        )
        loaded = load_model(
            model, device=run.device, dtype=run.dtype, trust_remote_code=params.trust_remote_code
        )
        exchanges, seen = _read(params, guard, reader, loaded.tokenizer, set(training["groups_learnt"]))
        if seen:
            run.log.warning("%d records left out: the guard learnt from their templates or prompts", seen)
        if not exchanges:
            raise ToolError(
                f"{', '.join(reader.paths)}: nothing to measure on; the guard learnt from all {seen} records"
            )
        with run.progress(len(exchanges), "judged", "exchanges") as bar:
            watches = judge(loaded, guard, exchanges, params.batch_size, progress=bar.update)
        report = measure(guard, exchanges, watches, training)
        report["left_out_as_seen"] = seen
        write_report(run, art.dir, report)
        art.metrics = {k: report[k] for k in ("recall", "false_positives", "ece", "auc")}
        measures.log_run(run, guard)
    run.log.info("recall %s", measures.shown(report["recall"]))
    run.log.info("false alarms on harmless requests %s", measures.shown(report["false_positives"]))
    _gate(params, report)
    return {"output": run.output, "metrics": art.metrics}


def _read(
    params: EvalParams, guard: Guard, reader: Reader, tokenizer: Any, known: set[str]
) -> tuple[list[Exchange], int]:
    """The exchanges, and how many were left out because the guard knows their group."""
    exchanges, seen = [], 0
    settings = guard.settings
    for item in reader.located():
        try:
            failed, harmless = outcome(item.record, params.label, params.fails_above)
            exchange = to_exchange(
                item.record, tokenizer, settings.template, settings.max_length,
                place=item.place, failed=failed, harmless=harmless,
            )  # fmt: skip
        except ValueError as exc:
            reader.refuse(item, str(exc))
            continue
        if exchange.group in known and not params.include_seen:
            seen += 1
        else:
            exchanges.append(exchange)
    return exchanges, seen


def measure(
    guard: Guard, exchanges: Sequence[Exchange], watches: Sequence[Watch], training: dict[str, Any]
) -> dict[str, Any]:
    """All numbers of the report."""
    report = measures.summary(guard, exchanges, watches)
    report["budget"] = guard.settings.budget
    report["groups"] = len({e.group for e in exchanges})
    report["threshold"] = training["threshold"]
    report["by_category"] = _by_category(guard, exchanges, watches)
    report["layers"] = _layers(exchanges, watches, training)
    report["frontier"] = _frontier(exchanges, watches)
    report["stopped_at"] = _stopped_at(guard, exchanges, watches)
    report["got_through"] = _quoted(guard, exchanges, watches, "failure", flagged=False)
    report["false_alarms"] = _quoted(guard, exchanges, watches, "harmless", flagged=True)
    return report


def _by_category(
    guard: Guard, exchanges: Sequence[Exchange], watches: Sequence[Watch]
) -> list[dict[str, Any]]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for exchange, watch in zip(exchanges, watches, strict=True):
        of = counts[exchange.category]
        of[exchange.kind] += 1
        if measures.flagged(guard, watch):
            of[f"{exchange.kind} flagged"] += 1
            named = watch.verdict().category
            of["named"] += exchange.failed and named == exchange.category
    return [
        {
            "category": name,
            "recall": share(of["failure flagged"], of["failure"]),
            "false_positives": share(of["harmless flagged"], of["harmless"]),
            "handled_flagged": share(of["handled flagged"], of["handled"]),
            "named": share(of["named"], of["failure flagged"]),
        }
        for name, of in sorted(counts.items())
    ]


def _layers(
    exchanges: Sequence[Exchange], watches: Sequence[Watch], training: dict[str, Any]
) -> dict[str, Any]:
    """What each layer does: how much the first one raises, and how it would do alone at the same budget."""
    alone = training["probe_alone_above"]
    made: dict[str, Any] = {}
    for kind in ("failure", "harmless", "handled"):
        of = [w for w, e in zip(watches, exchanges, strict=True) if e.kind == kind]
        made[f"raised_{kind}"] = share(sum(w.raised for w in of), len(of))
        made[f"probe_alone_{kind}"] = share(sum(w.best_probe > alone for w in of), len(of))
    return made


def _frontier(exchanges: Sequence[Exchange], watches: Sequence[Watch]) -> list[dict[str, Any]]:
    """Recall where just the given share of these harmless exchanges is flagged: an optimistic view, since the
    threshold is read off the same data."""
    harmless = [
        sorted((s for s, e in zip(scores, exchanges, strict=True) if e.kind == "harmless"), reverse=True)
        for scores in _scores(watches)
    ]
    rows = []
    for budget in BUDGETS:
        row: dict[str, Any] = {"budget": budget}
        for name, scores, others in zip(("both", "probe"), _scores(watches), harmless, strict=True):
            if not others:
                continue
            above = others[min(int(budget * len(others)), len(others) - 1)]
            of = [s for s, e in zip(scores, exchanges, strict=True) if e.failed]
            row[name] = share(sum(s > above for s in of), len(of))
        rows.append(row)
    return rows


def _scores(watches: Sequence[Watch]) -> tuple[list[float], list[float]]:
    return [w.best_joint for w in watches], [w.best_probe for w in watches]


def _stopped_at(guard: Guard, exchanges: Sequence[Exchange], watches: Sequence[Watch]) -> dict[str, Any]:
    """Where flagged failures were stopped: before the reply, in mid-reply, at its end."""
    found: Counter[str] = Counter()
    for exchange, watch in zip(exchanges, watches, strict=True):
        if exchange.failed and measures.flagged(guard, watch) and watch.at is not None:
            end = watch.at >= len(exchange.reply_ids)
            found["before" if not watch.at else "at the end" if end else "in mid-reply"] += 1
    total = sum(found.values())
    return {name: share(found[name], total) for name in ("before", "in mid-reply", "at the end")}


def _quoted(
    guard: Guard, exchanges: Sequence[Exchange], watches: Sequence[Watch], kind: str, *, flagged: bool
) -> list[dict[str, Any]]:
    """The worst of each category: the surest misjudgements."""
    rows = [
        (watch.verdict().score, exchange)
        for exchange, watch in zip(exchanges, watches, strict=True)
        if exchange.kind == kind and measures.flagged(guard, watch) == flagged
    ]
    rows.sort(key=lambda r: (-r[0] if flagged else r[0], r[1].place))
    taken: Counter[str] = Counter()
    made = []
    for score, exchange in rows:
        taken[exchange.category] += 1
        if taken[exchange.category] <= QUOTED:
            made.append(
                {
                    "category": exchange.category,
                    "score": score,
                    "prompt": exchange.prompt[-QUOTED_CHARACTERS:],
                    "reply": exchange.reply[:QUOTED_CHARACTERS],
                    "place": exchange.place,
                }
            )
    return made


def _gate(params: EvalParams, report: dict[str, Any]) -> None:
    recall, false = report["recall"]["value"], report["false_positives"]["value"]
    if params.min_recall is not None and (recall is None or recall < params.min_recall):
        raise GateFailed(f"recall {recall} is below --min-recall {params.min_recall:g}")
    if params.max_false_positives is not None and (false or 0) > params.max_false_positives:
        raise GateFailed(f"false positives {false} exceed {params.max_false_positives:g}")
