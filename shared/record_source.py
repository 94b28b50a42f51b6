"""The record streams that a run reads: hashed at once, read only when they are needed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tuneutils.shared.artifact import Input, describe_input, work_dir
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.processes import is_main, world_size
from tuneutils.shared.records import Located, Reader, dump_line
from tuneutils.shared.streams import Record


@dataclass
class Source:
    """Record streams of one role, hashed but not yet read: a run that is up to date need not read them."""

    role: str
    reader: Reader
    inputs: list[Input]
    located: Iterable[Located]


def open_source(
    run: Run[Any],
    paths: Sequence[str],
    role: str,
    *,
    formats: Sequence[str] = (),
    validate: Callable[[Record], None] | None = None,
) -> Source:
    """Hash record streams; stdin, which can be read only once, is read here and hashed by its records.

    Args:
        role: among the inputs of the artifact; refused records are kept apart under this name.
        formats, validate: what the records must be; see `Reader`.

    Raises:
        ToolError: no such file (66), or stdin shared by several processes (2).
    """
    if "-" in paths and world_size() > 1:
        raise ToolError(
            "several processes cannot share stdin; give the records as a file", code=ExitCode.USAGE
        )
    quarantine = None
    if run.on_error == "quarantine" and run.output is not None:
        # Every process reads all records; only the first keeps the refused ones.
        quarantine = work_dir(run.output) / f"{role}.quarantine.jsonl" if is_main() else os.devnull
    reader = Reader(paths, formats=formats, on_error=run.on_error, quarantine=quarantine, validate=validate)
    inputs = [describe_input(role, path) for path in paths if path != "-"]
    if "-" not in paths:
        return Source(role, reader, inputs, reader.located())
    located = list(reader.located())
    lines = b"".join(dump_line(item.record) for item in located if item.path in ("-", "<stdin>"))
    inputs.append(Input(role, "-", hashlib.sha256(lines).hexdigest()))
    return Source(role, reader, inputs, located)
