"""Prompts in, guarded replies out."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

from tuneutils.shared import pii
from tuneutils.shared.artifact import check_stream, describe_input, sidecar
from tuneutils.shared.command import Run
from tuneutils.shared.guarding import Guard, StreamingGuard, load_guard
from tuneutils.shared.models import Loaded, load_model, model_input, resolve
from tuneutils.shared.records import Located, Reader, Record, open_writer
from tuneutils.shared.sample import Sampling
from tuneutils.shared.sample import generate as sample
from tuneutils.tools.guard import measures
from tuneutils.tools.guard.check import with_reply
from tuneutils.tools.guard.exchanges import has_reply, prompt_text, validate
from tuneutils.tools.guard.params import RunParams
from tuneutils.tools.guard.probe import prepared

AHEAD = 4


def generate(run: Run[RunParams]) -> dict[str, Any]:
    """Run ``guard run``; returns the summary."""
    params = run.params
    guard = load_guard(params.guard, model=params.model)
    model = params.model or str(guard.model["path"])
    resolve(model)
    inputs = [describe_input("prompts", path) for path in run.inputs]
    inputs += [describe_input("guard", params.guard), model_input(model)]
    check_stream(run, inputs)
    quarantine = f"{run.output}.quarantine.jsonl" if run.output not in (None, "-") else None
    reader = Reader(run.inputs, on_error=run.on_error, quarantine=quarantine, validate=validate)
    loaded = load_model(model, device=run.device, dtype=run.dtype, trust_remote_code=params.trust_remote_code)
    counts: Counter[str] = Counter()
    located = reader.located()
    ahead = params.batch_size
    with open_writer(str(run.output)) as writer:
        while batch := list(islice(located, ahead)):
            ahead = params.batch_size * AHEAD
            ready = prepared(loaded, _unanswered(batch), guard.settings.template, reader.refuse)
            for record in replies(loaded, guard, ready, params, run.seed, offset=counts["prompts"]):
                counts["prompts"] += 1
                counts["flagged"] += record["guard"]["flagged"]
                writer.write(record)
    metrics = {**dict(counts), "refused": reader.stats.refused}
    run.log.info("%d prompts, %d replies stopped", counts["prompts"], counts["flagged"])
    if run.output != "-" and Path(str(run.output)).is_file():
        sidecar(run, Path(str(run.output)), inputs, metrics=metrics, licence=inputs[0].licence)
        measures.log_run(run, guard)
    return {"output": run.output, "metrics": metrics}


def replies(
    loaded: Loaded,
    guard: Guard,
    ready: list[tuple[Record, list[int]]],
    params: RunParams,
    seed: int,
    *,
    offset: int,
) -> list[Record]:
    """The records with reply, ``finish_reason`` and verdict."""
    records = [record for record, _ in ready]
    sampling = Sampling(
        max_new_tokens=params.max_new_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        stop_token_ids=(int(loaded.tokenizer.eos_token_id),),
        seed=seed,
    )
    with StreamingGuard(guard, loaded, [prompt_text(r) for r in records]) as watching:
        made = sample(
            loaded.model, [ids for _, ids in ready], sampling, batch_size=params.batch_size,
            pad_token_id=loaded.pad_id, on_token=watching, row_ids=range(offset, offset + len(records)),
        )  # fmt: skip
    out = []
    for i, (record, completion, verdict) in enumerate(zip(records, made, watching.verdicts(), strict=True)):
        reply, said = watching.reply(i), verdict.as_json()
        if verdict.flagged and params.flagged == "replace":
            reply = params.message
        if params.personal_data != "off":
            masked, found = pii.mask(reply)
            reply = masked if params.personal_data == "mask" else reply
            if found:
                said["personal_data"] = dict(sorted(found.items()))
        out.append({**with_reply(record, reply), "finish_reason": completion.finish_reason, "guard": said})
    return out


def _unanswered(batch: list[Located]) -> list[Located]:
    """A reply that is there is left out, to be written anew."""
    return [Located(without_reply(item.record), item.path, item.line) for item in batch]


def without_reply(record: Record) -> Record:
    """The record up to its last reply, and no label of that reply."""
    if not has_reply(record):
        return dict(record)
    if "messages" in record:
        return {**record, "messages": record["messages"][:-1]}
    return {k: v for k, v in record.items() if k not in ("completion", "label")}
