"""Word vectors in the text format of word2vec, GloVe and fastText: a word and its numbers on each line."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray

from tuneutils.shared.errors import ToolError

Floats = NDArray[np.float64]


@dataclass
class Vectors:
    """Words and their vectors ``(n, d)``."""

    words: dict[str, int]
    table: Floats
    kind: str = "vectors"

    def find(self, words: Sequence[str]) -> tuple[list[str], Floats]:
        """The words that are there, as written or else in lower case, and their vectors."""
        at = [(w, self.words.get(w, self.words.get(w.lower()))) for w in words]
        there = [(w, i) for w, i in at if i is not None]
        return [w for w, _ in there], self.table[[i for _, i in there]]


def read_vectors(path: str) -> Vectors:
    """Read a file of word vectors; a first line of two integers is its header.

    Raises:
        ToolError: a line has another number of values than the first, or is no numbers.
    """
    words: dict[str, int] = {}
    rows: list[NDArray[np.float32]] = []
    with _opened(path) as stream:
        for number, raw in enumerate(stream, 1):
            parts = raw.decode("utf-8", "replace").rstrip().split(" ")
            if number == 1 and len(parts) == 2 and all(p.isdigit() for p in parts):
                continue
            try:
                values = np.array(parts[1:], dtype=np.float32)
            except ValueError as exc:
                raise ToolError(f"{path}:{number}: no numbers after the word {parts[0][:30]!r}") from exc
            if not len(values) or (rows and len(values) != len(rows[0])):
                wanted = len(rows[0]) if rows else "some"
                raise ToolError(
                    f"{path}:{number}: {len(values)} numbers after {parts[0][:30]!r}, not {wanted}"
                )
            words.setdefault(parts[0], len(rows))
            rows.append(values)
    if not rows:
        raise ToolError(f"{path}: no word vectors")
    return Vectors(words, np.stack(rows).astype(np.float64))


def _opened(path: str) -> IO[bytes]:
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")
