"""Preferences from a constitution: draft, critique, revise (Bai et al. 2022, arXiv 2212.08073, section 3.1).

The model answers a prompt, names what in its answer goes against a principle, and writes the answer anew.
The revision becomes ``chosen`` and the draft ``rejected``. A row's texts depend on its prompt, the seed and
its place alone (up to the rounding of batched products). Models without a chat template get the paper's own
``Human:`` and ``Assistant:``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tuneutils.shared.artifact import check_stream, describe_input, sidecar
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ToolError
from tuneutils.shared.evaluate import distinct_n
from tuneutils.shared.evaluate_model import context_length
from tuneutils.shared.models import Loaded, load_model, model_input, resolve
from tuneutils.shared.records import Reader, check, check_messages, open_writer
from tuneutils.shared.sample import Sampling, generate
from tuneutils.shared.streams import Record
from tuneutils.shared.supervise import prompt_ids
from tuneutils.tools.pref_tune.constitution import Principle, as_input, load
from tuneutils.tools.pref_tune.params import ConstitutionParams

FORMATS = ("prompt", "prompt-completion", "messages", "preference", "unpaired")
#: Fields of a record that the pair replaces.
REPLACED = ("messages", "completion", "chosen", "rejected", "label", "votes", "margin", "strength")
#: What small models write before a revision.
PREAMBLE = re.compile(
    r"^(sure|certainly|of course|absolutely|here(?:'s| is| are)|revised|rewritten|new answer|my new answer"
    r"|i(?:'ve| have) (?:revised|rewritten))\b[^\n:]{0,120}:\s+",
    re.IGNORECASE,
)
TURN = re.compile(r"\n\n(?:Human|Assistant):")
#: A text of so many words with a smaller share of different 4-grams repeats itself.
LONG, DISTINCT = 16, 0.5
#: A revision with a larger share of 4-grams out of the critique repeats it.
REPEATED = 1 / 3

Messages = list[dict[str, Any]]


@dataclass
class Row:
    """A prompt on its way to a pair.

    Attributes:
        index: among the prompts; with the seed it decides every draw.
        why: the reason for which it was dropped.
    """

    index: int
    record: Record
    prompt: Messages
    draft: str = ""
    revision: str = ""
    critiques: list[str] = field(default_factory=list)
    principles: list[Principle] = field(default_factory=list)
    why: str | None = None


def draft(run: Run[ConstitutionParams]) -> dict[str, Any]:
    """Run ``pref-tune constitution``; returns the summary.

    Raises:
        ToolError: bad input, with its place; or no pair is left (65).
    """
    params = run.params
    resolve(params.model)
    principles = load(params.principles)
    inputs = [describe_input("prompts", path) for path in run.inputs]
    inputs += [model_input(params.model), as_input(params.principles)]
    if params.reward_model is not None:
        inputs.append(model_input(params.reward_model, "reward-model"))
    check_stream(run, inputs)
    quarantine = f"{run.output}.quarantine.jsonl" if run.output not in (None, "-") else None
    reader = Reader(run.inputs, on_error=run.on_error, quarantine=quarantine, validate=validate)
    loaded = load_model(
        params.model, device=run.device, dtype=run.dtype, trust_remote_code=params.trust_remote_code
    )
    judge = _judge(run)
    dropped: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    with ExitStack() as stack:
        writer = stack.enter_context(open_writer(str(run.output)))
        aside = stack.enter_context(open_writer(params.dropped)) if params.dropped else None
        for rows in _batches(run, reader, loaded):
            revise(run, loaded, rows, principles)
            if judge is not None:
                judge(rows)
            for row in rows:
                if row.why is None:
                    writer.write(pair_of(row))
                    kept[row.principles[-1].id] += 1
                else:
                    dropped[row.why] += 1
                    if aside is not None:
                        aside.write({**pair_of(row), "why": row.why})
        if not kept:
            raise ToolError(f"{', '.join(reader.paths)}: no pair left; dropped: {_said(dropped)}")
    metrics = {
        "prompts": kept.total() + dropped.total(),
        "pairs": kept.total(),
        "principles": dict(sorted(kept.items())),
        "dropped": dict(sorted(dropped.items())),
        "refused": reader.stats.refused,
    }
    run.log.info("%d pairs of %d prompts; dropped: %s", metrics["pairs"], metrics["prompts"], _said(dropped))
    if run.output != "-" and Path(str(run.output)).is_file():
        licence = next((i.licence for i in inputs if i.role == "prompts"), None)
        sidecar(run, Path(str(run.output)), inputs, metrics=metrics, licence=licence)
    return {"output": run.output, "metrics": metrics}


def _said(dropped: Counter[str]) -> str:
    return ", ".join(f"{n} {why}" for why, n in sorted(dropped.items())) or "none"


def validate(record: Record) -> None:
    """A record with a prompt."""
    prompt = record.get("prompt", "")
    if not isinstance(prompt, str):
        check_messages("prompt", prompt)
    check(record, FORMATS)
    if "prompt" in record and isinstance(prompt, str) and not prompt.strip():
        raise ValueError("field 'prompt': is empty")


def messages_of(record: Record) -> Messages:
    """The conversation that is answered: up to and with its last turn that is not the assistant's."""
    if "prompt" in record:
        prompt = record["prompt"]
        return list(prompt) if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    turns = list(record["messages"])
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns:
        raise ValueError("field 'messages': no turn to answer")
    return turns


def _batches(run: Run[ConstitutionParams], reader: Reader, loaded: Loaded) -> Iterator[list[Row]]:
    """Rows whose prompt leaves room for an answer."""
    located = reader.located()
    index = 0
    while batch := list(islice(located, run.params.batch_size)):
        rows = []
        for item in batch:
            if run.params.limit is not None and index >= run.params.limit:
                break
            try:
                row = Row(index, item.record, messages_of(item.record))
                if not _fits(loaded, encode_turns(loaded, row.prompt)):
                    raise ValueError("the prompt leaves no room in the model's context")
            except ValueError as exc:
                reader.refuse(item, str(exc))
                continue
            rows.append(row)
            index += 1
        if rows:
            yield rows
        if run.params.limit is not None and index >= run.params.limit:
            return


def _fits(loaded: Loaded, ids: Sequence[int]) -> bool:
    limit = context_length(loaded.model)
    return limit is None or len(ids) < limit


def encode_turns(loaded: Loaded, turns: Messages) -> list[int]:
    """Token ids up to where the assistant's next turn begins.

    Raises:
        ValueError: the chat template refuses the turns.
    """
    tokenizer = loaded.tokenizer
    if tokenizer.chat_template:
        return prompt_ids({"messages": turns}, tokenizer)
    names = {"user": "Human", "assistant": "Assistant"}
    text = "".join(f"\n\n{names.get(t['role'], 'System')}: {t['content']}" for t in turns) + "\n\nAssistant:"
    return prompt_ids({"prompt": text}, tokenizer, template="none")


def revise(
    run: Run[ConstitutionParams], loaded: Loaded, rows: list[Row], principles: Sequence[Principle]
) -> None:
    """Draft, critique and revise; what cannot become a pair gets its reason."""
    phase = 0
    for row, (text, ended) in zip(
        rows, _say(run, loaded, rows, [r.prompt for r in rows], phase), strict=True
    ):
        row.draft = row.revision = text
        row.why = _unfit("draft", text, ended, run.params)
    for number in range(run.params.rounds):
        for request in ("critique", "revision"):
            phase += 1
            going = [row for row in rows if row.why is None]
            if request == "critique":
                for row in going:
                    row.principles.append(drawn(principles, run.seed, row.index, number))
            turns = [_turns(row, request) for row in going]
            for row, (text, ended) in zip(going, _say(run, loaded, going, turns, phase), strict=True):
                if row.why is not None:
                    continue
                if request == "critique":
                    row.critiques.append(text)
                else:
                    row.revision, row.why = settled(row, text, ended, run.params)


def drawn(principles: Sequence[Principle], seed: int, index: int, number: int) -> Principle:
    """The principle of a prompt and round, each as likely as the others."""
    return principles[int(np.random.default_rng((seed, index, number)).integers(len(principles)))]


def _turns(row: Row, request: str) -> Messages:
    principle = row.principles[-1]
    turns = [
        *row.prompt,
        {"role": "assistant", "content": row.revision},
        {"role": "user", "content": principle.critique()},
    ]
    if request == "revision":
        turns += [
            {"role": "assistant", "content": row.critiques[-1] or "-"},
            {"role": "user", "content": principle.revision()},
        ]
    return turns


def _say(
    run: Run[ConstitutionParams], loaded: Loaded, rows: list[Row], turns: Sequence[Messages], phase: int
) -> list[tuple[str, bool]]:
    """The model's next turn in each conversation, and whether it ended by itself.

    A conversation that is too long gives its row a reason, and nothing.
    """
    params = run.params
    sampling = Sampling(
        max_new_tokens=params.max_new_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        stop_token_ids=(int(loaded.tokenizer.eos_token_id),),  # type: ignore[arg-type]
        seed=run.seed * 1_009 + phase,
    )
    made: list[tuple[str, bool]] = [("", False)] * len(rows)
    prompts: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        ids = encode_turns(loaded, turns[i])
        if _fits(loaded, ids):
            prompts[i] = ids
        else:
            row.why = "conversation too long for the model"
    if not prompts:
        return made
    answers = generate(
        loaded.model,
        list(prompts.values()),
        sampling,
        batch_size=params.batch_size,
        pad_token_id=loaded.pad_id,
        row_ids=[rows[i].index for i in prompts],
    )
    for i, answer in zip(prompts, answers, strict=True):
        text = str(loaded.tokenizer.decode(answer.token_ids, skip_special_tokens=True))
        cut = None if loaded.tokenizer.chat_template else TURN.search(text)
        ended = answer.finish_reason == "stop" or cut is not None
        made[i] = (text[: cut.start()] if cut else text).strip(), ended
    return made


# What makes no pair


def settled(row: Row, text: str, ended: bool, params: ConstitutionParams) -> tuple[str, str | None]:
    """A revision without what the model says before it, and why it makes no pair, if it makes none."""
    text = PREAMBLE.sub("", text).strip()
    if len(text) > 1 and text[0] == text[-1] == '"' and text.count('"') == 2:
        text = text[1:-1].strip()
    why = _unfit("revision", text, ended, params)
    principle = row.principles[-1]
    if why is None and normal(text) == normal(row.draft):
        why = "revision equals the draft"
    if why is None and repeated(text, row.critiques[-1]) > REPEATED:
        why = "revision repeats the critique"
    if why is None and any(normal(r) in normal(text) for r in (principle.critique(), principle.revision())):
        why = "revision repeats the request"
    return text, why


def _unfit(what: str, text: str, ended: bool, params: ConstitutionParams) -> str | None:
    if not text:
        return f"{what} empty"
    if not ended and params.unfinished == "drop":
        return f"{what} unfinished"
    known: dict[str, int] = {}
    words = [known.setdefault(word, len(known)) for word in text.split()]
    if what == "revision" and len(words) >= LONG and distinct_n(words, 4) < DISTINCT:
        return "revision repeats itself"
    return None


def repeated(text: str, of: str) -> float:
    """Share of a text's 4-grams of words that are in another; of a shorter text, whether it is the other."""
    ours, theirs = ([*zip(*(normal(t).split()[i:] for i in range(4)))] for t in (text, of))
    if not ours:
        return float(normal(text) == normal(of))
    return sum(gram in set(theirs) for gram in ours) / len(ours)


def normal(text: str) -> str:
    """A text without case, punctuation and spacing."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def pair_of(row: Row) -> Record:
    """The record of a pair; what the source record holds beside its answers is kept."""
    other = {k: v for k, v in row.record.items() if k not in REPLACED}
    prompt = row.record.get("prompt", row.prompt)

    def side(text: str) -> Any:
        return [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text

    return {
        **other,
        "prompt": prompt,
        "chosen": side(row.revision),
        "rejected": side(row.draft),
        "principle": row.principles[-1].id if row.principles else None,
        "critique": row.critiques[-1] if row.critiques else None,
    }


def _judge(run: Run[ConstitutionParams]) -> Any:
    """Drops rows whose revision a reward model does not prefer; None without one."""
    from tuneutils.shared.reward_model import load_reward_model
    from tuneutils.shared.texts import encode_text, shortened

    params = run.params
    if params.reward_model is None:
        return None
    rm = load_reward_model(
        params.reward_model, run.device, run.dtype, trust_remote_code=params.trust_remote_code
    )

    def judge(rows: list[Row]) -> None:
        going = [row for row in rows if row.why is None]
        texts = [
            shortened(encode_text(row.prompt, side, rm.tokenizer, rm.template), rm.max_length).ids
            for row in going
            for side in ([{"role": "assistant", "content": t}] for t in (row.revision, row.draft))
        ]
        scores = rm.scores(texts, params.batch_size) if texts else []
        for row, better, worse in zip(going, scores[::2], scores[1::2], strict=True):
            if not better > worse:
                row.why = "revision scores no better than the draft"

    return judge
