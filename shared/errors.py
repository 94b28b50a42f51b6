"""The one error class that users see, and the exit codes of every command."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """Exit codes, after sysexits.h where it has a name for the case."""

    OK = 0
    GATE_FAILED = 1
    USAGE = 2
    BAD_DATA = 65
    MISSING_INPUT = 66
    UNAVAILABLE = 69
    BUG = 70
    CANNOT_WRITE = 73
    RETRYABLE = 75
    INTERRUPTED = 130
    BROKEN_PIPE = 141


class ToolError(Exception):
    """A failure that the user can act on: one line naming the value, the cause and what to try next.

    Args:
        message: the line shown after ``TOOL: error:``.
        code: the process's exit code.
    """

    def __init__(self, message: str, *, code: ExitCode = ExitCode.BAD_DATA) -> None:
        super().__init__(message)
        self.code = code


class GateFailed(ToolError):
    """The tool ran and the answer is no (exit 1)."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code=ExitCode.GATE_FAILED)


class UpToDate(Exception):
    """The output is already there, made from the same inputs with the same parameters.

    Args:
        manifest: the existing output's manifest.
    """

    def __init__(self, manifest: Mapping[str, Any]) -> None:
        super().__init__("up to date")
        self.manifest = manifest


def nearest(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the known name nearest to ``name``, or the empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""


def require(module: str, extra: str) -> None:
    """Raise with the install line, exit 69, when an optional package is absent.

    Args:
        module: import name, e.g. ``"bitsandbytes"``.
        extra: the extra of tuneutils that installs it, e.g. ``"qlora"``.
    """
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise ToolError(
            f"the package {module!r} is not installed; run: pip install 'tuneutils[{extra}]'",
            code=ExitCode.UNAVAILABLE,
        )
