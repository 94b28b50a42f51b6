"""Mentions of groups in a batch of texts: tokens by ``bytes.split``, terms by Aho-Corasick.

A batch is one byte string: case folded, punctuation turned to spaces, a separator token between texts. Terms
are looked up with a space on either side, so only whole words match, phrases as well as single words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneutils.shared.lexicons import NO_GROUP, Lexicon, Term

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Bytes = NDArray[np.uint8]
SEPARATOR = b"\x00"
_JOINT = " \x00 "
_WORD = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789_\x00") | set(range(128, 256))
_TABLE = bytes(i + 32 if 65 <= i <= 90 else i if i in _WORD else 32 for i in range(256))
#: What is no letter beyond ASCII: Latin-1 signs, general and CJK punctuation, arrows to dingbats, emoji.
_MARKS = re.compile(
    "[\u0080-\u00a9\u00ab-\u00b4\u00b6-\u00b9\u00bb-\u00bf\u2000-\u206f\u2190-\u2bff"
    "\u3000-\u303f\uff00-\uff0f\U0001f000-\U0001faff\ufe0e\ufe0f]"
)
#: Behind these no name stands ("the Bill") but "A Polish nurse" does.
DETERMINERS = frozenset(
    b"a an the this that these those my your his her its our their each every no any".split()
)
SPACE = 32


@dataclass(frozen=True)
class Mentions:
    """The mentions in a batch of texts, and the tokens of the texts that have hits.

    Attributes:
        total: tokens of the whole batch.
        rows: ``(texts with hits,)`` their indices in the batch.
        tokens: their words, a separator before each text.
        row_of: ``(tokens,)`` index into ``rows`` of each token.
        start: ``(mentions,)`` index of the mention's first token.
        length: ``(mentions,)`` its number of tokens.
        term: ``(mentions,)`` what was found, as an index into :attr:`Matcher.terms`.
        group: ``(mentions,)`` its group, as an index into :attr:`Matcher.groups`.
        ambiguous: ``(axes,)`` hits of terms that are ordinary words as well, passed over.
    """

    total: int
    rows: Ints
    tokens: list[bytes]
    row_of: Ints
    start: Ints
    length: Ints
    term: Ints
    group: Ints
    ambiguous: Ints


class Matcher:
    """Finds the terms of lexicons; ``groups`` numbers all groups of all axes in one row.

    A term flagged ``capital`` needs a capital. One flagged ``word`` as well (Mark, Will, Turkey, Polish)
    counts only inside a sentence, behind a word in lower case: of a name, which has no slot, this must be no
    determiner. Flagged ``place``, or ``word`` without ``capital``, a term never counts. What is passed over
    is counted as ambiguous.

    Attributes:
        axes: names of the lexicons.
        groups: ``(axis index, group)`` of each group.
        terms: the text of each term.
        clashes: terms that stand under several groups of one axis; the first counts.
    """

    def __init__(self, lexicons: Sequence[Lexicon]) -> None:
        self.axes = [lexicon.name for lexicon in lexicons]
        self.groups: list[tuple[int, str]] = [
            (axis, group) for axis, lexicon in enumerate(lexicons) for group in lexicon.groups
        ]
        self.clashes: list[str] = []
        entries: dict[str, list[tuple[int, Term]]] = {}
        for axis, lexicon in enumerate(lexicons):
            seen: dict[str, str] = {}
            for term in lexicon.terms:
                key = _key(term.text)
                if seen.setdefault(key, term.group) != term.group:
                    self.clashes.append(f"{lexicon.name}: {term.text} ({seen[key]}, {term.group})")
                elif key.strip() and not any(a == axis for a, _ in entries.get(key, ())):
                    entries.setdefault(key, []).append((axis, term))
        self._build(entries)

    def _build(self, entries: dict[str, list[tuple[int, Term]]]) -> None:
        import ahocorasick

        found: Any = ahocorasick.Automaton()
        for number, key in enumerate(entries):
            found.add_word(key, number)
        found.make_automaton()
        self._automaton = found
        self._bytes = np.array([len(key) for key in entries], dtype=np.int64)
        self._offsets = np.cumsum([0, *map(len, entries.values())])
        each = [(key, axis, term) for key, pair in entries.items() for axis, term in pair]
        number = {(axis, group): i for i, (axis, group) in enumerate(self.groups)}
        self.terms = [term.text for _, _, term in each]
        self._axis = np.array([axis for _, axis, _ in each], dtype=np.int64)
        self._group = np.array(
            [-1 if term.group == NO_GROUP else number[axis, term.group] for _, axis, term in each],
            dtype=np.int64,
        )
        self._single: list[set[bytes]] = [set() for _ in self.axes]
        for key, axis, _ in each:
            if key.count(" ") == 2:
                self._single[axis].add(key.strip().encode("latin-1"))
        self._size = np.array([key.count(" ") - 1 for key, _, _ in each], dtype=np.int64)
        self._capital = np.array(["capital" in term.flags for _, _, term in each], dtype=bool)
        word = np.array(["word" in term.flags for _, _, term in each], dtype=bool)
        place = np.array(["place" in term.flags for _, _, term in each], dtype=bool)
        self._never = place | (word & ~self._capital)
        self._doubtful = word & ~self._never
        self._name = np.array([not term.slot for _, _, term in each], dtype=bool)

    @property
    def group_axis(self) -> Ints:
        """``(groups,)`` the axis of each group."""
        return np.array([axis for axis, _ in self.groups], dtype=np.int64)

    @property
    def terms_per_group(self) -> Ints:
        """``(groups,)`` how many terms name each."""
        return np.bincount(self._group[self._group >= 0], minlength=len(self.groups))

    @property
    def term_group(self) -> Ints:
        """``(terms,)`` the group of each; -1 for phrases that name nobody."""
        return self._group

    def words_of(self, axis: int) -> set[bytes]:
        """The axis's terms that are single tokens."""
        return self._single[axis]

    def find(self, texts: Sequence[str]) -> Mentions:
        """The mentions of a batch. Of overlapping terms of one axis the longer stands."""
        raw, plain = _prepare(texts)
        hits = chain.from_iterable(self._automaton.iter(plain.decode("latin-1")))
        ends, numbers = np.fromiter(hits, dtype=np.int64).reshape(-1, 2).T
        first = ends - self._bytes[numbers] + 2
        letters = np.frombuffer(plain, dtype=np.uint8)
        which, entry = _expanded(self._offsets, numbers)
        good = ~self._capital[entry] | _upper(first, np.frombuffer(raw, dtype=np.uint8), letters)[which]
        which, entry = which[good], entry[good]
        good = self._longest(which, entry, first, ends)
        good &= self._group[entry] >= 0
        first, entry = first[which[good]], entry[good]
        batch, start = _Tokens.of(raw, plain, first)
        unclear = self._never[entry]
        doubtful = np.flatnonzero(self._doubtful[entry])
        if len(doubtful):
            unclear[doubtful] = ~batch.inside_sentence(start[doubtful], self._name[entry[doubtful]])
        ambiguous = np.bincount(self._axis[entry[unclear]], minlength=len(self.axes))
        start, entry = start[~unclear], entry[~unclear]
        blank = letters == SPACE
        total = int(np.count_nonzero(blank[:-1] & ~blank[1:])) - len(texts) - 1
        size, group = self._size[entry], self._group[entry]
        return Mentions(total, batch.rows, batch.tokens, batch.row_of, start, size, entry, group, ambiguous)

    def _longest(self, which: Ints, entry: Ints, first: Ints, ends: Ints) -> Bools:
        """Which hits lie inside no other of the same axis."""
        axis, start, end = self._axis[entry], first[which], ends[which]
        order = np.lexsort((-end, start, axis))
        apart = (int(end.max()) + 2 if len(end) else 1) * axis[order]
        reached = np.maximum.accumulate(end[order] + apart)
        kept = np.ones(len(order), dtype=bool)
        kept[order[1:]] = (end[order] + apart)[1:] > reached[:-1]
        return kept


@dataclass(frozen=True)
class _Tokens:
    """The tokens of the texts with hits, and their bytes as they are and folded."""

    rows: Ints
    tokens: list[bytes]
    raw: Bytes
    plain: Bytes
    starts: Ints
    row_of: Ints

    @classmethod
    def of(cls, raw: bytes, plain: bytes, at: Ints) -> tuple[_Tokens, Ints]:
        """Split the texts in which the bytes ``at`` stand; also gives the tokens that start there."""
        heads = np.flatnonzero(np.frombuffer(plain, dtype=np.uint8) == 0)
        row = np.searchsorted(heads, at) - 1
        new = np.diff(row, prepend=-1) > 0  # hits come in the texts' order
        rows, row = row[new], np.cumsum(new) - 1
        low, high = heads[rows], heads[rows + 1] if len(rows) else heads[rows]
        if len(rows) < len(heads) - 1:
            parts = list(zip(low.tolist(), high.tolist()))
            plain = b"".join([plain[a:b] for a, b in parts])
            raw = b"".join([raw[a:b] for a, b in parts])
        elif len(rows):
            plain, raw = plain[heads[0] : heads[-1]], raw[heads[0] : heads[-1]]
        sizes = high - low
        moved = at - low[row] + (np.cumsum(sizes) - sizes)[row] if len(rows) else at
        letters = np.frombuffer(plain, dtype=np.uint8)
        blank = letters == SPACE
        starts = np.flatnonzero(~blank & np.concatenate([[True], blank[:-1]])) if len(rows) else at
        row_of = np.cumsum(letters[starts] == 0) - 1
        made = cls(rows, plain.split(), np.frombuffer(raw, dtype=np.uint8), letters, starts, row_of)
        return made, np.searchsorted(starts, moved)

    def inside_sentence(self, token: Ints, name: Bools) -> Bools:
        """Whether one blank and a word in lower case stand before each token.

        Before a name that must be no determiner, before other terms a determiner may have a capital.
        """
        before = self.starts[token - 1]
        words = [self.tokens[i - 1] for i in token.tolist()]
        end = before + np.array([len(word) for word in words])
        blank = (end + 1 == self.starts[token]) & (self.raw[end] == SPACE)
        lower = (self.plain[before] >= ord("a")) & ~_upper(before, self.raw, self.plain)
        determiner = np.array([word in DETERMINERS for word in words])
        return blank & np.where(name, lower & ~determiner, lower | determiner)


def _upper(at: Ints, raw: Bytes, plain: Bytes) -> Bools:
    """Whether the letters at these bytes were capitals; of a letter of two bytes either may differ."""
    second = (plain[at] >= 128) & (raw[at + 1] != plain[at + 1])
    return (raw[at] != plain[at]) | second


def _expanded(offsets: Ints, numbers: Ints) -> tuple[Ints, Ints]:
    """For hits of patterns: the hit's index and the entry's, one for each axis that has the pattern."""
    counts = offsets[numbers + 1] - offsets[numbers]
    which = np.repeat(np.arange(len(numbers)), counts)
    before = np.cumsum(counts) - counts
    return which, np.arange(len(which)) - before[which] + offsets[numbers][which]


def _prepare(texts: Sequence[str]) -> tuple[bytes, bytes]:
    """The batch as it is and in lower case without punctuation, equally long."""
    raw = _encoded(texts)
    if raw.count(SEPARATOR) != len(texts) + 1:
        return _prepare([t.replace("\x00", " ") for t in texts])
    if raw.isascii():
        return raw, raw.translate(_TABLE)
    texts = [t if t.isascii() else _MARKS.sub(" ", t) for t in texts]
    plain = _encoded([t if t.isascii() else _folded(t) for t in texts])
    return _encoded(texts), plain.translate(_TABLE)


def _encoded(texts: Sequence[str]) -> bytes:
    return _JOINT.join(["", *texts, ""]).encode("utf-8")


def _folded(text: str) -> str:
    """In lower case, as many bytes as before: the Turkish capital i with its dot would become two letters."""
    lower = text.lower()
    same = len(lower.encode("utf-8")) == len(text.encode("utf-8"))
    return lower if same else "".join(map(_lower_of_same_size, text))


def _lower_of_same_size(letter: str) -> str:
    lower = letter.lower()
    return lower if len(lower.encode("utf-8")) == len(letter.encode("utf-8")) else letter


def _key(text: str) -> str:
    """A term as it stands in a batch, with a space on either side, one character a byte."""
    _, plain = _prepare([text])
    return " " + b" ".join(plain.split()[1:-1]).decode("latin-1") + " "
