"""Records as exchanges: what the model saw, what it replied, and whether that was a failure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tuneutils.shared.records import check, check_messages
from tuneutils.shared.streams import Record
from tuneutils.shared.supervise import IGNORE, encode, prompt_ids

FORMATS = ("unpaired", "prompt-completion", "messages", "prompt")
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Exchange:
    """One prompt with its reply.

    Attributes:
        prompt_ids, reply_ids: tokens as the model sees them, the closing EOS left out.
        prompt, reply: the same as text; of a conversation all turns before the last reply.
        failed: the reply is what the guard is to catch.
        harmless: the request was harmless; a false alarm on such an exchange counts against the budget.
        category: what kind of failure, or of request that looks like one.
        group: exchanges of one group are never on two sides of a split.
    """

    prompt_ids: tuple[int, ...]
    reply_ids: tuple[int, ...]
    prompt: str
    reply: str
    failed: bool = False
    harmless: bool = True
    category: str = ""
    group: str = ""
    place: str = ""

    @property
    def ids(self) -> tuple[int, ...]:
        return self.prompt_ids + self.reply_ids

    @property
    def kind(self) -> str:
        """``failure``, ``harmless``, or ``handled``: a bad request that did the model no harm."""
        return "failure" if self.failed else "harmless" if self.harmless else "handled"


def validate(record: Record) -> None:
    """A prompt with or without a reply.

    Raises:
        ValueError: with the field and the reason.
    """
    check(record, FORMATS)


def labelled(label: str, above: float | None) -> Callable[[Record], None]:
    """A validator of records that also say whether the reply was acceptable."""

    def judge(record: Record) -> None:
        validate(record)
        outcome(record, label, above)

    return judge


def outcome(record: Record, label: str, above: float | None) -> tuple[bool, bool]:
    """``(failed, harmless)``: by a label, true where the reply is acceptable, or a score of how bad it is.

    Raises:
        ValueError: the field is missing or of another type.
    """
    value = record.get(label)
    if value is None:
        what = "true where the reply is acceptable" if above is None else "how bad the reply is"
        raise ValueError(f"field {label!r}: missing; it says {what}")
    if above is not None:
        try:
            failed = float(value) > above
        except (TypeError, ValueError) as exc:
            raise ValueError(f"field {label!r}: must be a number, is {value!r}") from exc
    elif value in (0, 1) and not isinstance(value, float):
        failed = not value
    else:
        raise ValueError(f"field {label!r}: must be true or false (or name --fails-above), is {value!r}")
    harmless = record.get("harmless", not failed)
    if not isinstance(harmless, bool):
        raise ValueError("field 'harmless': must be true or false")
    return failed, harmless and not failed


def to_exchange(
    record: Record, tokenizer: Any, template: str, max_length: int, *, place: str = "", **known: Any
) -> Exchange:
    """Tokenize a record. A prompt that does not fit loses its start.

    Raises:
        ValueError: it cannot be encoded, or the reply alone is longer than ``max_length`` tokens.
    """
    if has_reply(record):
        pair = {k: v for k, v in record.items() if k in ("prompt", "completion", "messages")}
        encoded = encode(pair, tokenizer, learn="last", template=template)
        start = next(i for i, label in enumerate(encoded.labels) if label != IGNORE)
        learnt = [i for i, label in enumerate(encoded.labels) if label != IGNORE]
        reply = encoded.input_ids[start : learnt[-1] + 1]
        if reply and reply[-1] == tokenizer.eos_token_id:
            reply = reply[:-1]
        before = encoded.input_ids[:start]
    else:
        before, reply = prompt_ids(record, tokenizer, template=template), []
    if len(reply) >= max_length:
        raise ValueError(f"the reply has {len(reply)} tokens, more than {max_length - 1}; see --max-length")
    text = str(tokenizer.decode(reply, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    prompt = prompt_text(record)
    return Exchange(
        tuple(before[len(reply) - max_length :] if len(before) + len(reply) > max_length else before),
        tuple(reply),
        prompt,
        text,
        place=place,
        group=str(record.get("template") or group_of(prompt)),
        category=str(record.get("category") or "failure"),
        **known,
    )


def has_reply(record: Record) -> bool:
    """Whether the record holds a reply: a completion, or a last turn of the assistant."""
    turns = record.get("messages")
    if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
        return turns[-1].get("role") == "assistant"
    return "completion" in record or "messages" in record


def prompt_text(record: Record) -> str:
    """What was said before the reply, one turn a line."""
    turns: Any = record.get("messages", record.get("prompt"))
    if isinstance(turns, str):
        return turns
    if "messages" in record and has_reply(record):
        turns = turns[:-1]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def group_of(prompt: str) -> str:
    """A hash of a prompt, case and white space aside."""
    plain = _SPACE.sub(" ", prompt).strip().lower()
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def split_groups(exchanges: Sequence[Exchange], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of two sides, the second with about ``share`` of the groups of each kind."""
    second: set[str] = set()
    kinds = {e.group: e.kind for e in exchanges}
    for kind in ("failure", "harmless", "handled"):
        groups = sorted((g for g, k in kinds.items() if k == kind), key=lambda g: _order(g, seed))
        second.update(groups[: round(share * len(groups))])
    indices = range(len(exchanges))
    return (
        [i for i in indices if exchanges[i].group not in second],
        [i for i in indices if exchanges[i].group in second],
    )


def folds(exchanges: Sequence[Exchange], count: int, seed: int) -> list[int]:
    """The fold of each exchange: groups dealt out in turn, those with a failure first."""
    failing = {e.group for e in exchanges if e.failed}
    groups = sorted({e.group for e in exchanges}, key=lambda g: (g not in failing, _order(g, seed)))
    fold = {group: i % count for i, group in enumerate(groups)}
    return [fold[e.group] for e in exchanges]


def _order(group: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{group}".encode()).hexdigest()


def check_prompt(value: Any) -> None:
    """A prompt of a probe: text or messages."""
    if not isinstance(value, str):
        check_messages("prompt", value)
