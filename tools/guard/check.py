"""Records in, records with a guard's verdict out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tuneutils.shared import pii
from tuneutils.shared.artifact import check_stream, describe_input, sidecar
from tuneutils.shared.command import Run
from tuneutils.shared.guarding import Guard, Verdict, load_guard
from tuneutils.shared.models import Loaded, load_model, model_input, resolve
from tuneutils.shared.records import Located, Reader, Record, open_writer
from tuneutils.tools.guard import measures
from tuneutils.tools.guard.exchanges import Exchange, has_reply, to_exchange, validate
from tuneutils.tools.guard.judge import judge
from tuneutils.tools.guard.params import CheckParams
from tuneutils.tools.guard.personal import Finder

#: Batches that are read ahead, to judge exchanges of like length together.
AHEAD = 8


def check(run: Run[CheckParams]) -> dict[str, Any]:
    """Run ``guard check``; returns the summary."""
    params = run.params
    guard = load_guard(params.guard, model=params.model)
    model = params.model or str(guard.model["path"])
    resolve(model)
    inputs = [describe_input("records", path) for path in run.inputs]
    inputs += [describe_input("guard", params.guard), model_input(model)]
    check_stream(run, inputs)
    quarantine = f"{run.output}.quarantine.jsonl" if run.output not in (None, "-") else None
    reader = Reader(run.inputs, on_error=run.on_error, quarantine=quarantine, validate=validate)
    finder = Finder(params.presidio) if params.personal_data != "off" else None
    loaded = load_model(model, device=run.device, dtype=run.dtype, trust_remote_code=params.trust_remote_code)
    counts: Counter[str] = Counter()
    with open_writer(str(run.output)) as writer:
        for record, verdict, found in _judged(run, loaded, guard, reader, finder):
            counts["records"] += 1
            counts["flagged"] += verdict["flagged"]
            counts[f"layer_{verdict['layer']}"] += 1
            counts.update({f"personal_data_{kind.lower()}": n for kind, n in found.items()})
            if verdict["flagged"] and params.flagged == "drop":
                counts["dropped"] += 1
                continue
            writer.write({**record, "guard": verdict})
    metrics = {**dict(sorted(counts.items())), "refused": reader.stats.refused}
    _finish(run, guard, metrics, inputs)
    return {"output": run.output, "metrics": metrics}


def _finish(run: Run[CheckParams], guard: Guard, metrics: dict[str, Any], inputs: Sequence[Any]) -> None:
    run.log.info(
        "%d records, %d flagged%s", metrics["records"], metrics["flagged"],
        f", {metrics['dropped']} of them left out" if "dropped" in metrics else "",
    )  # fmt: skip
    if run.output == "-" or not Path(str(run.output)).is_file():
        return
    said = {"licence": inputs[0].licence, "source": inputs[0].source}
    sidecar(run, Path(str(run.output)), inputs, metrics=metrics, **said)
    measures.log_run(run, guard)


def _judged(
    run: Run[CheckParams], loaded: Loaded, guard: Guard, reader: Reader, finder: Finder | None
) -> Iterator[tuple[Record, dict[str, Any], Counter[str]]]:
    """Records in their order with verdict and personal data, masked or replaced as asked."""
    params = run.params
    settings = guard.settings
    located = reader.located()
    ahead = params.batch_size  # the first lines come soon, as `| head` wants them
    while batch := list(islice(located, ahead)):
        ahead = params.batch_size * AHEAD
        start = time.perf_counter()
        kept: list[tuple[Located, Exchange]] = []
        for item in batch:
            try:
                exchange = to_exchange(item.record, loaded.tokenizer, settings.template, settings.max_length)
            except ValueError as exc:
                reader.refuse(item, str(exc))
                continue
            kept.append((item, exchange))
        watches = judge(loaded, guard, [e for _, e in kept], params.batch_size)
        milliseconds = 1e3 * (time.perf_counter() - start) / max(1, len(kept))
        for (item, exchange), watch in zip(kept, watches, strict=True):
            record, found, verdict = item.record, Counter[str](), watch.verdict()
            if finder is not None:
                record, found, verdict = _personal(record, exchange, verdict, finder, params.personal_data)
            said = verdict.as_json()
            if found:
                said["personal_data"] = dict(sorted(found.items()))
            if params.latency:
                said["latency_ms"] = round(milliseconds, 3)
            if verdict.flagged and params.flagged == "replace":
                record = with_reply(record, params.message)
            yield record, said, found


def _personal(
    record: Record, exchange: Exchange, verdict: Verdict, finder: Finder, mode: str
) -> tuple[Record, Counter[str], Verdict]:
    """The record, masked where asked, what it holds, and the verdict, which may flag such a reply."""
    found: Counter[str] = Counter()
    masked = _map_texts(record, lambda text: _counted(finder, text, found))
    if mode == "flag" and not verdict.flagged and has_reply(record) and finder.find(exchange.reply):
        verdict = Verdict(True, "pattern", 1.0, "personal-data")
    return (masked if mode == "mask" else record), found, verdict


def _counted(finder: Finder, text: str, found: Counter[str]) -> str:
    spans = finder.find(text)
    found.update(span.kind for span in spans)
    return masked_text(text, spans)


def masked_text(text: str, spans: Sequence[pii.Span]) -> str:
    """Each span as its kind in brackets."""
    pieces, last = [], 0
    for span in spans:
        pieces += [text[last : span.start], f"[{span.kind}]".upper()]
        last = span.end
    return "".join([*pieces, text[last:]])


def _map_texts(record: Record, change: Any) -> Record:
    """The record with its prompt, completion and messages changed; other fields stay."""
    made = dict(record)
    for name in ("prompt", "completion", "messages"):
        value = record.get(name)
        if isinstance(value, str):
            made[name] = change(value)
        elif isinstance(value, list):
            made[name] = [{**turn, "content": change(turn["content"])} for turn in value]
    return made


def with_reply(record: Record, text: str) -> Record:
    """The record with another reply."""
    turn = {"role": "assistant", "content": text}
    if "messages" in record:
        before = record["messages"][:-1] if has_reply(record) else record["messages"]
        return {**record, "messages": [*before, turn]}
    return {**record, "completion": [turn] if isinstance(record.get("completion"), list) else text}
