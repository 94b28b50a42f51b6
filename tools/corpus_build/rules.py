"""Quality rules as published: Gopher's (Rae et al. 2021, 2112.11446, A1.1), C4's (Raffel et al. 2020, 2.2).

A rule on lines takes lines out; a rule on documents gives the reason to drop one. Words are runs of
non-spaces, characters those of words; of repeated n-grams, what is covered by any occurrence after the first.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tuneutils.tools.corpus_build.names import FAMILIES, RULES
from tuneutils.tools.corpus_build.tokens import Index, Tokens, mix, tokenize, window_hashes

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
TERMINAL = (".", "!", "?", '"', "”", "’", "…")  # the last two close a quotation and an omission
BULLETS = ("•", "*", "-", "‣", "◦")
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}
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
    """A document as the rules see it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.words = text.split()
        self.lines = [line for raw in text.split("\n") if (line := raw.strip())]

    @property
    def letters(self) -> int:
        return sum(map(len, self.words))


def _word_count(d: View) -> bool:
    return 50 <= len(d.words) <= 100_000


def _word_length(d: View) -> bool:
    return 3 <= d.letters / max(len(d.words), 1) <= 10


def _symbols(d: View) -> bool:
    hashes, ellipses = d.text.count("#"), d.text.count("...") + d.text.count("…")
    return max(hashes, ellipses) <= 0.1 * len(d.words)


def _bullets(d: View) -> bool:
    return sum(line.startswith(BULLETS) for line in d.lines) <= 0.9 * len(d.lines)


def _ellipsis(d: View) -> bool:
    return sum(line.endswith(("...", "…")) for line in d.lines) <= 0.3 * len(d.lines)


def _alphabetic(d: View) -> bool:
    return sum(1 for w in d.words if w.isalpha() or any(map(str.isalpha, w))) >= 0.8 * len(d.words)


def _stop_words(d: View) -> bool:
    return len(STOP_WORDS.intersection(re.findall(r"[a-z]+", d.text.lower()))) >= 2


def _duplicate(parts: Sequence[str], of_parts: float, of_letters: float) -> bool:
    """At most these shares of the parts, and of their characters, repeat an earlier part."""
    counts = Counter(parts)
    if len(counts) == len(parts):
        return True
    letters = sum(map(len, parts))
    repeated = sum(len(part) * (count - 1) for part, count in counts.items())
    return len(parts) - len(counts) <= of_parts * len(parts) and repeated <= of_letters * letters


def _duplicate_lines(d: View) -> bool:
    return _duplicate(d.lines, 0.30, 0.20)


def _duplicate_paragraphs(d: View) -> bool:
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
    "c4-sentences": lambda d: len(_SENTENCE_END.findall(d.text)) >= 3,
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
    found: list[str | None] = []
    for text in texts:
        view = View(text)
        found.append(next((name for name, passes in checks if not passes(view)), None))
    left = [i for i, broken in enumerate(found) if broken is None]
    if left and any(name in rules for name in NGRAM_RULES):
        for i, broken in zip(left, _ngram_rules([texts[i] for i in left], rules), strict=True):
            found[i] = broken
    return found


def _ngram_rules(texts: Sequence[str], rules: Sequence[str]) -> list[str | None]:
    tokens = tokenize(texts, spaces_only=True)
    top = top_ngram_shares(tokens) if "gopher-top-ngrams" in rules else {}
    repeated = duplicate_ngram_shares(tokens) if "gopher-duplicate-ngrams" in rules else {}
    found: list[str | None] = []
    for i in range(len(texts)):
        if any(top[n][i] > limit for n, limit in TOP_NGRAM.items() if top):
            found.append("gopher-top-ngrams")
        elif any(repeated[n][i] > limit for n, limit in DUPLICATE_NGRAM.items() if repeated):
            found.append("gopher-duplicate-ngrams")
        else:
            found.append(None)
    return found


def _grams(tokens: Tokens, size: int) -> tuple[np.ndarray, Index, Index]:
    """Hashes of n-grams that differ between texts, their first tokens, and their texts."""
    grams = window_hashes(tokens.hashes, size)
    text = np.repeat(np.arange(len(tokens.bounds) - 1), np.diff(tokens.bounds))
    first = np.flatnonzero(text[: len(grams)] == text[size - 1 :]) if len(grams) else np.zeros(0, np.int64)
    return grams[first] ^ mix(text[first].astype(np.uint64)), first, text[first]


def _letters(tokens: Tokens) -> tuple[Index, np.ndarray]:
    """Characters of the words before each, ``(n + 1,)``, and of each text."""
    before = np.concatenate([[0], np.cumsum(tokens.end - tokens.start)])
    return before, np.maximum(np.diff(before[tokens.bounds]), 1)


def top_ngram_shares(tokens: Tokens) -> dict[int, np.ndarray]:
    """By n in 2 to 4, ``(texts,)``: characters in all occurrences of the most common n-gram, as a share.

    Of n-grams equally common the longest counts; one that occurs once is not common: 0.
    """
    before, total = _letters(tokens)
    shares = {}
    for size in TOP_NGRAM:
        grams, first, text = _grams(tokens, size)
        order = np.argsort(grams, kind="stable")
        edges = np.flatnonzero(np.concatenate([[True], grams[order][1:] != grams[order][:-1]]))
        counts = np.diff(np.append(edges, len(grams)))
        at = first[order[edges]] if len(grams) else first
        repeated = counts > 1
        owner, counts, at = text[order[edges]][repeated], counts[repeated], at[repeated]
        length = before[at + size] - before[at]
        share = np.zeros(len(total))
        if len(owner):
            by_count = np.lexsort((length, counts, owner))
            last = np.flatnonzero(np.append(owner[by_count][1:] != owner[by_count][:-1], True))
            best = by_count[last]
            share[owner[best]] = counts[best] * length[best] / total[owner[best]]
        shares[size] = share
    return shares


def duplicate_ngram_shares(tokens: Tokens) -> dict[int, np.ndarray]:
    """By n in 5 to 10, ``(texts,)``: share of characters in n-grams that occurred before in the text.

    A repeated n-gram starts with a repeated one that is a word shorter, so each size looks only there.
    """
    _, total = _letters(tokens)
    candidates: np.ndarray | None = None
    shares = {}
    for size in DUPLICATE_NGRAM:
        grams, first, _ = _grams(tokens, size)
        if candidates is not None:
            keep = candidates[first]
            grams, first = grams[keep], first[keep]
        order = np.argsort(grams, kind="stable")
        ordered = grams[order]
        same = ordered[1:] == ordered[:-1]
        again = order[1:][same]
        candidates = np.zeros(len(tokens.hashes) + 1, bool)
        candidates[first[again]] = candidates[first[order[:-1][same]]] = True
        starts = np.zeros(len(tokens.hashes) + 1, np.int32)
        starts[first[again]] += 1
        ends = np.zeros(len(tokens.hashes) + 1, np.int32)
        ends[first[again] + size] += 1
        covered = np.cumsum(starts - ends)[:-1] > 0
        letters = np.concatenate([[0], np.cumsum(np.where(covered, tokens.end - tokens.start, 0))])
        shares[size] = np.diff(letters[tokens.bounds]) / total
    return shares
