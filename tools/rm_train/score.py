"""Records in, the same records with a reward model's scores out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import check_stream, describe_input, sidecar
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ToolError
from tuneutils.shared.models import model_input, resolve
from tuneutils.shared.pairs import FORMATS as PREFERENCES
from tuneutils.shared.records import Located, Reader, Record, check, check_messages, open_writer
from tuneutils.shared.reward_model import RewardModel, load_reward_model
from tuneutils.shared.texts import Text, encode_record, encode_text, shortened, split_implicit
from tuneutils.tools.rm_train.params import ScoreParams
from tuneutils.tools.rm_train.scored import finite

#: Batches that are read ahead, to score texts of like length together.
AHEAD = 8
CANDIDATES = ("completion_a", "completion_b")
SINGLE = ("prompt-completion", "unpaired", "messages")


def score(run: Run[ScoreParams]) -> dict[str, Any]:
    """Run ``rm-train score``; returns the summary."""
    params = run.params
    resolve(params.model)
    inputs = [describe_input("records", path) for path in run.inputs]
    inputs.append(model_input(params.model, "reward-model"))
    check_stream(run, inputs)
    quarantine = f"{run.output}.quarantine.jsonl" if run.output not in (None, "-") else None
    reader = Reader(run.inputs, on_error=run.on_error, quarantine=quarantine, validate=validate)
    rm = load_reward_model(params.model, run.device, run.dtype, trust_remote_code=params.trust_remote_code)
    rm.template = params.template or rm.template
    rm.max_length = min(params.max_length or rm.max_length, rm.max_length)
    total, lowest, highest, count = 0.0, math.inf, -math.inf, 0
    with open_writer(str(run.output)) as writer:
        for record, scores in _scored(run, rm, reader):
            writer.write({**record, **scores})
            values = list(scores.values())
            lowest, highest = min(lowest, *values), max(highest, *values)
            total += sum(values)
            count += len(values)
    if not count:
        raise ToolError(f"{', '.join(reader.paths)}: no record left ({reader.stats.refused} refused)")
    metrics = {"texts": count, "mean": total / count, "min": lowest, "max": highest}
    metrics["refused"] = reader.stats.refused
    if run.output != "-" and Path(str(run.output)).is_file():
        said = {"licence": inputs[0].licence, "source": inputs[0].source}
        sidecar(run, Path(str(run.output)), inputs, metrics=metrics, **said)
    return {"output": run.output, "metrics": metrics}


def validate(record: Record) -> None:
    """A record that has something to score.

    Raises:
        ValueError: with the field and the reason.
    """
    prompt = record.get("prompt", "")
    if not isinstance(prompt, str):
        check_messages("prompt", prompt)
    if "prompt" in record and any(name in record for name in CANDIDATES):
        for name in CANDIDATES:
            value = record.get(name)
            if not isinstance(value, str):
                check_messages(name, value)
            elif not value.strip():
                raise ValueError(f"field {name!r}: is empty")
        return
    check(record, (*SINGLE, *PREFERENCES))


def _scored(run: Run[ScoreParams], rm: RewardModel, reader: Reader) -> Iterator[tuple[Record, Record]]:
    """Records in their order with what is added to them."""
    size = run.params.batch_size
    located = reader.located()
    ahead = size  # the first lines come soon, as `| head` wants them
    while batch := list(islice(located, ahead)):
        ahead = size * AHEAD
        kept: list[tuple[Located, dict[str, Text]]] = []
        for item in batch:
            try:
                texts = texts_of(item.record, rm)
                for name, text in texts.items():
                    if len(text.ids) > rm.max_length and run.params.too_long == "error":
                        raise ValueError(
                            f"{name}: the text has {len(text.ids)} tokens, more than {rm.max_length} "
                            "(--too-long truncate cuts the start of its prompt)"
                        )
                    texts[name] = shortened(text, rm.max_length)
            except ValueError as exc:
                reader.refuse(item, str(exc))
                continue
            kept.append((item, texts))
        rows = [text.ids for _, texts in kept for text in texts.values()]
        found = iter(rm.scores(rows, size, raw=run.params.raw))
        for item, texts in kept:
            yield item.record, {name: finite(next(found), item.place) for name in texts}


def texts_of(record: Record, rm: RewardModel) -> dict[str, Text]:
    """The texts of a record by the name of the field that their score gets.

    Raises:
        ValueError: it cannot be encoded.
    """
    if "prompt" in record and CANDIDATES[0] in record:
        prompt, sides = record["prompt"], {f"score_{n[-1]}": record[n] for n in CANDIDATES}
    elif "chosen" in record:
        both = record["chosen"], record["rejected"]
        prompt, *answers = (record["prompt"], *both) if "prompt" in record else split_implicit(*both)
        sides = dict(zip(("score_chosen", "score_rejected"), answers, strict=True))
    else:
        return {"score": encode_record(record, rm.tokenizer, rm.template)}
    return {name: encode_text(prompt, side, rm.tokenizer, rm.template) for name, side in sides.items()}
