"""From record streams to encoded examples, with what is too long handled by name and place."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tuneutils.shared.artifact import Input, describe_input, work_dir
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.records import Located, Reader, dump_line, format_of
from tuneutils.shared.supervise import LEARNABLE, Encoded, encode, windows
from tuneutils.tools.lora_tune.params import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Source:
    """The records of a run, read and validated but not yet encoded."""

    reader: Reader
    located: list[Located]
    inputs: list[Input]


@dataclass
class Examples:
    """Encoded examples with what happened on the way."""

    encoded: list[Encoded]
    truncated: int = 0
    dropped: int = 0
    split: int = 0

    @property
    def tokens(self) -> int:
        return sum(map(len, self.encoded))

    @property
    def learnt(self) -> int:
        return sum(e.learnt for e in self.encoded)


def read_source(run: Run[Params], paths: Sequence[str], role: str) -> Source:
    """Read and validate record streams; stdin is hashed by its content."""
    if "-" in paths and _world_size() > 1:
        raise ToolError(
            "several processes cannot share stdin; give the records as a file", code=ExitCode.USAGE
        )
    quarantine = None
    if run.on_error == "quarantine" and run.output is not None:
        quarantine = work_dir(run.output) / f"{role}.quarantine.jsonl"
    inputs = [describe_input(role, path) for path in paths if path != "-"]
    reader = Reader(paths, formats=LEARNABLE, on_error=run.on_error, quarantine=quarantine)
    located = list(reader.located())
    if "-" in paths:
        digest = hashlib.sha256()
        for item in located:
            if item.path in ("-", "<stdin>"):
                digest.update(dump_line(item.record))
        inputs.append(Input(role, "-", digest.hexdigest()))
    return Source(reader, located, inputs)


def encode_all(run: Run[Params], source: Source, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Encode every record; one that is too long is treated as ``--too-long`` says.

    Raises:
        ToolError: exit 65 with file, line and reason, unless ``--on-error`` says otherwise.
    """
    params = run.params
    made = Examples([])
    for item in source.located:
        try:
            encoded = encode(item.record, tokenizer, learn=params.learn, template=params.template)
            if not encoded.learnt:
                raise ValueError("nothing in it is learnt")
            _add(made, item, encoded, params)
        except ValueError as exc:
            source.reader.refuse(item, str(exc))
    if not made.encoded:
        raise ToolError(f"no example left to learn from ({source.reader.stats.refused} refused)")
    for count, what in (
        (source.reader.stats.refused, "bad records left out"),
        (made.truncated, f"examples cut to {params.max_length} tokens"),
        (made.dropped, f"examples over {params.max_length} tokens dropped"),
        (made.split, f"texts over {params.max_length} tokens split"),
    ):
        if count:
            run.log.warning("%d %s", count, what)
    return made


def _add(made: Examples, item: Located, encoded: Encoded, params: Params) -> None:
    if len(encoded) <= params.max_length:
        made.encoded.append(encoded)
    elif format_of(item.record) == "text":
        made.encoded += windows(encoded, params.max_length)
        made.split += 1
    elif params.too_long == "drop":
        made.dropped += 1
    elif params.too_long == "truncate":
        cut = Encoded(encoded.input_ids[: params.max_length], encoded.labels[: params.max_length])
        if cut.learnt:
            made.encoded.append(cut)
            made.truncated += 1
        else:
            made.dropped += 1
    else:
        raise ValueError(
            f"has {len(encoded)} tokens, more than --max-length {params.max_length} "
            "(--too-long truncate or drop lets it pass)"
        )


def print_labels(run: Run[Params], examples: Examples, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Show the first examples on stdout with what is learnt marked; colours only on a terminal."""
    from tuneutils.shared.supervise import show_labels

    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for encoded in examples.encoded[: run.params.show_labels]:
        print(show_labels(encoded, tokenizer, color=color))
        print(f"-- {len(encoded)} tokens, {encoded.learnt} learnt")
    return {"examples": len(examples.encoded), "tokens": examples.tokens, "learnt_tokens": examples.learnt}


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
