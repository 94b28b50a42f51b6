"""From records to token ids and labels: what a causal model is taught, token by token.

Each segment (prompt, completion) is tokenized on its own, as it is when the model is served, so that no
merge crosses the boundary between what is given and what is learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tuneutils.shared.errors import ToolError
from tuneutils.shared.records import format_of
from tuneutils.shared.streams import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
LEARNABLE = ("messages", "prompt-completion", "text", "preference")
LEARN_CHOICES = ("completion", "last", "all")
TEMPLATE_CHOICES = ("auto", "chat", "none")


@dataclass(frozen=True)
class Encoded:
    """One training example: ``input_ids`` and ``labels`` of equal length, labels -100 where not learnt."""

    input_ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def learnt(self) -> int:
        """Tokens that enter the loss; the first token of a sequence is never predicted."""
        return sum(label != IGNORE for label in self.labels[1:])


@dataclass(frozen=True)
class Segment:
    """A piece of an example's text, whether it is learnt, and whether the tokenizer's BOS goes before it."""

    text: str
    learnt: bool
    bos: bool = False


def encode(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    *,
    learn: str = "completion",
    template: str = "auto",
) -> Encoded:
    """Tokenize one record and mark what is learnt, closing EOS included.

    Args:
        record: ``text``, ``prompt``+``completion`` (strings or messages), ``messages``, or a preference,
            of which the chosen answer is learnt.
        max_length: tokens kept, from the start.
        learn: ``completion`` (every assistant turn), ``last`` (the last one only) or ``all`` tokens.
        template: ``auto`` puts string prompts into the tokenizer's chat template if it has one; ``none``
            concatenates them; ``chat`` insists on the template.

    Raises:
        ValueError: the record cannot be encoded; the caller places it.
    """
    kind = format_of(record)
    if kind == "preference":
        return encode(
            {"prompt": record["prompt"], "completion": record["chosen"]},
            tokenizer,
            max_length,
            learn=learn,
            template=template,
        )
    if kind == "text":
        encoded = _encode_text(record["text"], tokenizer)
    elif kind in ("messages", "prompt-completion"):
        encoded = _encode_segments(segments(record, tokenizer, learn=learn, template=template), tokenizer)
    else:
        raise ValueError(f"cannot learn from {kind or 'nameless'} records")
    if learn == "all":
        encoded = replace(encoded, labels=_until_eos(encoded.input_ids, tokenizer.eos_token_id))
    if max_length is not None and len(encoded) > max_length:
        encoded = Encoded(encoded.input_ids[:max_length], encoded.labels[:max_length])
    return encoded


def segments(
    record: Record, tokenizer: PreTrainedTokenizerBase, *, learn: str = "completion", template: str = "auto"
) -> list[Segment]:
    """The record's text in pieces: prompts and completions as the model sees them."""
    messages = as_messages(record, has_template=bool(tokenizer.chat_template), template=template)
    if messages is None:
        completion, eos = record["completion"], str(tokenizer.eos_token)
        closed = completion if completion.endswith(eos) else completion + eos
        return [Segment(record["prompt"], False, bos=True), Segment(closed, True)]
    if not tokenizer.chat_template:
        raise ValueError("is a conversation, and the tokenizer has no chat template")
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not answers:
        raise ValueError("field 'messages': no assistant turn to learn from")
    if learn == "last":
        answers = answers[-1:]
    made: list[Segment] = []
    done = ""
    for i in answers:
        before = _render(tokenizer, messages[:i], add_generation_prompt=True)
        through = _render(tokenizer, messages[: i + 1], add_generation_prompt=False)
        if not (before.startswith(done) and through.startswith(before)):
            raise ValueError("the chat template changes earlier turns, so its prompts cannot be told apart")
        made += [Segment(before[len(done) :], False), Segment(through[len(before) :], True)]
        done = through
    return made


def as_messages(record: Record, *, has_template: bool, template: str) -> list[dict[str, Any]] | None:
    """The record as chat messages, or None when its strings are to be concatenated as they are."""
    if "messages" in record:
        return list(record["messages"])
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        answer = (
            completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        )
        return [*turns, *answer]
    if template == "none" or (template == "auto" and not has_template):
        return None
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def prompt_ids(record: Record, tokenizer: PreTrainedTokenizerBase, *, template: str = "auto") -> list[int]:
    """Token ids of a record's prompt as the model is served: up to where its last answer begins."""
    probe = dict(record)
    if "messages" in probe and probe["messages"][-1]["role"] != "assistant":
        probe["messages"] = [*probe["messages"], {"role": "assistant", "content": "."}]
    elif "messages" not in probe:
        probe.setdefault("completion", ".")
    pieces = segments(probe, tokenizer, learn="last", template=template)[:-1]
    return _encode_segments(pieces, tokenizer).input_ids


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    import jinja2

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))
    except jinja2.TemplateError as exc:
        raise ValueError(f"the chat template refuses it: {exc}") from exc


def _encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    ids = list(tokenizer(text).input_ids)
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    return Encoded(ids, list(ids))


def _encode_segments(pieces: Sequence[Segment], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    ids: list[int] = []
    labels: list[int] = []
    for piece in pieces:
        new = list(tokenizer(piece.text, add_special_tokens=False).input_ids)
        if piece.bos and not piece.text.startswith(str(tokenizer.bos_token)):
            new = _leading_special_ids(tokenizer) + new
        ids += new
        labels += _until_eos(new, tokenizer.eos_token_id) if piece.learnt else [IGNORE] * len(new)
    return Encoded(ids, labels)


def _leading_special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text, such as BOS; a chat template writes its own instead."""
    probe = "a"
    with_special = list(tokenizer(probe).input_ids)
    plain = list(tokenizer(probe, add_special_tokens=False).input_ids)
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    raise ToolError("the tokenizer changes a text when it adds its special tokens")


def _until_eos(ids: list[int], eos: int | None) -> list[int]:
    """Labels of a completion: all through its last EOS; what a template adds after it is not learnt."""
    if eos not in ids:
        return list(ids)
    end = len(ids) - ids[::-1].index(eos)
    return ids[:end] + [IGNORE] * (len(ids) - end)


def windows(encoded: Encoded, max_length: int) -> list[Encoded]:
    """A long text in pieces of at most ``max_length`` tokens, in each of which all but the first are learnt.

    A piece starts with the last token of the one before, so every token but the text's first is learnt once.
    """
    starts = range(0, len(encoded) - 1, max_length - 1)
    return [
        Encoded(encoded.input_ids[s : s + max_length], encoded.labels[s : s + max_length]) for s in starts
    ]


def teaches_eos(encoded: Encoded, eos: int) -> bool:
    """Whether the last learnt token is EOS, so that the model learns to stop."""
    learnt = [label for label in encoded.labels if label != IGNORE]
    return bool(learnt) and learnt[-1] == eos


def check_eos(examples: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, truncated: int) -> None:
    """The gate before training: padding is not EOS, and the examples teach the model to stop.

    Args:
        truncated: examples whose end was cut off on the user's word; those need no EOS.
    """
    eos = tokenizer.eos_token_id
    if tokenizer.pad_token_id == eos:
        raise ToolError("the pad token is the EOS token, so EOS would be masked and the model never stop")
    without = sum(not teaches_eos(e, eos) for e in examples)
    if without > truncated:
        raise ToolError(
            f"{without - truncated} of {len(examples)} examples do not end in EOS ({tokenizer.eos_token!r}), "
            "so the model would not learn to stop; the chat template must close an answer with it "
            "(see --show-labels 1)"
        )


def show_labels(encoded: Encoded, tokenizer: PreTrainedTokenizerBase, *, color: bool) -> str:
    """The example's tokens, those learnt in green (or in [brackets] without colour), the others dim."""
    out = []
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        text = str(tokenizer.decode([token]))
        if not color:
            out.append(f"[{text}]" if label != IGNORE else text)
        else:
            out.append(f"\x1b[32m{text}\x1b[0m" if label != IGNORE else f"\x1b[2m{text}\x1b[0m")
    return "".join(out)
