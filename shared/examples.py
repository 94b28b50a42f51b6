"""From record streams to encoded examples, with what is too long handled by name and place.

The run's parameters are those of a tool that tunes: ``max_length``, ``too_long``, ``learn``, ``template``.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tuneutils.shared.command import Run
from tuneutils.shared.errors import ToolError
from tuneutils.shared.record_source import Source
from tuneutils.shared.records import Located, format_of
from tuneutils.shared.supervise import Encoded, encode, windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Examples:
    """Encoded examples with what happened on the way."""

    encoded: list[Encoded]
    truncated: int = 0
    dropped: int = 0
    split: int = 0
    without_end: int = 0

    @property
    def tokens(self) -> int:
        return sum(map(len, self.encoded))

    @property
    def learnt(self) -> int:
        return sum(e.learnt for e in self.encoded)


def encode_all(
    run: Run[Any], source: Source, tokenizer: PreTrainedTokenizerBase, context: int | None = None
) -> Examples:
    """Encode every record; one that is too long is treated as ``--too-long`` says.

    Args:
        context: the longest sequence that the model was made for, in tokens.

    Raises:
        ToolError: exit 65 with file, line and reason, unless ``--on-error`` says otherwise.
    """
    params = run.params
    limit = min(params.max_length, context or params.max_length)
    made = Examples([])
    for item in source.located:
        try:
            encoded = encode(item.record, tokenizer, learn=params.learn, template=params.template)
            if not encoded.learnt:
                raise ValueError("nothing in it is learnt")
            _add(made, item, encoded, params, limit)
        except ValueError as exc:
            source.reader.refuse(item, str(exc))
    if not made.encoded:
        raise ToolError(f"no example left to learn from ({source.reader.stats.refused} refused)")
    for count, what in (
        (source.reader.stats.refused, "bad records left out"),
        (made.truncated, f"examples cut to {limit} tokens"),
        (made.dropped, f"examples over {limit} tokens dropped"),
        (made.split, f"texts over {limit} tokens split"),
    ):
        if count:
            run.log.warning("%d %s", count, what)
    return made


def _add(made: Examples, item: Located, encoded: Encoded, params: Any, limit: int) -> None:
    if len(encoded) <= limit:
        made.encoded.append(encoded)
    elif format_of(item.record) == "text":
        pieces = windows(encoded, limit)
        made.encoded += pieces
        made.split += 1
        made.without_end += len(pieces) - 1
    elif params.too_long == "error":
        what = f"--max-length {limit}" if limit == params.max_length else f"the model's context of {limit}"
        raise ValueError(
            f"has {len(encoded)} tokens, more than {what} (--too-long truncate or drop lets it pass)"
        )
    else:
        cut = Encoded(encoded.input_ids[:limit], encoded.labels[:limit])
        if params.too_long == "truncate" and cut.learnt:
            made.encoded.append(cut)
            made.truncated += 1
            made.without_end += 1
        else:
            made.dropped += 1


def print_labels(run: Run[Any], examples: Examples, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Show the first ``show_labels`` examples with what is learnt marked; colours only on a terminal."""
    from tuneutils.shared.supervise import show_labels

    sink = sys.stderr if run.json else sys.stdout
    color = sink.isatty() and not os.environ.get("NO_COLOR")
    for encoded in examples.encoded[: run.params.show_labels]:
        print(show_labels(encoded, tokenizer, color=color), file=sink)
        print(f"-- {len(encoded)} tokens, {encoded.learnt} learnt", file=sink)
    return {"examples": len(examples.encoded), "tokens": examples.tokens, "learnt_tokens": examples.learnt}
