"""Documents that hold a piece of a benchmark: word n-grams in common (Brown et al. 2020, appendix C)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tuneutils.tools.corpus_build.tokens import U64, Tokens, tokenize, windows

SIZE = 13
SHORTEST = 8

Grams = dict[int, U64]


def strings(value: Any) -> Iterable[str]:
    """Every text in a record, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


def benchmark_grams(records: Iterable[Any]) -> Grams:
    """Sorted hashes of a benchmark's 13-grams by size; a text of 8 to 12 words is one n-gram."""
    made: dict[int, list[U64]] = defaultdict(list)
    for record in records:
        for text in strings(record):
            words = tokenize([text]).words()
            size = min(len(words.hashes), SIZE)
            if size >= SHORTEST:
                made[size].append(windows(words, size)[0])
    return {size: np.unique(np.concatenate(found)) for size, found in sorted(made.items())}


def contaminated(words: Tokens, grams: Grams) -> np.ndarray:
    """``(texts,)``: whether a text has an n-gram of the benchmark."""
    texts = len(words.bounds) - 1
    hit = np.zeros(texts, bool)
    for size, known in grams.items():
        found, first = windows(words, size)
        at = np.searchsorted(known, found)
        at[at == len(known)] = 0
        matched = first[known[at] == found] if len(known) else first[:0]
        hit[np.searchsorted(words.bounds, matched, side="right") - 1] = True
    return hit


def save(grams: Grams, folder: Path) -> None:
    for size, hashes in grams.items():
        np.save(folder / f"benchmark-{size}.npy", hashes)


def load(folder: Path) -> Grams:
    """What ``save`` wrote, mapped into memory."""
    return {
        int(path.stem.rpartition("-")[2]): np.load(path, mmap_mode="r")
        for path in sorted(folder.glob("benchmark-*.npy"))
    }
