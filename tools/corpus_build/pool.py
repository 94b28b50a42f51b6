"""The documents that passed by themselves, as one: texts and hashes on disk, some numbers in memory."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tuneutils.shared.neardup import SIZE, near_duplicates
from tuneutils.shared.records import dump_line
from tuneutils.shared.streams import Record
from tuneutils.tools.corpus_build.prepare import Part
from tuneutils.tools.corpus_build.substrings import repeated_spans, without
from tuneutils.tools.corpus_build.tokens import U64, Index, tokenize, window_hashes

SPOOLED = ("jsonl", "words", "features", "dropped")


class Pool:
    """The documents of all parts, in order.

    Attributes:
        alive: ``(n,)`` whether each is still in.
        words, features: mapped files; those of document i lie between bounds i and i + 1.
        changed: texts that differ from the spooled ones.
        dropped, dropped_bytes: counts and characters by reason, of all stages.
    """

    def __init__(self, spool: Path, parts: Iterable[Part]) -> None:
        self.spool = spool
        self.dropped: Counter[str] = Counter()
        self.dropped_bytes: Counter[str] = Counter()
        self.removed_lines: Counter[str] = Counter()
        self.masked: Counter[str] = Counter()
        self.languages: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.recoded: list[str] = []
        self.unreadable: list[dict[str, str]] = []
        self.read = self.read_bytes = self.cut_characters = 0
        self.changed: dict[int, str] = {}
        self.digests: list[bytes] = []
        columns: dict[str, list[NDArray[np.generic]]] = {
            n: [] for n in ("groups", "sizes", "keys", "lines", "words", "features")
        }
        filled = dict.fromkeys(("jsonl", "words", "features"), 0)
        sinks = {name: open(spool / f"all.{name}", "wb") for name in SPOOLED}  # noqa: SIM115
        try:
            for part in parts:
                self._count(part)
                self.digests += part.digests
                columns["groups"].append(np.array(part.groups, np.uint64))
                columns["sizes"].append(np.array(part.sizes, np.int64))
                columns["keys"].append(part.keys)
                columns["lines"].append(np.array(part.lines[1:], np.int64) + filled["jsonl"])
                columns["words"].append(part.words[1:] + filled["words"])
                columns["features"].append(part.features[1:] + filled["features"])
                filled["jsonl"] += part.lines[-1]
                filled["words"] += int(part.words[-1])
                filled["features"] += int(part.features[-1])
                self._gather(part.number, sinks)
        finally:
            for sink in sinks.values():
                sink.close()
        zero = np.zeros(1, np.int64)
        empty = [np.zeros(0, np.int64)]
        self.groups = np.concatenate([np.zeros(0, np.uint64), *columns["groups"]])
        self.sizes: Index = np.concatenate(columns["sizes"] or empty)
        self.keys: U64 = np.concatenate(columns["keys"]) if columns["keys"] else np.zeros((0, 0), np.uint64)
        self.line_bounds: Index = np.concatenate([zero, *columns["lines"]])
        self.word_bounds: Index = np.concatenate([zero, *columns["words"]])
        self.feature_bounds: Index = np.concatenate([zero, *columns["features"]])
        self.words = _mapped(spool / "all.words", np.uint64)
        self.features = _mapped(spool / "all.features", np.uint16)
        self.alive = np.ones(len(self.digests), bool)
        self._lines = open(spool / "all.jsonl", "rb")  # noqa: SIM115 - closed by close()
        self._dropped = open(spool / "all.dropped", "ab")  # noqa: SIM115

    def _count(self, part: Part) -> None:
        for name in ("dropped", "dropped_bytes", "removed_lines", "masked", "languages", "kinds"):
            getattr(self, name).update(getattr(part, name))
        self.recoded += part.recoded
        self.unreadable += part.unreadable
        self.read += part.read
        self.read_bytes += part.read_bytes

    def _gather(self, number: int, sinks: dict[str, object]) -> None:
        for name, sink in sinks.items():
            path = self.spool / f"{number:06d}.{name}"
            with open(path, "rb") as source:
                shutil.copyfileobj(source, sink, 1 << 20)  # type: ignore[arg-type]
            path.unlink()

    def close(self) -> None:
        self._lines.close()
        self._dropped.close()

    def living(self) -> Index:
        return np.flatnonzero(self.alive)

    def line(self, document: int) -> bytes:
        """The record as its line, with what has been cut since taken out."""
        start, end = self.line_bounds[document], self.line_bounds[document + 1]
        self._lines.seek(int(start))
        raw = self._lines.read(int(end - start))
        if document not in self.changed:
            return raw
        return dump_line({**json.loads(raw), "text": self.changed[document]})

    def record(self, document: int) -> Record:
        made: Record = json.loads(self.line(document))
        return made

    def texts(self, documents: Iterable[int]) -> Iterator[str]:
        for document in documents:
            yield self.record(document)["text"]

    def drop(self, document: int, reason: str, **more: object) -> None:
        """Take a document out, its place and the reason kept."""
        record = self.record(document)
        place = {k: record[k] for k in ("path", "offset", "part", "sha256") if k in record}
        text = record["text"]
        self._dropped.write(
            dump_line({**place, "reason": reason, **more, "characters": len(text), "begins": text[:100]})
        )
        self.alive[document] = False
        self.dropped[reason] += 1
        self.dropped_bytes[reason] += int(self.sizes[document])

    def drop_exact(self) -> None:
        """Keep the first of equal texts."""
        first: dict[bytes, int] = {}
        for document, digest in enumerate(self.digests):
            original = first.setdefault(digest, document)
            if original != document:
                self.drop(document, "exact duplicate", of=self.digests[original][:8].hex())

    def drop_near(self, threshold: float) -> None:
        """Keep of similar texts the first; see ``neardup.near_duplicates``."""
        living = self.living()
        for document, original in near_duplicates(
            self.keys[living], lambda i: self.shingles(int(living[i])), threshold
        ).items():
            self.drop(int(living[document]), "near duplicate", of=self.digests[living[original]][:8].hex())

    def shingles(self, document: int) -> U64:
        """Hashes of a document's word n-grams, sorted, without repeats."""
        words = np.asarray(self.words[self.word_bounds[document] : self.word_bounds[document + 1]])
        return np.unique(window_hashes(words, min(SIZE, max(len(words), 1))))

    def cut_repeats(self, size: int, min_characters: int) -> None:
        """Cut what occurred before; a text that has fewer than ``size`` words left goes altogether."""
        spans = repeated_spans(self.words, self.word_bounds, self.living(), size)
        for document in sorted(spans):
            text = self.record(document)["text"]
            words = tokenize([text]).words()
            kept = without(text, words, spans[document])
            left = len(words.hashes) - sum(end - first for first, end in spans[document])
            self.cut_characters += len(text) - len(kept)
            if left < size or len(kept) < min_characters:
                self.drop(document, "repeats only")
            else:
                self.changed[document] = kept


def _mapped(path: Path, kind: type[np.generic]) -> NDArray[np.generic]:
    """A file as an array; one of no bytes cannot be mapped."""
    return np.memmap(path, kind, "r") if path.stat().st_size else np.zeros(0, kind)
