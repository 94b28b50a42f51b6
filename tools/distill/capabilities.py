"""Named sets of held-out records: the whole, filters of it, and further files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tuneutils.shared.artifact import Input, describe_input
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.record_source import Source
from tuneutils.shared.records import Located
from tuneutils.tools.distill.data import open_stream
from tuneutils.tools.distill.params import Params

HELDOUT = "heldout"


@dataclass(frozen=True)
class Capability:
    """A name, and which records show it: a stream of its own, or those held out whose field fits."""

    name: str
    stream: Source | None = None
    field: str = ""
    pattern: re.Pattern[str] | None = None

    def pick(self, heldout: Sequence[Located]) -> list[Located]:
        """Its records.

        Raises:
            ToolError: no held-out record fits.
        """
        if self.stream is not None:
            return list(self.stream.located)
        assert self.pattern is not None
        found = [i for i in heldout if self.pattern.search(str(i.record.get(self.field, "")))]
        if not found:
            raise ToolError(
                f"--capability {self.name}: no held-out record has a field {self.field!r} "
                f"that fits {self.pattern.pattern!r}"
            )
        return found


def parse_capabilities(run: Run[Params]) -> tuple[list[Capability], list[Input]]:
    """The capabilities asked for, files opened and hashed.

    Raises:
        ToolError: exit 2: no name, a name twice, a bad pattern, or a filter without ``--heldout``.
    """
    made: list[Capability] = []
    inputs: list[Input] = []
    for given in run.params.capability:
        name, equals, what = given.partition("=")
        if not (name and equals and what):
            raise ToolError(
                f"--capability {given}: must be NAME=FILE or NAME=FIELD~REGEX", code=ExitCode.USAGE
            )
        if name == HELDOUT or name in {c.name for c in made}:
            raise ToolError(f"--capability {given}: the name {name!r} is taken", code=ExitCode.USAGE)
        field, tilde, pattern = what.partition("~")
        if Path(what).exists() or not tilde:
            stream = open_stream(run, [what], f"capability-{name}")
            inputs += [describe_input(f"capability-{name}", what)]
            made.append(Capability(name, stream))
            continue
        if not run.params.heldout:
            raise ToolError(f"--capability {given}: filters --heldout, which is missing", code=ExitCode.USAGE)
        try:
            made.append(Capability(name, None, field, re.compile(pattern)))
        except re.error as exc:
            raise ToolError(f"--capability {given}: {exc}", code=ExitCode.USAGE) from exc
    return made, inputs
