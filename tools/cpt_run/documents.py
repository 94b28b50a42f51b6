"""Record streams as tokenized documents, and those as rows for training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tuneutils.shared.command import Run
from tuneutils.shared.errors import ToolError
from tuneutils.shared.record_source import Source
from tuneutils.shared.supervise import IGNORE, encode, windows
from tuneutils.tools.cpt_run.packing import best_fit
from tuneutils.tools.cpt_run.params import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Piece:
    """A document, or a stretch of one that is longer than a row; the first token is never learnt."""

    ids: Ids
    labels: Ids


@dataclass
class Corpus:
    """Pieces packed into rows.

    Attributes:
        rows: indices of the pieces of each row.
        documents, tokens: read, and learnt in one pass.
        split: documents longer than a row.
    """

    pieces: list[Piece] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    documents: int = 0
    split: int = 0
    tokens: int = 0

    def row_tokens(self) -> list[int]:
        """Learnt tokens of each row."""
        learnt = [int((piece.labels != IGNORE).sum()) for piece in self.pieces]
        return [sum(learnt[i] for i in row) for row in self.rows]

    def filled(self, max_length: int) -> float:
        """Share of the rows' places that hold a token."""
        return sum(len(p.ids) for p in self.pieces) / (max_length * max(1, len(self.rows)))


def read_corpus(run: Run[Params], source: Source, tokenizer: PreTrainedTokenizerBase, limit: int) -> Corpus:
    """Encode and pack all records of a source; every token of them is learnt, closing EOS included.

    Args:
        limit: tokens of a row.

    Raises:
        ToolError: (65) a record that cannot be encoded, or none at all.
    """
    made = Corpus()
    for item in source.located:
        try:
            encoded = encode(item.record, tokenizer, learn="all", template=run.params.template)
            if not encoded.learnt:
                raise ValueError("nothing in it is learnt")
        except ValueError as exc:
            source.reader.refuse(item, str(exc))
            continue
        made.documents += 1
        made.split += len(encoded) > limit
        for part in windows(encoded, limit) if len(encoded) > limit else [encoded]:
            labels = np.array(part.labels, dtype=np.int32)
            labels[0] = IGNORE
            if (labels != IGNORE).any():
                made.pieces.append(Piece(np.array(part.input_ids, dtype=np.int32), labels))
                made.tokens += part.learnt
    if refused := source.reader.stats.refused:
        run.log.warning("%d bad records left out of the %s", refused, source.role)
    if not made.pieces:
        raise ToolError(f"no document left of the {source.role} ({refused} refused)")
    lengths = [len(piece.ids) for piece in made.pieces]
    made.rows = best_fit(lengths, limit) if run.params.pack else [[i] for i in range(len(lengths))]
    return made
