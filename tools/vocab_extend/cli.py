"""``vocab-extend``: new tokens for a language, and embeddings for them to start from."""

from __future__ import annotations

from tuneutils.shared.command import Run, Summary, tool
from tuneutils.tools.vocab_extend.params import Params


@tool("vocab-extend", Params, group="train", inputs="RECORDS", output="model")
def main(run: Run[Params]) -> Summary:
    """Add the tokens of a language to a model: learnt from RECORDS, text of it (or the tgt of pairs).

    Old tokens keep their numbers and embeddings; new ones come behind them. The result is a model that
    loads as any other, with a report of tokens per word and, with --heldout, bits per byte.
    """
    from tuneutils.tools.vocab_extend.extend import extend

    return extend(run)


if __name__ == "__main__":
    main()
