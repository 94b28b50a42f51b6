"""Stretches of words that occurred before, in another document or the same: all but the first are cut.

After Lee et al. 2022 (arXiv 2107.06499), who cut repeats of 50 tokens by a suffix array; here every window of
that many words is hashed. A small table of hash prefixes first finds the windows that may occur
twice, so that only these are kept in memory and compared in full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tuneutils.tools.corpus_build.tokens import U64, Index, Tokens, window_hashes

CHUNK_WORDS = 1 << 18
AT_ONCE = 1 << 25

Spans = dict[int, list[tuple[int, int]]]


def repeated_spans(words: U64, bounds: Index, documents: Sequence[int] | Index, size: int) -> Spans:
    """The words to cut of each document: ``[first, end)`` counted in that document.

    Args:
        words: hashes of the words of all documents, in an array or mapped file.
        bounds: the words of document i are ``bounds[i]:bounds[i + 1]``.
        documents: those that count, in the order in which the first occurrence is kept.
        size: words of the shortest repeat.
    """
    total = int(sum(max(int(bounds[d + 1] - bounds[d]) - size + 1, 0) for d in documents))
    if not total:
        return {}
    bits = min(max((8 * total).bit_length(), 12), 28)
    shift = np.uint64(64 - bits)
    twice = _seen_twice(words, bounds, documents, size, bits)
    chunks = lambda: _windows(words, bounds, documents, size)  # noqa: E731
    candidates = sum(int(np.count_nonzero(twice[hashes >> shift])) for hashes, _ in chunks())
    parts = -(-candidates // AT_ONCE)
    again = [_repeats(chunks(), twice, shift, part, parts) for part in range(parts)]
    return _spans(np.sort(np.concatenate(again)) if again else np.zeros(0, np.int64), bounds, size)


def _windows(
    words: U64, bounds: Index, documents: Sequence[int] | Index, size: int
) -> Iterator[tuple[U64, Index]]:
    """Hashes and positions of all windows, in the documents' order, some ``CHUNK_WORDS`` at a time."""
    hashes: list[U64] = []
    positions: list[Index] = []
    held = 0
    for document in documents:
        start, end = int(bounds[document]), int(bounds[document + 1])
        for at in range(start, end - size + 1, CHUNK_WORDS):
            found = window_hashes(np.asarray(words[at : min(at + CHUNK_WORDS + size - 1, end)]), size)
            hashes.append(found)
            positions.append(np.arange(at, at + len(found)))
            held += len(found)
            if held >= CHUNK_WORDS:
                yield np.concatenate(hashes), np.concatenate(positions)
                hashes, positions, held = [], [], 0
    if hashes:
        yield np.concatenate(hashes), np.concatenate(positions)


def _seen_twice(
    words: U64, bounds: Index, documents: Sequence[int] | Index, size: int, bits: int
) -> np.ndarray:
    """``(2**bits,)``: whether two windows or more share this prefix, or may within one chunk."""
    seen = np.zeros(1 << bits, bool)
    twice = np.zeros(1 << bits, bool)
    owner = np.zeros(1 << 22, np.int32)
    for hashes, _ in _windows(words, bounds, documents, size):
        prefix = hashes >> np.uint64(64 - bits)
        slot = hashes & np.uint64((1 << 22) - 1)
        number = np.arange(len(hashes), dtype=np.int32)
        owner[slot] = number
        twice[prefix[seen[prefix] | (owner[slot] != number)]] = True
        seen[prefix] = True
    return twice


def _repeats(
    chunks: Iterator[tuple[U64, Index]], twice: np.ndarray, shift: np.uint64, part: int, parts: int
) -> Index:
    """Positions of the windows of one share of the hashes that are not the first of their kind."""
    hashes: list[U64] = []
    positions: list[Index] = []
    for found, at in chunks:
        keep = twice[found >> shift]
        if parts > 1:
            keep &= found % np.uint64(parts) == part
        hashes.append(found[keep])
        positions.append(at[keep])
    every, where = np.concatenate(hashes), np.concatenate(positions)
    order = np.argsort(every, kind="stable")
    ordered = every[order]
    return np.asarray(where[order[1:][ordered[1:] == ordered[:-1]]])


def _spans(starts: Index, bounds: Index, size: int) -> Spans:
    """Windows that begin at these words, those that touch joined, by document."""
    spans: Spans = {}
    if not len(starts):
        return spans
    owner = np.searchsorted(bounds, starts, side="right") - 1
    breaks = np.flatnonzero((np.diff(starts) > size) | (np.diff(owner) != 0)) + 1
    for group in np.split(np.arange(len(starts)), breaks):
        document = int(owner[group[0]])
        base = int(bounds[document])
        spans.setdefault(document, []).append(
            (int(starts[group[0]]) - base, int(starts[group[-1]]) + size - base)
        )
    return spans


def without(text: str, words: Tokens, spans: Sequence[tuple[int, int]]) -> str:
    """The text without these words and what stands between and right after them.

    Args:
        words: of this text alone.
    """
    made, last = "", 0
    for first, end in spans:
        start = int(words.start[first])
        stop = int(words.start[end]) if end < len(words.start) else len(text)
        made += text[last:start]
        kept, cut = made.rstrip(), text[start:stop]
        space = made[len(kept) :] + cut[len(cut.rstrip()) :]
        made = kept + ("\n\n" if "\n\n" in space else "\n" if "\n" in space else space[:1])
        last = stop
    return (made + text[last:]).strip()
