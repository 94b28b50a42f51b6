"""What is learnt from: pairs, or single answers labelled good or bad, encoded and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tuneutils.shared.command import Run
from tuneutils.shared.errors import ToolError
from tuneutils.shared.pairs import Pair, prompt_key, read_pairs
from tuneutils.shared.pairs import validate as validate_pair
from tuneutils.shared.record_source import Source
from tuneutils.shared.records import Located, check, check_messages, format_of
from tuneutils.shared.streams import Record
from tuneutils.shared.texts import Text, encode_text, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Single:
    """One answer with its label.

    Attributes:
        key: of the prompt, to tell prompts apart.
    """

    place: str
    key: str
    text: Text
    desirable: bool

    @property
    def length(self) -> int:
        return len(self.text.ids)


@dataclass
class Examples:
    """Encoded records of either kind, with what happened on the way."""

    pairs: list[Pair] = field(default_factory=list)
    singles: list[Single] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0
    refused: int = 0


def validate(record: Record) -> None:
    """A preference."""
    if format_of(record) == "unpaired":
        raise ValueError("has a label rather than chosen and rejected; --loss kto learns from labels")
    validate_pair(record)


def validate_kto(record: Record) -> None:
    """A preference, or an answer with its label."""
    if "chosen" in record:
        validate_pair(record)
        return
    prompt = record.get("prompt", "")
    if not isinstance(prompt, str):
        check_messages("prompt", prompt)
    if "label" not in record and "completion" in record:
        raise ValueError("field 'label': is missing; KTO needs true (good) or false (bad)")
    check(record, ("preference", "unpaired"))


def read(
    run: Run[Any], source: Source, tokenizer: PreTrainedTokenizerBase, *, template: str, limit: int
) -> Examples:
    """Encode a source's records: preferences as pairs, labelled answers as singles.

    Raises:
        ToolError: exit 65 with file and line of what is wrong, unless ``--on-error`` says otherwise.
    """
    located = list(source.located)
    labelled = [item for item in located if "chosen" not in item.record]
    made = Examples()
    if len(labelled) < len(located):
        only = replace(source, located=[item for item in located if "chosen" in item.record])
        found = read_pairs(run, only, tokenizer, template=template, limit=limit, accept=_accept)
        made = Examples(found.pairs, [], found.truncated, found.dropped)
    for item in labelled:
        try:
            _add_single(run, made, item, tokenizer, template, limit)
        except ValueError as exc:
            source.reader.refuse(item, str(exc))
    made.refused = source.reader.stats.refused
    if not made.pairs and not made.singles:
        raise ToolError(
            f"{', '.join(source.reader.paths)}: no record left "
            f"({made.refused} refused, {made.dropped} too long)"
        )
    return made


def _accept(texts: Sequence[Text]) -> None:
    """A pair of one prompt; a template may make two of it, and log-probabilities would then not compare."""
    chosen, rejected = texts
    if chosen.ids[: chosen.prompt] != rejected.ids[: rejected.prompt]:
        raise ValueError("the chat template gives chosen and rejected different prompts; try --template none")
    _need_prompt(chosen)


def _need_prompt(text: Text) -> None:
    if not text.prompt:
        raise ValueError("the prompt has no token, so the first of the answer has no probability")


def _add_single(
    run: Run[Any], made: Examples, item: Located, tokenizer: Any, template: str, limit: int
) -> None:
    record = item.record
    text = encode_text(record["prompt"], record["completion"], tokenizer, template)
    _need_prompt(text)
    if len(text.ids) > limit:
        if run.params.too_long == "drop":
            made.dropped += 1
            return
        if run.params.too_long == "error":
            raise ValueError(
                f"has {len(text.ids)} tokens, more than {limit} (--too-long truncate or drop lets it pass)"
            )
        text = shortened(text, limit)
        made.truncated += 1
    key = prompt_key(record["prompt"])
    made.singles.append(Single(item.place, key, text, bool(record["label"])))


def as_singles(examples: Examples) -> list[Single]:
    """Labelled answers: those that came so, and of each pair chosen as good and rejected as bad.

    Raises:
        ToolError: exit 65: all have one label.
    """
    made = list(examples.singles)
    for pair in examples.pairs:
        made.append(Single(pair.place, pair.key, pair.chosen, True))
        made.append(Single(pair.place, pair.key, pair.rejected, False))
    if len({one.desirable for one in made}) == 1:
        word = "true" if made[0].desirable else "false"
        raise ToolError(
            f"all {len(made)} answers are labelled {word}; KTO needs good and bad ones "
            "(lora-tune learns from good ones alone)"
        )
    return made


def mismatched(singles: Sequence[Single], seed: int, limit: int) -> list[Text]:
    """Each example's prompt with the completion of another, on which KTO's z₀ is measured.

    Every completion is used once. Prompts are put in a random order, those of one prompt side by side, and
    completions moved on by the largest group: then no prompt keeps an answer of its own, unless one prompt
    has more than half of all. What is over ``limit`` tokens is cut at the end.
    """
    groups: dict[str, list[int]] = {}
    for i, one in enumerate(singles):
        groups.setdefault(one.key, []).append(i)
    keys = sorted(groups)
    shuffled = np.random.default_rng((seed, 1)).permutation(len(keys))
    order = [i for k in shuffled for i in groups[keys[k]]]
    shift = max(map(len, groups.values()))
    made: list[Text | None] = [None] * len(singles)
    for place, i in enumerate(order):
        own, other = singles[i].text, singles[order[(place + shift) % len(order)]].text
        ids = [*own.ids[: own.prompt], *other.ids[other.prompt :]]
        made[i] = Text(ids[:limit], own.prompt)
    return [text for text in made if text is not None]
