"""Preference records as pairs of encoded texts, checked against each other and split by prompt."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tuneutils.shared.command import Run
from tuneutils.shared.errors import ToolError
from tuneutils.shared.record_source import Source
from tuneutils.shared.records import Located, check, check_messages
from tuneutils.shared.streams import Record
from tuneutils.shared.texts import Text, encode_text, shortened, split_implicit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMATS = ("preference", "implicit-preference")
#: Rows that an error names.
NAMED = 8


@dataclass(frozen=True)
class Pair:
    """One comparison.

    Attributes:
        key: of the prompt, to tell prompts apart.
        margin: by which the scores should differ.
        target: the probability that ``chosen`` is preferred.
        votes: the raters' values, positive towards ``chosen``; empty where unknown.
        has_share: whether ``target`` was measured by votes.
        group: the value of ``--by``'s field.
    """

    place: str
    key: str
    chosen: Text
    rejected: Text
    margin: float = 0.0
    target: float = 1.0
    votes: tuple[float, ...] = ()
    has_share: bool = False
    group: str | None = None

    @property
    def length(self) -> int:
        return max(len(self.chosen.ids), len(self.rejected.ids))


@dataclass
class Pairs:
    """Encoded pairs, with what happened on the way."""

    pairs: list[Pair] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0
    refused: int = 0

    @property
    def tokens(self) -> int:
        return sum(len(p.chosen.ids) + len(p.rejected.ids) for p in self.pairs)


def validate(record: Record) -> None:
    """A preference record whose fields have the right types.

    Raises:
        ValueError: with the field and the reason.
    """
    prompt = record.get("prompt", "")
    if not isinstance(prompt, str):
        check_messages("prompt", prompt)
    check(record, FORMATS)
    if "prompt" in record and isinstance(record["chosen"], str) != isinstance(record["rejected"], str):
        raise ValueError("chosen and rejected are not both strings or both messages")
    _margin(record)
    _target(record)


def read_pairs(
    run: Run[Any],
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    limit: int,
    accept: Callable[[Sequence[Text]], None] | None = None,
) -> Pairs:
    """Encode every pair of a source.

    Args:
        limit: tokens that a text may have; ``run.params.too_long`` says what happens to a longer one.
        accept: raises ValueError for an encoded pair that the tool cannot use.

    Raises:
        ToolError: exit 65 with file and line of what is wrong, unless ``--on-error`` says otherwise.
    """
    sound = _consistent(run, source)
    made = Pairs()
    for item, (prompt, chosen, rejected) in sound:
        try:
            texts = [encode_text(prompt, side, tokenizer, template) for side in (chosen, rejected)]
            if texts[0].ids == texts[1].ids:
                raise ValueError("chosen and rejected are the same tokens")
            if accept is not None:
                accept(texts)
            if max(len(t.ids) for t in texts) > limit:
                if run.params.too_long == "drop":
                    made.dropped += 1
                    continue
                if run.params.too_long == "error":
                    longest = max(len(t.ids) for t in texts)
                    raise ValueError(
                        f"has {longest} tokens, more than {limit} (--too-long truncate or drop lets it pass)"
                    )
                over = max(len(t.ids) for t in texts) - limit
                texts = [shortened(t, len(t.ids) - over) for t in texts]  # both keep one prompt
                made.truncated += 1
        except ValueError as exc:
            source.reader.refuse(item, str(exc))
            continue
        made.pairs.append(_pair(item, prompt_key(prompt), texts, getattr(run.params, "by", None)))
    made.refused = source.reader.stats.refused
    if not made.pairs:
        raise ToolError(
            f"{', '.join(source.reader.paths)}: no pair left "
            f"({made.refused} refused, {made.dropped} too long)"
        )
    for count, what in (
        (made.refused, "bad records left out"),
        (made.truncated, f"prompts cut at the start to fit {limit} tokens"),
        (made.dropped, f"pairs over {limit} tokens dropped"),
    ):
        if count:
            run.log.warning("%d %s", count, what)
    return made


def _pair(item: Located, key: str, texts: Sequence[Text], by: str | None) -> Pair:
    record = item.record
    target = _target(record)
    return Pair(
        place=item.place,
        key=key,
        chosen=texts[0],
        rejected=texts[1],
        margin=_margin(record),
        target=1.0 if target is None else target,
        votes=tuple(float(v["value"]) for v in record.get("votes") or () if not v.get("both_bad")),
        has_share=target is not None,
        group=None if by is None else str(record.get(by)),
    )


def _margin(record: Record) -> float:
    value = record.get("margin")
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("field 'margin': must be a number or null")
    return float(value)


def _target(record: Record) -> float | None:
    """The share of votes for ``chosen``: ``strength``, else counted; None where nothing is known of it."""
    share = record.get("strength")
    if share is not None:
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ValueError("field 'strength': must be a number from 0 to 1, or null")
        return float(share)
    votes = record.get("votes")
    if votes is None:
        return None
    if not isinstance(votes, list):
        raise ValueError("field 'votes': must be a list")
    values = []
    for i, vote in enumerate(votes):
        value = vote.get("value") if isinstance(vote, dict) else None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"field votes[{i}].value: must be a number, positive towards chosen")
        values.append(1.0 if value > 0 else 0.5 if value == 0 else 0.0)
    return sum(values) / len(values) if values else None


# What is wrong with a data set rather than with a record.


def _consistent(run: Run[Any], source: Source) -> list[tuple[Located, tuple[Any, Any, Any]]]:
    """The records with their prompt, chosen and rejected, without those that contradict each other.

    Raises:
        ToolError: exit 65, naming the rows, where ``--on-error`` is ``stop``.
    """
    found: list[tuple[Located, tuple[Any, Any, Any]]] = []
    for item in source.located:
        try:
            found.append((item, _sides(item.record)))
        except ValueError as exc:
            source.reader.refuse(item, str(exc))
    equal = [i for i, (_, (_, chosen, rejected)) in enumerate(found) if _same(chosen, rejected)]
    swapped = _swapped(found)
    if not equal and not swapped:
        return found
    if run.on_error == "stop":
        raise ToolError("; ".join(_said(found, equal, swapped)))
    for i in equal:
        source.reader.refuse(found[i][0], "chosen and rejected are equal")
    for i, j in swapped.items():
        source.reader.refuse(found[i][0], f"chosen and rejected are swapped; compare {found[j][0].place}")
    bad = {*equal, *swapped}
    return [x for i, x in enumerate(found) if i not in bad]


def _sides(record: Record) -> tuple[Any, Any, Any]:
    if "prompt" in record:
        return record["prompt"], record["chosen"], record["rejected"]
    return split_implicit(record["chosen"], record["rejected"])


def _same(chosen: Any, rejected: Any) -> bool:
    return canonical(chosen) == canonical(rejected)


def _swapped(found: Sequence[tuple[Located, tuple[Any, Any, Any]]]) -> dict[int, int]:
    """Rows that say of two completions what another row says the other way round → that other row.

    Raters may disagree: rows that both come with votes or a strength are left alone.
    """
    first: dict[tuple[str, str, str], int] = {}
    bad: dict[int, int] = {}
    for i, (item, (prompt, chosen, rejected)) in enumerate(found):
        key, one, other = prompt_key(prompt), canonical(chosen), canonical(rejected)
        first.setdefault((key, one, other), i)
        j = first.get((key, other, one))
        if j is not None and one != other and not (_is_voted(item.record) and _is_voted(found[j][0].record)):
            bad[i] = j
            bad.setdefault(j, i)
    return bad


def _is_voted(record: Record) -> bool:
    return bool(record.get("votes")) or record.get("strength") is not None


def _said(found: Sequence[tuple[Located, Any]], equal: Sequence[int], swapped: dict[int, int]) -> list[str]:
    said = []
    if equal:
        places = [found[i][0].place for i in equal]
        said.append(f"{_listed(places)}: chosen and rejected are equal")
    if swapped:
        places = [f"{found[i][0].place} and {found[j][0].place}" for i, j in swapped.items() if i < j]
        places = places or [f"{found[i][0].place} and {found[j][0].place}" for i, j in swapped.items()]
        said.append(
            f"{_listed(places)}: chosen and rejected are swapped, and no votes say why "
            "(--on-error skip leaves such rows out)"
        )
    return said


def _listed(places: Sequence[str]) -> str:
    more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
    return ", ".join(places[:NAMED]) + more


# Prompts, and the sides that they fall on.


def canonical(value: Any) -> str:
    """A text as one string: one user's message and its plain string are the same."""
    if isinstance(value, str):
        return value.strip()
    if len(value) == 1 and value[0]["role"] in ("user", "assistant"):
        return str(value[0]["content"]).strip()
    return json.dumps([[m["role"], m["content"]] for m in value], ensure_ascii=False)


def prompt_key(prompt: Any) -> str:
    """What tells prompts apart: equal for equal prompts, as string or as messages."""
    return hashlib.sha256(canonical(prompt).encode()).hexdigest()[:16]


def split(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs: a share of the prompts is held out, by a hash of prompt and seed.

    At least one prompt is on each side where there are two.
    """
    keys = sorted({p.key for p in pairs}, key=lambda key: _point(seed, key))
    if share == 0 or len(keys) < 2:
        return list(pairs), []
    count = sum(_point(seed, key) < share for key in keys)
    held = set(keys[: min(max(count, 1), len(keys) - 1)])
    return [p for p in pairs if p.key not in held], [p for p in pairs if p.key in held]


def _point(seed: int, key: str) -> float:
    digest = hashlib.sha256(f"rm-train\x1f{seed}\x1f{key}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64
