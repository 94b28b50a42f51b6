"""Finding terms: a table from a word as it is written to what it is, phrases and casings included."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tuneutils.tools.cf_augment.words import split


@dataclass(frozen=True, slots=True)
class Entry:
    """What a word or phrase is.

    Attributes:
        kind: ``pronoun``, ``noun``, ``title``, ``name``, ``term``, ``sexed``; ``none`` for a phrase that
            only looks like one.
        text: as listed, in lower case.
        group: what it names.
        slot: the meaning that counterparts share.
        word: it is an ordinary word, or a place, as well.
    """

    kind: str
    text: str
    group: str = ""
    slot: str = ""
    word: bool = False


@dataclass(slots=True)
class _Node:
    """What begins with a word: the word itself, and phrases by their further words, longest first."""

    alone: tuple[Entry, ...] = ()
    phrases: list[tuple[tuple[str, ...], tuple[str, ...], tuple[Entry, ...]]] = field(default_factory=list)


class Hit(NamedTuple):
    """Words ``start`` to ``end`` (exclusive) are one term; several entries where it has several uses."""

    start: int
    end: int
    entries: tuple[Entry, ...]

    @property
    def entry(self) -> Entry:
        return self.entries[0]


class Table:
    """All terms of an axis. Looking up costs one dictionary access a word."""

    def __init__(self) -> None:
        self._nodes: dict[str, _Node] = {}

    def add(self, entry: Entry, *, capital: bool = False) -> None:
        """Add a term in its casings; with ``capital`` none is in lower case."""
        words, seps = split(entry.text)
        if not words:
            return
        forms = (
            {_title(words[0]), words[0].upper()}
            if capital
            else {words[0], _title(words[0]), words[0].upper()}
        )
        for form in forms:
            node = self._nodes.setdefault(form, _Node())
            if len(words) == 1 and not seps[1].strip():
                node.alone = (*node.alone, entry)
                continue
            rest, between = tuple(words[1:]), tuple(_plain(s) for s in seps[1:])
            for k, (other, other_seps, entries) in enumerate(node.phrases):
                if (other, other_seps) == (rest, between):
                    node.phrases[k] = (rest, between, (*entries, entry))
                    break
            else:
                node.phrases.append((rest, between, (entry,)))
                node.phrases.sort(key=lambda p: -len(p[0]))

    def __contains__(self, word: str) -> bool:
        return word in self._nodes

    def alone(self, word: str) -> tuple[Entry, ...]:
        """What a word is by itself."""
        node = self._nodes.get(word)
        return node.alone if node else ()

    def hits(self, words: Sequence[str], seps: Sequence[str]) -> list[Hit]:
        """Terms from left to right, the longest at each place; none inside a phrase that names nobody."""
        nodes = self._nodes
        found = []
        free = 0
        for i in [i for i, word in enumerate(words) if word in nodes]:
            if i < free:
                continue
            node = nodes[words[i]]
            free, entries = i + 1, node.alone
            for rest, between, those in node.phrases:
                if _matches(words, seps, i, rest, between):
                    free, entries = i + 1 + len(rest), those
                    break
            if entries and entries[0].kind != "none":
                found.append(Hit(i, free, entries))
        return found


def _matches(
    words: Sequence[str], seps: Sequence[str], i: int, rest: Sequence[str], between: Sequence[str]
) -> bool:
    """Whether ``rest`` follows word ``i``; ``between`` are its separators, the last the one behind it."""
    if i + len(rest) >= len(words):
        return False
    for k, word in enumerate(rest, 1):
        if words[i + k].lower() != word or _plain(seps[i + k]) != between[k - 1]:
            return False
    last = between[-1]
    return not last or _plain(seps[i + len(rest) + 1]).startswith(last)


def _plain(sep: str) -> str:
    return sep.strip().replace("’", "'")


def _title(word: str) -> str:
    return word[:1].upper() + word[1:]


_PROTECTED = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\b(?:https?|ftp)://\S+|\bwww\.\S+|[\w.+-]+@[\w-]+\.[\w.-]+|(?<!\w)[@#]\w+|<[^<>\n]{1,200}>",
    re.DOTALL,
)


def protected(text: str) -> list[tuple[int, int]]:
    """Where code, addresses, handles and markup stand: they are never rewritten."""
    if not ("`" in text or "@" in text or "<" in text or "#" in text or "://" in text or "www." in text):
        return []
    return [m.span() for m in _PROTECTED.finditer(text)]


def outside(
    hits: list[Hit], words: Sequence[str], seps: Sequence[str], spans: Iterable[tuple[int, int]]
) -> list[Hit]:
    """The hits that touch no protected span."""
    kept = []
    at = starts(words, seps)
    for hit in hits:
        begin, stop = at[hit.start], at[hit.end - 1] + len(words[hit.end - 1])
        if all(stop <= a or begin >= b for a, b in spans):
            kept.append(hit)
    return kept


def starts(words: Sequence[str], seps: Sequence[str]) -> list[int]:
    """The character at which each word begins."""
    found, position = [], 0
    for word, sep in zip(words, seps):
        position += len(sep)
        found.append(position)
        position += len(word)
    return found
