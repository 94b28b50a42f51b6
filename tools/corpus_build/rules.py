"""Quality rules as published: Gopher's (Rae et al. 2021, 2112.11446, A1.1), C4's (Raffel et al. 2020, 2.2).

A rule on lines takes lines out; a rule on documents gives the reason to drop one. Words are runs of
non-spaces, characters those of words; of repeated n-grams, what is covered by any occurrence after the first.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import numpy as np

from tuneutils.tools.corpus_build.names import FAMILIES, RULES
from tuneutils.tools.corpus_build.tokens import (
    U64,
    Index,
    Tokens,
    Windows,
    mix,
    starts_within,
    text_of_each,
    tokenize,
)

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
TERMINAL = (".", "!", "?", '"', "”", "’", "…")  # the last two close a quotation and an omission
BULLETS = frozenset("•*-‣◦")
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}
SLOT_BITS = 19
DUPLICATE_NGRAM = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

_CITATION = re.compile(r"\[(?:\d{1,3}|citation needed|edit)\]")
_SENTENCE_END = re.compile(r"[.!?][\"”’)]*(?=\s|$)")


def without_citations(line: str) -> str:
    """Wikipedia's markers ([3], [citation needed], [edit]) taken out, as C4 does."""
    return _CITATION.sub("", line) if "[" in line else line


LINE_RULES: dict[str, Callable[[str], bool]] = {
    "c4-terminal-punctuation": lambda line: line.endswith(TERMINAL) and not line.endswith("..."),
    "c4-short-lines": lambda line: len(line.split()) >= 5,
    "c4-javascript": lambda line: "javascript" not in line.lower(),
    "c4-policy": lambda line: not any(p in line.lower() for p in POLICY),
}
"""Whether a line stays. Lines without a character stay: they part paragraphs."""


class View:
    """A document as the rules see it.

    Attributes:
        words, letters, alphabetic: number of words, of their characters, of words with a letter.
        stop_words: how many different ones of ``STOP_WORDS`` it has.
        repeats: whether a line occurs twice; without one no paragraph does.
    """

    def __init__(self, text: str, words: int, letters: int, alphabetic: int, stop_words: int) -> None:
        self.text = text
        self.words, self.letters, self.alphabetic = words, letters, alphabetic
        self.stop_words = stop_words
        self.lines = [line for raw in text.split("\n") if (line := raw.strip())]
        self.repeats = len(set(self.lines)) < len(self.lines)


def views(texts: Sequence[str], tokens: Tokens) -> list[View]:
    """The documents with what is counted over whole batches."""
    columns = [np.ones(len(tokens.end), bool), tokens.end - tokens.start, tokens.alphabetic]
    sums = [np.concatenate([[0], np.cumsum(c, dtype=np.int64)])[tokens.bounds] for c in columns]
    stops = np.zeros(len(texts), np.int64)
    for word in tokenize([" ".join(STOP_WORDS)]).hashes:
        found = np.flatnonzero(tokens.hashes == word)
        stops[np.unique(np.searchsorted(tokens.bounds, found, side="right") - 1)] += 1
    counted = zip(*(np.diff(s).tolist() for s in sums), stops.tolist(), strict=True)
    return [View(text, *counts) for text, counts in zip(texts, counted, strict=True)]


def _word_count(d: View) -> bool:
    return 50 <= d.words <= 100_000


def _word_length(d: View) -> bool:
    return 3 <= d.letters / max(d.words, 1) <= 10


def _symbols(d: View) -> bool:
    hashes, ellipses = d.text.count("#"), d.text.count("...") + d.text.count("…")
    return max(hashes, ellipses) <= 0.1 * d.words


def _bullets(d: View) -> bool:
    return sum(line[0] in BULLETS for line in d.lines) <= 0.9 * len(d.lines)


def _ellipsis(d: View) -> bool:
    if "..." not in d.text and "…" not in d.text:
        return True
    return sum(line.endswith(("...", "…")) for line in d.lines) <= 0.3 * len(d.lines)


def _alphabetic(d: View) -> bool:
    return d.alphabetic >= 0.8 * d.words


def _stop_words(d: View) -> bool:
    return d.stop_words >= 2


def _duplicate(parts: Sequence[str], of_parts: float, of_letters: float) -> bool:
    """At most these shares of the parts, and of their characters, repeat an earlier part."""
    counts = Counter(parts)
    repeated = sum(len(part) * (count - 1) for part, count in counts.items())
    few = len(parts) - len(counts) <= of_parts * len(parts)
    return few and repeated <= of_letters * sum(map(len, parts))


def _duplicate_lines(d: View) -> bool:
    return not d.repeats or _duplicate(d.lines, 0.30, 0.20)


def _duplicate_paragraphs(d: View) -> bool:
    if not d.repeats:
        return True
    return _duplicate([p for raw in d.text.split("\n\n") if (p := raw.strip())], 0.30, 0.20)


DOCUMENT_RULES: dict[str, Callable[[View], bool]] = {
    "gopher-words": _word_count,
    "gopher-word-length": _word_length,
    "gopher-symbols": _symbols,
    "gopher-bullets": _bullets,
    "gopher-ellipsis": _ellipsis,
    "gopher-alphabetic": _alphabetic,
    "gopher-stop-words": _stop_words,
    "gopher-duplicate-lines": _duplicate_lines,
    "gopher-duplicate-paragraphs": _duplicate_paragraphs,
    "c4-lorem-ipsum": lambda d: "lorem ipsum" not in d.text.lower(),
    "c4-curly-bracket": lambda d: "{" not in d.text,
    "c4-sentences": lambda d: len(list(islice(_SENTENCE_END.finditer(d.text), 3))) == 3,
}
"""Whether a document passes."""

NGRAM_RULES = ("gopher-top-ngrams", "gopher-duplicate-ngrams")


def chosen(wanted: Iterable[str], left_out: Iterable[str]) -> tuple[str, ...]:
    """The rules named, a family standing for all of its own, without those left out; in a fixed order."""
    wanted, left_out = set(wanted), set(left_out)
    families = {f for f in FAMILIES if f in wanted}
    return tuple(n for n in RULES if (n in wanted or n.partition("-")[0] in families) and n not in left_out)


def clean_lines(text: str, rules: Sequence[str]) -> tuple[str, Counter[str]]:
    """The text without the lines that a rule refuses, and how many each rule took."""
    removed: Counter[str] = Counter()
    checks = [(name, LINE_RULES[name]) for name in rules if name in LINE_RULES]
    if "c4-citations" in rules:
        text = without_citations(text)
    if not checks:
        return text, removed
    if not {"c4-terminal-punctuation", "c4-short-lines"}.intersection(rules):
        low = text.lower()
        if "javascript" not in low and not any(p in low for p in POLICY):
            return text, removed
    kept = []
    for line in text.split("\n"):
        stripped = line.strip()
        broken = next((name for name, stays in checks if stripped and not stays(stripped)), None)
        if broken is None:
            kept.append(line)
        else:
            removed[broken] += 1
    return "\n".join(kept), removed


def broken_rules(texts: Sequence[str], rules: Sequence[str]) -> list[str | None]:
    """For each text the first rule that it breaks, in the order of ``RULES``, or None."""
    checks = [(name, DOCUMENT_RULES[name]) for name in rules if name in DOCUMENT_RULES]
    tokens = tokenize(texts, spaces_only=True)
    seen = views(texts, tokens)
    found: list[str | None] = [next((n for n, passes in checks if not passes(d)), None) for d in seen]
    ngrams = Ngrams(tokens) if {"gopher-top-ngrams", "gopher-duplicate-ngrams"}.intersection(rules) else None
    for name, shares, limits in (
        ("gopher-top-ngrams", top_ngram_shares, TOP_NGRAM),
        ("gopher-duplicate-ngrams", duplicate_ngram_shares, DUPLICATE_NGRAM),
    ):
        if ngrams is not None and name in rules:
            above = np.any([share > limits[n] for n, share in shares(ngrams).items()], axis=0)
            found = [broken or (name if bad else None) for broken, bad in zip(found, above, strict=True)]
    return found


class Ngrams:
    """N-grams of a batch, hashed so that those of different texts differ.

    Attributes:
        possible: ``(n,)`` of the bigram that each token starts, how many share its slot of a small table: at
            least as many as are equal to it. 0 where none starts.
    """

    def __init__(self, tokens: Tokens) -> None:
        self.bounds = tokens.bounds
        self.text = text_of_each(tokens.bounds)
        self.ends = tokens.bounds[1:][self.text]
        self.before = np.concatenate([[0], np.cumsum(tokens.end - tokens.start)])
        self.letters = np.maximum(np.diff(self.before[tokens.bounds]), 1)
        self._salt = mix(np.arange(len(tokens.bounds), dtype=np.uint64))
        self._windows = Windows(tokens.hashes)
        first = starts_within(tokens.bounds, 2)
        self.possible = np.zeros(len(tokens.hashes), np.int64)
        self.possible[first] = _slot_counts(self.at(first, 2))

    def at(self, first: Index, size: int) -> U64:
        return self._windows.at(first, size) ^ self._salt[self.text[first]]

    def length(self, first: Index, size: int) -> Index:
        """Characters of the words of each."""
        return np.asarray(self.before[first + size] - self.before[first])


def _slot_counts(grams: U64) -> Index:
    slots = (grams >> np.uint64(64 - SLOT_BITS)).astype(np.int64)
    return np.bincount(slots, minlength=1 << SLOT_BITS)[slots]


def top_ngram_shares(ngrams: Ngrams) -> dict[int, np.ndarray]:
    """By n in 2 to 4, ``(texts,)``: characters in all occurrences of the most common n-gram, as a share.

    Of n-grams equally common the longest counts. Shares that cannot reach their limit are left at 0: an
    n-gram is no more common than the rarest of its bigrams.
    """
    shares = {size: np.zeros(len(ngrams.letters)) for size in TOP_NGRAM}
    for size, limit in TOP_NGRAM.items():
        count = len(ngrams.possible) - size + 2
        rarest = np.minimum.reduce([ngrams.possible[i : i + max(count, 0)] for i in range(size - 1)])
        first = np.flatnonzero(rarest > 1)
        reach = rarest[first] * ngrams.length(first, size)
        text = ngrams.text[first]
        for document in np.unique(text[reach > limit * ngrams.letters[text]]):
            start, end = ngrams.bounds[document : document + 2]
            mine = np.arange(start, end - size + 1)
            _, at, times = np.unique(ngrams.at(mine, size), return_index=True, return_counts=True)
            lengths = ngrams.length(mine[at], size)
            best = np.lexsort((lengths, times))[-1:]
            shares[size][document] = (times * lengths * (times > 1))[best].sum() / ngrams.letters[document]
    return shares


def duplicate_ngram_shares(ngrams: Ngrams) -> dict[int, np.ndarray]:
    """By n in 5 to 10, ``(texts,)``: share of characters in n-grams that occurred before in the text.

    A repeated n-gram starts with a repeated one that is a word shorter, so each size looks only there; for
    the first size, where four repeated bigrams follow each other.
    """
    again = ngrams.possible > 1
    first = np.flatnonzero(again[:-3] & again[1:-2] & again[2:-1] & again[3:])
    shares = {}
    for size in DUPLICATE_NGRAM:
        first = first[first + size <= ngrams.ends[first]]
        grams = ngrams.at(first, size)
        order = np.argsort(grams, kind="stable")
        same = grams[order][1:] == grams[order][:-1]
        later = first[order[1:][same]]
        first = np.unique(np.concatenate([later, first[order[:-1][same]]]))
        shares[size] = _covered(ngrams, later, size) / ngrams.letters
    return shares


def _covered(ngrams: Ngrams, first: Index, size: int) -> np.ndarray:
    """``(texts,)``: characters of the words within ``size`` words from any of ``first``."""
    count = len(ngrams.before)
    if not len(first):
        return np.zeros(len(ngrams.letters))
    inside = np.cumsum(np.bincount(first, minlength=count) - np.bincount(first + size, minlength=count)) > 0
    letters = np.concatenate([[0], np.cumsum(np.where(inside[:-1], np.diff(ngrams.before), 0))])
    return np.asarray(np.diff(letters[ngrams.bounds]))
