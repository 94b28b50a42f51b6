"""Word-for-word glosses by a bilingual dictionary, and vectors of shared spelling to compare texts by.

A gloss keeps a word that the dictionary does not have, so that names, numbers and cognates still count.
Both texts are then tf-idf weighted character n-grams, brought to ``DIM`` dimensions by random signs
(Achlioptas 2003): inner products are kept with a standard error near ``1/√DIM``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tuneutils.shared.errors import ToolError
from tuneutils.shared.records import STREAM_SUFFIXES, Reader
from tuneutils.tools.xl_parallel.hashed import document_frequencies, matrix
from tuneutils.tools.xl_parallel.sides import read_lines

Floats = NDArray[np.float32]
#: Source word, lower case, → its translations, lower case, the first ones first.
Dictionary = Mapping[str, list[str]]

DIM = 512
_SIZES = (3, 4, 5)
_WORD = re.compile(r"\w+")
#: Translations of a word that go into a gloss.
SENSES = 4
#: Endings up to this many characters are cut off a word that is not found, down to stems of STEM.
ENDING, STEM = 3, 3


def load(path: str) -> Dictionary:
    """A dictionary of parallel records, or of lines ``source<TAB>target``.

    Raises:
        ToolError: a line without a tab, or no entry at all (65).
    """
    found: dict[str, list[str]] = {}
    if path.endswith(STREAM_SUFFIXES) or Path(path).is_dir():
        pairs = [(r["src"], r["tgt"]) for r in Reader([path], formats=("parallel",))]
    else:
        pairs = []
        for number, line in enumerate(read_lines(path), 1):
            source, tab, target = line.partition("\t")
            if not line.strip():
                continue
            if not tab:
                raise ToolError(f"{path}:{number}: no tab between word and translation")
            pairs.append((source, target))
    for source, target in pairs:
        word, translation = source.strip().lower(), target.strip().lower()
        if word and translation and translation not in found.setdefault(word, []):
            found[word].append(translation)
    if not found:
        raise ToolError(f"{path}: no word with a translation")
    return found


def look_up(word: str, dictionary: Dictionary) -> list[str]:
    """Translations of a word, or of what is left without its ending."""
    for cut in range(min(ENDING, len(word) - STEM) + 1 if len(word) > STEM else 1):
        if found := dictionary.get(word[: len(word) - cut]):
            return found
    return []


def gloss(text: str, dictionary: Dictionary) -> str:
    """Each word's first translations in its place."""
    words = _WORD.findall(text.lower())
    return " ".join(" ".join(look_up(w, dictionary)[:SENSES] or [w]) for w in words)


def spelling(src: Sequence[str], tgt: Sequence[str], seed: int = 0) -> tuple[Floats, Floats]:
    """Vectors ``(n, DIM)`` and ``(m, DIM)`` by n-grams of characters, weighted by their rarity in both.

    They are sums over n-grams: the vector of two texts joined is the sum of theirs.
    """
    hashes, frequencies = document_frequencies([*src, *tgt])
    shared = frequencies > 1
    idf = np.log((1 + len(src) + len(tgt)) / (1 + frequencies[shared])).astype(np.float32)
    signs = np.random.default_rng(seed).choice(np.array([-1, 1], np.float32), (len(idf), DIM))
    made = []
    for texts in (src, tgt):
        rows = matrix(texts, hashes[shared], _SIZES)
        rows.data *= idf[rows.indices]
        made.append(np.asarray(rows @ signs, np.float32))
    return made[0], made[1]
