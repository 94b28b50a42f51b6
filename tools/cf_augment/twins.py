"""One record in, its twins out: the axes over all texts of the record together."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from tuneutils.shared.streams import Record
from tuneutils.tools.cf_augment.edits import Edit, Text
from tuneutils.tools.cf_augment.fields import moved_spans, replaced, texts
from tuneutils.tools.cf_augment.outcome import Undecided


class Version(NamedTuple):
    """One way to rewrite the texts of a record: edits by text, and a name to tell it from others."""

    name: str
    edits: list[list[Edit]]


class Axis(Protocol):
    """What is swapped; ``versions`` gives none for texts without a term, or says why there is none."""

    name: str

    def versions(self, found: Sequence[Text], key: bytes, /) -> list[Version | Undecided]: ...


@dataclass
class Twin:
    """A twin, or the reason why there is none."""

    axis: str
    record: Record | None = None
    why: Undecided | None = None
    changes: Counter[str] | None = None


def identity(record: Record) -> str:
    """The record's own id, or one that follows from its content."""
    own = record.get("id")
    if isinstance(own, (str, int)) and not isinstance(own, bool):
        return str(own)
    text = json.dumps(record, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


def twins(
    record: Record, axes: Sequence[Axis], source: str, seed: int, spans: str, *, count: bool = False
) -> Iterator[Twin]:
    """The twins of ``record`` under each axis; nothing for an axis of which it has no term.

    Args:
        source: the record's id.
        spans: the field of spans to move along.
        count: note what changed into what.

    Raises:
        ValueError: the record's spans point nowhere.
    """
    paths, found = _texts(record)
    key = f"{seed}:{source}".encode("utf-8", "surrogatepass")
    for axis in axes:
        for version in axis.versions(found, key):
            if isinstance(version, Undecided):
                yield Twin(axis.name, why=version)
                continue
            try:
                made = _rewritten(record, paths, found, version, spans)
            except Undecided as why:
                yield Twin(axis.name, why=why)
                continue
            made["id"] = f"{source}#{axis.name}{version.name and '-' + version.name}"
            made["twin_of"] = source
            made["twin_axis"] = axis.name
            yield Twin(axis.name, made, changes=_changes(found, version) if count else None)


def _texts(record: Record) -> tuple[list[Any], list[Text]]:
    if "tokens" in record and "text" not in record:
        return [("tokens",)], [Text(" ".join(record["tokens"]))]
    pairs = texts(record)
    return [path for path, _ in pairs], [Text(text) for _, text in pairs]


def _rewritten(
    record: Record, paths: Sequence[Any], found: Sequence[Text], version: Version, spans: str
) -> Record:
    if paths == [("tokens",)]:
        new = found[0].written(version.edits[0]).split(" ")
        if len(new) != len(record["tokens"]):
            raise Undecided("tokens", "a token would become several")
        return {**record, "tokens": new}
    changed = {p: t.written(e) for p, t, e in zip(paths, found, version.edits) if e}
    made = replaced(record, changed)
    if spans in record:
        moves = {p: t.characters(e) for p, t, e in zip(paths, found, version.edits) if e}
        made[spans] = moved_spans(record[spans], moves, made)
    return made


def _changes(found: Sequence[Text], version: Version) -> Counter[str]:
    return Counter(
        f"{' '.join(text.words[e.start : e.end]).lower()} → {e.new.lower()}"
        for text, edits in zip(found, version.edits)
        for e in edits
    )
