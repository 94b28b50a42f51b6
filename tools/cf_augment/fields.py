"""The texts of a record, by path, and the record with other texts in their places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tuneutils.shared.records import FORMATS, check
from tuneutils.shared.streams import Record

#: A way to a string inside a record: ``("messages", 0, "content")``.
Path = tuple[str | int, ...]

_TEXT_FIELDS = ("system", "prompt", "completion", "text", "chosen", "rejected", "messages")
_ALLOWED = tuple(name for name in FORMATS if name != "parallel")


def validate(record: Record) -> None:
    """A record with texts that can be rewritten.

    Raises:
        ValueError: with the field and the reason.
    """
    tokens = record.get("tokens")
    if tokens is not None and "text" not in record:
        if not (isinstance(tokens, list) and tokens and all(isinstance(t, str) for t in tokens)):
            raise ValueError("field 'tokens': must be a non-empty list of strings")
        return
    check(record, _ALLOWED)


def texts(record: Record) -> list[tuple[Path, str]]:
    """Every text of a record with its path: whole fields, and the content of messages."""
    return list(_texts(record))


def _texts(record: Record) -> Iterator[tuple[Path, str]]:
    for name in _TEXT_FIELDS:
        value = record.get(name)
        if isinstance(value, str):
            yield (name,), value
        elif isinstance(value, list):
            for k, message in enumerate(value):
                if isinstance(message, Mapping) and isinstance(message.get("content"), str):
                    yield (name, k, "content"), message["content"]


def replaced(record: Record, changes: Mapping[Path, str]) -> Record:
    """A copy of the record with these texts; what is unchanged is shared with the original."""
    made = dict(record)
    for path, text in changes.items():
        if len(path) == 1:
            made[str(path[0])] = text
            continue
        name, k, key = str(path[0]), int(path[1]), str(path[2])
        if made[name] is record[name]:
            made[name] = list(record[name])
        made[name][k] = {**made[name][k], key: text}
    return made


class Moves:
    """Where characters went: from offsets in a text to offsets in its rewriting."""

    def __init__(self, edits: Sequence[tuple[int, int, str]]) -> None:
        self.edits = edits

    def start(self, offset: int) -> int:
        """The new place of a span's first character; inside an edit, the edit's start."""
        shift = 0
        for begin, end, new in self.edits:
            if offset < end:
                return begin + shift if offset > begin else offset + shift
            shift += len(new) - (end - begin)
        return offset + shift

    def stop(self, offset: int) -> int:
        """The new place of a span's exclusive end; inside an edit, the edit's end."""
        shift = 0
        for begin, end, new in self.edits:
            if offset <= begin:
                return offset + shift
            shift += len(new) - (end - begin)
            if offset <= end:
                return end + shift
        return offset + shift


def moved_spans(spans: Any, edits: Mapping[Path, Sequence[tuple[int, int, str]]], made: Record) -> Any:
    """Spans that point at the same things in the rewritten texts.

    A span is ``{"start": 0, "end": 4, ...}`` or ``[0, 4, ...]``, in characters, end exclusive. Its text is
    named by ``field`` (else ``text``, else the first there is) and ``message``, the index of a message; a
    ``text`` of its own is taken anew.

    Raises:
        ValueError: a span that points nowhere.
    """
    if not isinstance(spans, list):
        raise ValueError("spans must be a list")
    return [_moved(span, edits, made) for span in spans]


def _moved(span: Any, edits: Mapping[Path, Sequence[tuple[int, int, str]]], made: Record) -> Any:
    listed = isinstance(span, list)
    begin, end = (span[0], span[1]) if listed and len(span) > 1 else _ends(span)
    path = ("text",) if listed else _path(span, made)
    text = _at(made, path)
    if text is None or not (isinstance(begin, int) and isinstance(end, int) and 0 <= begin <= end):
        raise ValueError(f"span {span!r} points nowhere")
    moves = Moves(edits.get(path, ()))
    new = moves.start(begin), moves.stop(end)
    if new[1] > len(text):
        raise ValueError(f"span {span!r} ends beyond its text")
    if listed:
        return [*new, *span[2:]]
    moved = {**span, "start": new[0], "end": new[1]}
    if isinstance(span.get("text"), str):
        moved["text"] = text[new[0] : new[1]]
    return moved


def _ends(span: Any) -> tuple[Any, Any]:
    return (span.get("start"), span.get("end")) if isinstance(span, Mapping) else (None, None)


def _path(span: Mapping[str, Any], record: Record) -> Path:
    name = span.get("field")
    if name is None:
        name = next((n for n in ("text", *_TEXT_FIELDS) if n in record), "text")
    return (str(name),) if "message" not in span else (str(name), int(span["message"]), "content")


def _at(record: Record, path: Path) -> str | None:
    value: Any = record
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value if isinstance(value, str) else None
