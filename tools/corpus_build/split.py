"""Train and held-out documents: whole source files on one side, the train stream stopped at a size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tuneutils.shared.neardup import mix
from tuneutils.shared.records import dump_line
from tuneutils.tools.corpus_build.extract import cut
from tuneutils.tools.corpus_build.params import BuildParams
from tuneutils.tools.corpus_build.pool import Pool
from tuneutils.tools.corpus_build.tokens import Index

Bytes = int


@dataclass
class Split:
    """Which documents go where.

    Attributes:
        last: of a train stream stopped at a size, the text of the document that is cut to fit.
        unused: documents that the stopped train stream has no room for.
    """

    train: list[int]
    heldout: list[int]
    last: str | None = None
    unused: int = 0

    def write(self, pool: Pool, folder: Path) -> None:
        with open(folder / "train.jsonl", "wb") as sink:
            for i, document in enumerate(self.train):
                cut_short = self.last is not None and i == len(self.train) - 1
                sink.write(
                    dump_line({**pool.record(document), "text": self.last})
                    if cut_short
                    else pool.line(document)
                )
        with open(folder / "heldout.jsonl", "wb") as sink:
            for document in self.heldout:
                sink.write(pool.line(document))


def split(pool: Pool, params: BuildParams, seed: int) -> Split:
    """Hold out source files in the order of a hash until their documents are enough.

    At least one source is on each side where there are two; with one alone nothing is held out.
    """
    living = pool.living()
    order = mix(pool.groups[living] + mix(np.array([seed], np.uint64)))
    groups, owner = np.unique(order, return_inverse=True)
    counts = np.bincount(owner, minlength=len(groups))
    taken = _enough(counts, params.heldout * len(living)) if params.heldout > 0 else 0
    taken = min(taken, len(groups) - 1)
    heldout = living[owner < taken].tolist()
    train = living[owner >= taken]
    if params.train_bytes is None:
        return Split(train.tolist(), heldout)
    return _stopped(pool, train, order[owner >= taken], heldout, params.train_bytes)


def _enough(counts: Index, wanted: float) -> int:
    """How many groups from the start hold about ``wanted`` documents, at least one."""
    sums = np.cumsum(counts)
    at = int(np.searchsorted(sums, math.floor(wanted + 0.5)))
    return max(at + 1, 1) if at < len(sums) else len(sums)


def _stopped(pool: Pool, train: Index, order: Index, heldout: list[int], limit: Bytes) -> Split:
    """Documents in the order of the hash up to ``limit`` bytes of text; the last is cut to fit."""
    chosen: list[int] = []
    left = limit
    for document in train[np.lexsort((train, order))].tolist():
        text = pool.record(document)["text"]
        size = len(text.encode("utf-8"))
        if size > left:
            piece = next(cut(text, left)).strip() if left >= 200 else ""
            last = [document] if piece else []
            return Split(chosen + last, heldout, piece or None, len(train) - len(chosen) - len(last))
        chosen.append(document)
        left -= size
    return Split(chosen, heldout)
