"""Word-for-word glosses by a bilingual dictionary, and vectors of shared spelling to compare texts by.

A gloss keeps a word that the dictionary does not have, so that names, numbers and cognates still count.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneutils.shared.errors import ToolError
from tuneutils.shared.records import STREAM_SUFFIXES, Reader
from tuneutils.tools.xl_parallel.hashed import U64, document_frequencies, matrix
from tuneutils.tools.xl_parallel.sides import read_lines

Floats = NDArray[np.float32]
#: Source word, lower case, → its translations, lower case, the first ones first.
Dictionary = Mapping[str, list[str]]

#: Dimensions of a sketch.
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


def spelling(src: Sequence[str], tgt: Sequence[str]) -> tuple[Any, Any]:
    """CSR matrices ``(n, grams)`` and ``(m, grams)``: n-grams of characters and words, tf-idf.

    They are sums over n-grams: the row of two texts joined is the sum of theirs.
    """
    hashes, idf = _weights([*src, *tgt])
    made = [matrix(texts, hashes, _SIZES) for texts in (src, tgt)]
    for rows in made:
        rows.data *= idf[rows.indices]
    return made[0], made[1]


def sketched_spelling(src: Sequence[str], tgt: Sequence[str]) -> tuple[Floats, Floats]:
    """``spelling`` in ``DIM`` dimensions: ``(n, DIM)`` and ``(m, DIM)``.

    A count sketch (Charikar, Chen and Farach-Colton 2002): each n-gram's hash gives it one dimension and a
    sign, which keeps cosines with a standard error near ``1/√DIM``.
    """
    from scipy import sparse

    hashes, idf = _weights([*src, *tgt])
    signed = np.where(hashes >> np.uint64(63), -idf, idf)
    places = (hashes % np.uint64(DIM)).astype(np.int64)
    sketch = sparse.csr_matrix((signed, places, np.arange(len(hashes) + 1)), (len(hashes), DIM))
    made = [(matrix(texts, hashes, _SIZES) @ sketch).toarray() for texts in (src, tgt)]
    return made[0], made[1]


def _weights(texts: Sequence[str]) -> tuple[U64, Floats]:
    """The hashes, ascending, of what is in two texts or more, and each one's idf."""
    hashes, frequencies = document_frequencies(texts, _SIZES)
    shared = frequencies > 1
    idf = np.log((1 + len(texts)) / (1 + frequencies[shared])).astype(np.float32)
    return hashes[shared], idf
