"""An existing reward model measured on other records: preferences, or candidates with their worth."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tuneutils.shared import pairs as preferences
from tuneutils.shared.artifact import Artifact, Input
from tuneutils.shared.command import Run
from tuneutils.shared.errors import GateFailed, ToolError, UpToDate
from tuneutils.shared.models import model_input, resolve
from tuneutils.shared.pairs import read_pairs
from tuneutils.shared.record_source import Source, open_source
from tuneutils.shared.records import Located, Record, check_messages
from tuneutils.shared.reward_model import RewardModel, load_reward_model
from tuneutils.shared.texts import encode_text, shortened
from tuneutils.tools.rm_train.params import EvalParams
from tuneutils.tools.rm_train.report import Pool, headline, measure, say, shown, write_report
from tuneutils.tools.rm_train.scored import finite, score_pairs


def evaluate(run: Run[EvalParams]) -> dict[str, Any]:
    """Run ``rm-train eval``; returns the summary.

    Raises:
        GateFailed: the accuracy is below ``--min-accuracy``; the report is written all the same.
    """
    params = run.params
    resolve(params.model)
    source = open_source(run, run.inputs, "records", validate=validate)
    inputs = [*source.inputs, model_input(params.model, "reward-model")]
    with _open_report(run, inputs) as art:
        rm = load_reward_model(
            params.model, run.device, run.dtype, trust_remote_code=params.trust_remote_code
        )
        rm.template = params.template or rm.template
        rm.max_length = min(params.max_length or rm.max_length, rm.max_length)
        located = list(source.located)
        pools = _pools(run, rm, source, [x for x in located if "completions" in x.record])
        source.located = [x for x in located if "completions" not in x.record]
        scored = {}
        if source.located:
            found = read_pairs(run, source, rm.tokenizer, template=rm.template, limit=rm.max_length)
            scored = {"records": score_pairs(rm, found.pairs, params.batch_size)}
            art.metrics.update(truncated=found.truncated, dropped=found.dropped)
        elif not pools:
            raise ToolError(f"{', '.join(source.reader.paths)}: no record left")
        report = measure(rm, scored, pools=pools, seed=run.seed)
        say(run, report)
        write_report(run, art.dir, report, list(scored.values()))
        art.metrics.update(refused=source.reader.stats.refused, **headline(report))
    _check_accuracy(params.min_accuracy, report)
    return {"output": run.output, "metrics": art.metrics}


def _open_report(run: Run[EvalParams], inputs: Sequence[Input]) -> Artifact:
    """The report to be written. One that is up to date still has its gate asked.

    Raises:
        UpToDate: it is there and passes.
        GateFailed: it is there and does not.
    """
    try:
        return run.artifact("report", inputs)
    except UpToDate:
        found = Path(str(run.output)) / "report.json"
        _check_accuracy(run.params.min_accuracy, json.loads(found.read_text(encoding="utf-8")))
        raise


def _check_accuracy(least: float | None, report: Mapping[str, Any]) -> None:
    accuracy = report.get("accuracy")
    if least is not None and (not accuracy or accuracy["value"] < least):
        got = shown(accuracy) if accuracy else "unknown: no record has a preference"
        raise GateFailed(f"accuracy {got}; --min-accuracy {least} is not reached")


def validate(record: Record) -> None:
    """A preference, or ``prompt``+``completions`` with, if known, as many ``rewards``."""
    if "completions" not in record:
        preferences.validate(record)
        return
    if not isinstance(record.get("prompt"), str):
        check_messages("prompt", record.get("prompt"))
    completions, rewards = record["completions"], record.get("rewards")
    if not isinstance(completions, list) or not completions:
        raise ValueError("field 'completions': must be a non-empty list")
    for i, completion in enumerate(completions):
        if not isinstance(completion, str):
            check_messages(f"completions[{i}]", completion)
        elif not completion.strip():
            raise ValueError(f"field completions[{i}]: is empty")
    if rewards is None:
        return
    numbers = isinstance(rewards, list) and all(
        isinstance(r, (int, float)) and not isinstance(r, bool) and math.isfinite(r) for r in rewards
    )
    if not numbers or len(rewards) != len(completions):
        raise ValueError("field 'rewards': must be a list of as many numbers as there are completions")


def _pools(run: Run[EvalParams], rm: RewardModel, source: Source, located: Sequence[Located]) -> list[Pool]:
    """Scores and worth of each record's candidates."""
    made: list[Pool] = []
    for item in located:
        record = item.record
        try:
            rows = []
            for completion in record["completions"]:
                text = encode_text(record["prompt"], completion, rm.tokenizer, rm.template)
                if len(text.ids) > rm.max_length and run.params.too_long != "truncate":
                    raise ValueError(f"has {len(text.ids)} tokens, more than {rm.max_length}")
                rows.append(shortened(text, rm.max_length).ids)
        except ValueError as exc:
            source.reader.refuse(item, str(exc))
            continue
        scores = [finite(s, item.place) for s in rm.scores(rows, run.params.batch_size)]
        made.append((scores, record.get("rewards")))
    return made
