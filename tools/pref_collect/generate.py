"""Sample the completions to be rated, and select the pairs whose rating teaches a reward model most.

A reward model is least sure of the pairs that it scores closest: under Bradley–Terry the probability of a
preference is σ(score_a - score_b), whose entropy falls as the scores part (uncertainty sampling; Settles
2009, Active Learning Literature Survey, section 3.1).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import Input, check_stream, describe_input, portable_path, sidecar
from tuneutils.shared.command import Run, Summary
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.records import Located, Reader, Record, open_writer
from tuneutils.tools.pref_collect.candidates import candidate_of
from tuneutils.tools.pref_collect.params import GenerateParams
from tuneutils.tools.pref_collect.study import Settings

SIDES = "ab"


def generate(run: Run[GenerateParams]) -> Summary:
    """Write candidates for the prompts of ``run.inputs``, or a selection of the pairs in them."""
    params = run.params
    _check(params)
    inputs = [describe_input("prompts" if params.model else "candidates", path) for path in run.inputs]
    if params.model:
        from tuneutils.shared.models import model_input

        inputs += [model_input(name) for name in params.model]
    check_stream(run, inputs)
    quarantine = f"{run.output}.quarantine.jsonl" if run.output not in (None, "-") else None
    reader = Reader(run.inputs, on_error=run.on_error, quarantine=quarantine)
    dropped: Counter[str] = Counter()
    if params.model:
        rows = _sampled(run, reader, dropped)
    else:
        rows = _given(reader)
    if params.select is not None:
        rows = select(rows, params.select, params.select_by, run.seed)
    if not rows:
        raise ToolError(
            f"{', '.join(reader.paths)}: no candidates left ({dict(dropped) or 'nothing usable'})"
        )
    with open_writer(str(run.output)) as writer:
        for row in rows:
            writer.write(row)
    metrics = {"candidates": len(rows), "refused": reader.stats.refused, "dropped": dict(dropped)}
    if run.output != "-" and Path(str(run.output)).is_file():
        sidecar(run, Path(str(run.output)), inputs, metrics=metrics, licence=_licence(inputs))
    run.log.info("%d candidates; left out: %s", len(rows), dict(dropped) or "nothing")
    return {"output": run.output, **metrics}


def _check(params: GenerateParams) -> None:
    """Raises ToolError (2) for options that do not go together."""
    if len(params.model) > 2 or (len(params.model) == 2 and params.completions == 1):
        raise ToolError("-m: one model, or two for two completions", code=ExitCode.USAGE)
    if params.limit is not None and not params.model:
        raise ToolError("--limit is for prompts; --select takes some of the pairs", code=ExitCode.USAGE)
    if len(params.model) == 1 and params.completions == 2 and params.temperature == 0:
        raise ToolError("--temperature 0: one model gives the same answer twice", code=ExitCode.USAGE)
    if not params.model and params.select is None:
        raise ToolError("name a model with -m, or how many pairs to keep with --select", code=ExitCode.USAGE)
    if params.model and params.select is not None and params.select_by == "rm":
        message = "score the pairs first, then run generate --select on the scored records, without -m"
        raise ToolError(f"--select-by rm needs score_a and score_b: {message}", code=ExitCode.USAGE)


def _licence(inputs: Sequence[Input]) -> str | None:
    return next((i.licence for i in inputs if i.licence), None)


def _given(reader: Reader) -> list[Record]:
    """Records that hold pairs already."""
    rows = []
    for located in reader.located():
        try:
            if candidate_of(located.record).mode != "compare":
                raise ValueError("has one completion; pairs are selected")
        except ValueError as exc:
            reader.refuse(located, str(exc))
            continue
        rows.append(located.record)
    return rows


def select(rows: list[Record], number: int, by: str, seed: int) -> list[Record]:
    """The ``number`` pairs to have rated, the most telling first (at random: in their own order).

    Raises:
        ToolError: a record has no scores (65).
    """
    if by == "random":
        chance = Settings(seed=seed).chance
        kept = heapq.nsmallest(number, range(len(rows)), key=lambda i: (chance("select", i), i))
        return [rows[i] for i in sorted(kept)]
    return heapq.nsmallest(number, rows, key=_score_gap)


def _score_gap(row: Record) -> float:
    scores: list[float] = []
    for name in ("score_a", "score_b"):
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ToolError(f"a record has no number in the field {name!r}; score the pairs first")
        scores.append(value)
    return abs(scores[0] - scores[1])


def _sampled(run: Run[GenerateParams], reader: Reader, dropped: Counter[str]) -> list[Record]:
    params = run.params
    located = list(_with_prompts(reader))[: params.limit]
    models = params.model if len(params.model) == params.completions else params.model * params.completions
    texts: list[list[str | None]] = [[] for _ in located]
    for side, name in enumerate(models):
        for made, text in zip(texts, _completions(run, name, located, reader, side), strict=True):
            made.append(text)
    rows = []
    for place, made in zip(located, texts, strict=True):
        if None in made:
            dropped["prompts too long for the model"] += 1
        elif not all(text.strip() for text in made if text is not None):
            dropped["empty completions"] += 1
        elif len(made) == 2 and made[0] == made[1]:
            dropped["equal completions"] += 1
        else:
            rows.append(_row(place.record, made, models))
    return rows


def _with_prompts(reader: Reader) -> list[Located]:
    found = []
    for located in reader.located():
        prompt = located.record.get("prompt")
        if isinstance(prompt, (str, list)) and prompt:
            found.append(located)
        else:
            reader.refuse(located, "field 'prompt': missing, empty, or neither text nor messages")
    return found


def _row(record: Record, made: Sequence[str | None], models: Sequence[str]) -> Record:
    old = {
        "completion",
        "chosen",
        "rejected",
        "label",
        *(f"{f}_{s}" for f in ("completion", "score") for s in SIDES),
    }
    kept = {k: v for k, v in record.items() if k not in old}
    if len(made) == 1:
        return {**kept, "completion": made[0], "model": portable_path(models[0])}
    sides = {f"completion_{s}": text for s, text in zip(SIDES, made, strict=True)}
    return {**kept, **sides, **{f"model_{s}": portable_path(m) for s, m in zip(SIDES, models, strict=True)}}


def _completions(
    run: Run[GenerateParams], name: str, located: Sequence[Located], reader: Reader, side: int
) -> list[str | None]:
    """A completion of each prompt; None where the prompt fills the model's context."""
    from tuneutils.shared.models import load_model
    from tuneutils.shared.sample import Sampling
    from tuneutils.shared.sample import generate as sample
    from tuneutils.shared.supervise import prompt_ids

    params = run.params
    loaded = load_model(name, device=run.device, dtype=run.dtype)
    context = getattr(loaded.model.config, "max_position_embeddings", None) or 1 << 40
    prompts: dict[int, list[int]] = {}
    for i, place in enumerate(located):
        try:
            ids = prompt_ids({"prompt": place.record["prompt"]}, loaded.tokenizer)
            if len(ids) >= context:
                raise ValueError(f"field 'prompt': has {len(ids)} tokens; {name} takes {context - 1}")
            prompts[i] = ids
        except ValueError as exc:
            reader.refuse(place, str(exc))
    sampling = Sampling(
        max_new_tokens=params.max_new_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        stop_token_ids=_stop_ids(loaded),
        seed=run.seed + (side << 32),  # each side has draws of its own
    )
    with run.progress(len(prompts), f"completions of {name}", "prompt") as bar:
        made = sample(
            loaded.model,
            list(prompts.values()),
            sampling,
            pad_token_id=loaded.pad_id,
            batch_size=params.batch_size,
        )
        bar.update(len(prompts))
    texts: dict[int, str] = {
        i: loaded.tokenizer.decode(completion.token_ids, skip_special_tokens=True).strip()
        for i, completion in zip(prompts, made, strict=True)
    }
    return [texts.get(i) for i in range(len(located))]


def _stop_ids(loaded: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's EOS and the generation config's."""
    configured = getattr(loaded.model.generation_config, "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    return sorted({int(t) for t in [loaded.tokenizer.eos_token_id, *several] if t is not None})
