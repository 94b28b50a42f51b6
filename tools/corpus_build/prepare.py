"""What is done to each document by itself, in any process: a task's files in, a part of the spool out.

Texts go to files; what stays in memory of a document is its digest, twelve band keys and a few offsets.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from tuneutils.shared import pii
from tuneutils.shared.neardup import BANDS, SIZE, band_keys
from tuneutils.shared.records import check, dump_line, parse_line
from tuneutils.shared.streams import Record, open_binary, plain_row, raw_lines
from tuneutils.tools.corpus_build import clean, contamination, dsir, rules
from tuneutils.tools.corpus_build.contamination import strings
from tuneutils.tools.corpus_build.extract import Unreadable, cut, kind_of, read_limited, text_of
from tuneutils.tools.corpus_build.find import Item, lines_before, spdx
from tuneutils.tools.corpus_build.tokens import Index, Tokens, shingles, tokenize

BATCH_CHARACTERS = 1 << 19
LINE_BYTES = 64 << 20
_TAKEN = {"text", "prompt", "completion", "messages", "license", "id"}
TEXTUAL = ("text", "prompt-completion", "messages")


@dataclass(frozen=True)
class Settings:
    """What a worker needs to know.

    Attributes:
        spool: folder for the parts; on a cluster one that all machines share.
        features: whether selection will need n-gram buckets, and by which hash.
    """

    spool: str
    rules: tuple[str, ...]
    languages: tuple[str, ...]
    language_score: float
    identify: bool
    mask: tuple[str, ...]
    text_field: str
    min_characters: int
    max_file_bytes: int
    cut_bytes: int
    licence: str | None
    near: bool
    features: str | None


@dataclass
class Document:
    """A text on its way, with where it comes from."""

    text: str
    record: Record
    group: str

    def dropped(self, reason: str) -> Record:
        place = {k: self.record[k] for k in ("path", "offset", "part", "sha256") if k in self.record}
        return {**place, "reason": reason, "characters": len(self.text), "begins": self.text[:100]}


@dataclass(frozen=True)
class BadLine:
    """A line that is no record, for the main process to judge by ``--on-error``."""

    shown: str
    number: int
    reason: str
    raw: bytes


@dataclass
class Part:
    """One task's documents. Lists have one entry a document, bounds one more."""

    number: int
    digests: list[bytes] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    lines: list[int] = field(default_factory=lambda: [0])
    keys: Any = None
    words: Any = None
    features: Any = None
    read: int = 0
    read_bytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_bytes: Counter[str] = field(default_factory=Counter)
    removed_lines: Counter[str] = field(default_factory=Counter)
    masked: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    recoded: list[str] = field(default_factory=list)
    unreadable: list[dict[str, str]] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)


def prepare(number: int, task: Sequence[Item], settings: Settings) -> Part:
    """Read, clean, judge and fingerprint a task's documents."""
    with _Worker(Part(number), settings) as worker:
        for item in task:
            for document in worker.documents(item):
                worker.take(document)
        worker.flush()
        return worker.part


class _Worker:
    def __init__(self, part: Part, settings: Settings) -> None:
        self.part, self.settings = part, settings
        self.batch: list[Document] = []
        self.characters = 0
        self.grams = contamination.load(Path(settings.spool))
        self.featurizer = _featurizer(settings.features) if settings.features else None
        self.bounds: dict[str, list[Index]] = {"words": [], "features": []}
        self.filled = {"words": 0, "features": 0}
        self.keys: list[np.ndarray] = []
        self.files: dict[str, IO[bytes]] = {}

    def __enter__(self) -> _Worker:
        stem = Path(self.settings.spool) / f"{self.part.number:06d}"
        for name in ("jsonl", "words", "features", "dropped"):
            self.files[name] = open(f"{stem}.{name}", "wb")
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self.files.values():
            stream.close()
        zero = np.zeros(1, np.int64)
        self.part.words = np.concatenate([zero, *self.bounds["words"]])
        self.part.features = np.concatenate([zero, *self.bounds["features"]])
        self.part.keys = np.concatenate([np.zeros((0, BANDS), np.uint64), *self.keys])

    def documents(self, item: Item) -> Iterator[Document]:
        if item.records:
            self.part.kinds["records"] += 1
            yield from self._of_records(item)
            return
        try:
            data = self._bytes(item)
            kind = kind_of(item.path, data[:8192])
            text, clean_encoding = text_of(kind, data)
        except Unreadable as exc:
            self.part.unreadable.append({"path": item.shown, "reason": str(exc)})
            return
        self.part.kinds[kind] += 1
        if not clean_encoding:
            self.part.recoded.append(item.shown)
        provenance = {
            "path": item.shown,
            "offset": item.start,
            "sha256": hashlib.sha256(data).hexdigest(),
            "licence": spdx(text[:4000]) or item.licence or self.settings.licence,
        }
        pieces = list(cut(text, self.settings.cut_bytes))
        for i, piece in enumerate(pieces):
            part = {"part": i} if len(pieces) > 1 else {}
            yield Document(piece, {**provenance, **part}, item.shown)

    def _bytes(self, item: Item) -> bytes:
        if item.end is None:
            return read_limited(Path(item.path), self.settings.max_file_bytes)
        try:
            with open(item.path, "rb") as stream:
                stream.seek(item.start)
                return stream.read(item.end - item.start)
        except OSError as exc:
            raise Unreadable("cannot be read") from exc

    def _of_records(self, item: Item) -> Iterator[Document]:
        name = self.settings.text_field
        for start, number, raw in _lines(item, self.part):
            try:
                record = plain_row(raw) if isinstance(raw, dict) else parse_line(raw)
                text = record_text(record, name)
            except ValueError as exc:
                line = dump_line(raw) if isinstance(raw, dict) else raw
                number = number if item.end is None else lines_before(item.path, start) + 1
                self.part.bad.append(BadLine(item.shown, number, str(exc), line))
                continue
            line = dump_line(raw) if isinstance(raw, dict) else raw
            said = record.get("licence") or record.get("license")
            provenance = {
                "path": item.shown,
                "offset": start,
                "sha256": hashlib.sha256(line).hexdigest(),
                "licence": (said if isinstance(said, str) else None) or item.licence or self.settings.licence,
            }
            kept = {k: v for k, v in record.items() if k not in _TAKEN and k != name}
            yield Document(text, {**kept, **provenance}, f"{item.shown}:{start}:{number}")

    def take(self, document: Document) -> None:
        part, settings = self.part, self.settings
        part.read += 1
        part.read_bytes += len(document.text)
        text = clean.repair(document.text)
        text, removed = rules.clean_lines(text, settings.rules)
        part.removed_lines.update(removed)
        document.text = text
        if len(text) < settings.min_characters or not text.strip():
            return self._drop(document, "too short" if text.strip() else "empty")
        if settings.identify:
            code, score = clean.language(text)
            part.languages[code] += 1
            document.record["lang"] = code
            if settings.languages and (code not in settings.languages or score < settings.language_score):
                return self._drop(document, "language")
        if settings.mask:
            document.text, masked = pii.mask(text, settings.mask)
            if masked:
                part.masked.update(masked)
                document.record["masked"] = dict(sorted(masked.items()))
        self.batch.append(document)
        self.characters += len(text)
        if self.characters >= BATCH_CHARACTERS:
            self.flush()
        return None

    def _drop(self, document: Document, reason: str) -> None:
        self.part.dropped[reason] += 1
        self.part.dropped_bytes[reason] += len(document.text)
        self.files["dropped"].write(dump_line(document.dropped(reason)))

    def flush(self) -> None:
        """Judge and write the batch."""
        batch, self.batch, self.characters = self.batch, [], 0
        kept = []
        broken = rules.broken_rules([d.text for d in batch], self.settings.rules)
        for document, reason in zip(batch, broken, strict=True):
            if reason is None:
                kept.append(document)
            else:
                self._drop(document, reason)
        tokens = tokenize([d.text for d in kept])
        if self.grams:
            hit = contamination.contaminated(tokens.words(), self.grams)
            for document in (d for d, bad in zip(kept, hit, strict=True) if bad):
                self._drop(document, "contaminated")
            kept = [d for d, bad in zip(kept, hit, strict=True) if not bad]
            tokens = tokenize([d.text for d in kept]) if hit.any() else tokens
        if kept:
            self._write(kept, tokens)

    def _write(self, kept: Sequence[Document], tokens: Tokens) -> None:
        part = self.part
        words = tokens.words()
        self._spool("words", words.hashes, words.bounds)
        if self.featurizer is not None:
            self._spool("features", *self.featurizer([d.text for d in kept], tokens))
        if self.settings.near:
            self.keys.append(band_keys(*shingles(words, SIZE)))
        for document in kept:
            digest = hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).digest()
            record = {"text": document.text, "id": digest[:8].hex(), **document.record}
            part.lines.append(part.lines[-1] + self.files["jsonl"].write(dump_line(record)))
            part.digests.append(digest[:16])
            part.sizes.append(len(document.text))
            part.groups.append(
                int.from_bytes(
                    hashlib.sha256(document.group.encode("utf-8", "surrogateescape")).digest()[:8], "big"
                )
            )

    def _spool(self, name: str, values: np.ndarray, bounds: Index) -> None:
        self.files[name].write(values.tobytes())
        self.bounds[name].append(bounds[1:] + self.filled[name])
        self.filled[name] += len(values)


def record_text(record: Record, name: str) -> str:
    """The text of a record: its field ``name``, or prompt and completion, or all messages.

    Raises:
        ValueError: it has none of them, or not as text.
    """
    if name in record or name != "text":
        text = record.get(name)
        if not isinstance(text, str):
            raise ValueError(f"field {name!r}: must be a string; --text-field names another")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as exc:
            raise ValueError(f"field {name!r}: lone surrogate at character {exc.start + 1}") from exc
        return text
    format_ = check(record, TEXTUAL)
    if format_ == "messages":
        return "\n\n".join(message["content"] for message in record["messages"])
    return "\n".join(strings([record["prompt"], record["completion"]]))


def _lines(item: Item, part: Part) -> Iterator[tuple[int, int, Any]]:
    """Offset, number within the stretch, and content of each line; Parquet rows come as records."""
    if item.path.endswith(".parquet"):
        for number, row in raw_lines(item.path):
            yield 0, number, row
        return
    with open_binary(item.path) as stream:
        if item.start:
            stream.seek(item.start)
        at, number = item.start, 0
        try:
            while item.end is None or at < item.end:
                line = stream.readline(LINE_BYTES)
                if not line:
                    break
                number += 1
                if len(line) == LINE_BYTES:
                    part.unreadable.append(
                        {"path": item.shown, "reason": f"a line of over {LINE_BYTES >> 20} MiB"}
                    )
                    return
                content = line.removeprefix(b"\xef\xbb\xbf") if at == 0 else line
                if content.strip():
                    yield at, number, content.rstrip(b"\r\n")
                at += len(line)
        except (EOFError, OSError) as exc:
            part.unreadable.append({"path": item.shown, "reason": f"damaged compression ({exc})"})


@cache
def _featurizer(hash_with: str) -> dsir.Featurizer:
    return dsir.Featurizer(hash_with)
