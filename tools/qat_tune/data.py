"""From record streams to encoded examples, with what is too long handled by name and place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tuneutils.shared.command import Run
from tuneutils.shared.errors import ToolError
from tuneutils.shared.record_source import Source
from tuneutils.shared.records import Located, format_of
from tuneutils.shared.supervise import Encoded, encode, windows
from tuneutils.tools.qat_tune.params import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Examples:
    """Encoded examples, and what happened on the way.

    Attributes:
        origin: for each example the index of its record, counted from 0.
    """

    encoded: list[Encoded] = field(default_factory=list)
    origin: list[int] = field(default_factory=list)
    cut: int = 0
    dropped: int = 0

    @property
    def tokens(self) -> int:
        return sum(map(len, self.encoded))

    @property
    def learnt(self) -> int:
        return sum(e.learnt for e in self.encoded)


def encode_stream(
    run: Run[Params], stream: Source, tokenizer: PreTrainedTokenizerBase, limit: int
) -> Examples:
    """Encode every record; plain text over ``limit`` tokens is split, the rest as ``--too-long`` says.

    Raises:
        ToolError: (65) a record that cannot be encoded or is too short or long, or none at all.
    """
    made = Examples()
    for number, item in enumerate(stream.located):
        try:
            pieces = _encode(item, tokenizer, run.params, limit, made)
        except ValueError as exc:
            stream.reader.refuse(item, str(exc))
            continue
        made.encoded += pieces
        made.origin += [number] * len(pieces)
    refused = stream.reader.stats.refused
    if not made.encoded:
        raise ToolError(f"no example left of the {stream.role} ({refused} refused, {made.dropped} dropped)")
    for count, what in (
        (refused, "bad records left out"),
        (made.cut, f"examples cut to {limit} tokens"),
        (made.dropped, f"examples over {limit} tokens dropped"),
    ):
        if count:
            run.log.warning("%d %s", count, what)
    return made


def _encode(
    item: Located, tokenizer: PreTrainedTokenizerBase, params: Params, limit: int, made: Examples
) -> list[Encoded]:
    """One record as examples of at most ``limit`` tokens.

    Raises:
        ValueError: nothing in it is learnt, or it is too long.
    """
    encoded = encode(item.record, tokenizer, learn=params.learn, template=params.template)
    if not encoded.learnt:
        raise ValueError(f"too short: of {len(encoded)} tokens none is learnt")
    if len(encoded) <= limit:
        return [encoded]
    if format_of(item.record) == "text":
        return [piece for piece in windows(encoded, limit) if piece.learnt]
    if params.too_long == "error":
        raise ValueError(
            f"has {len(encoded)} tokens, more than {limit} (--too-long truncate or drop lets it pass)"
        )
    cut = Encoded(encoded.input_ids[:limit], encoded.labels[:limit])
    if params.too_long == "truncate" and cut.learnt:
        made.cut += 1
        return [cut]
    made.dropped += 1
    return []
