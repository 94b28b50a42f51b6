"""One record in two tokenizations, with the places at which both have read the same text.

There both models predict what comes next after the same characters, so that their distributions can be
compared (Boizard et al. 2024, arXiv 2402.12030, who cut the longer sequence instead).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

from tuneutils.shared.records import format_of
from tuneutils.shared.streams import Record
from tuneutils.shared.supervise import IGNORE, Encoded, segments
from tuneutils.tools.distill.params import Params


@dataclass(frozen=True)
class _Read:
    """A tokenization: ids, and (segment, characters read) → the last token by which they are read."""

    ids: list[int]
    places: dict[tuple[int, int], int]


def align(
    record: Record, student: Any, teacher: Any, params: Params, limit: int
) -> list[tuple[Encoded, Encoded]]:
    """Student's and teacher's example, with as many labels; a text over ``limit`` student tokens is split.

    Raises:
        ValueError: there is no common place.
    """
    pieces = [record]
    if format_of(record) == "text":
        spans = _offsets(student, record["text"])
        starts = range(0, len(spans), limit - 2)
        cuts = [spans[s][0] for s in starts] + [len(record["text"])]
        pieces = [{"text": record["text"][a:b]} for a, b in pairwise(cuts) if b > a]
    made = [pair for piece in pieces if (pair := _pair(piece, student, teacher, params, limit)) is not None]
    if not made:
        raise ValueError("the two tokenizers have no place of it in common")
    return made


def _pair(
    record: Record, student: Any, teacher: Any, params: Params, limit: int
) -> tuple[Encoded, Encoded] | None:
    ours, theirs = (_segments(record, t, params) for t in (student, teacher))
    common = [
        _common(a[0], b[0]) if a[1] and b[1] else -1
        for a, b in zip(ours, theirs)  # a template may close a conversation with a segment more
    ]
    ours_read, theirs_read = _read(student, ours, common), _read(teacher, theirs, common)
    ends = [
        (ours_read.places[key], theirs_read.places[key])
        for key in sorted(ours_read.places.keys() & theirs_read.places.keys())
    ]
    ends = [
        (a, b) for a, b in ends if a + 1 < min(len(ours_read.ids), limit) and b + 1 < len(theirs_read.ids)
    ]
    if not ends:
        return None
    return _labelled(ours_read.ids[:limit], [a for a, _ in ends]), _labelled(
        theirs_read.ids[: max(b for _, b in ends) + 2], [b for _, b in ends]
    )


def _common(one: str, other: str) -> int:
    """Characters that two texts have in common from their start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other)))


def _segments(record: Record, tokenizer: Any, params: Params) -> list[tuple[str, bool, bool]]:
    """Text, whether it is learnt, and whether the tokenizer's own special tokens go before it."""
    if format_of(record) == "text":
        return [(record["text"] + str(tokenizer.eos_token), True, True)]
    found = segments(record, tokenizer, learn=params.learn, template=params.template)
    return [(s.text, s.learnt or params.learn == "all", s.bos) for s in found]


def _read(tokenizer: Any, pieces: Sequence[tuple[str, bool, bool]], common: Sequence[int]) -> _Read:
    """Tokens of all segments; places in those that are learnt, up to where both tokenizers' texts agree."""
    ids: list[int] = []
    places: dict[tuple[int, int], int] = {}
    for number, (text, _, bos) in enumerate(pieces):
        if bos and tokenizer.bos_token_id is not None and not text.startswith(str(tokenizer.bos_token)):
            ids.append(tokenizer.bos_token_id)
        given = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        limit = common[number] if number < len(common) else -1
        if ids and limit >= 0:
            places[(number, 0)] = len(ids) - 1
        starts = [start for start, _ in given.offset_mapping[1:]] + [len(text)]
        for token, (_, end), following in zip(given.input_ids, given.offset_mapping, starts, strict=True):
            ids.append(token)
            if 0 < end <= min(limit, following):  # a token that starts before has the rest of a character
                places[(number, end)] = len(ids) - 1
    return _Read(ids, places)


def _offsets(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("its tokenizer tells no offsets; uld needs a fast tokenizer")
    return list(tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping)


def _labelled(ids: list[int], ends: Sequence[int]) -> Encoded:
    """Labels on the tokens that follow the common places."""
    labels = [IGNORE] * len(ids)
    for end in ends:
        labels[end + 1] = ids[end + 1]
    return Encoded(ids, labels)
