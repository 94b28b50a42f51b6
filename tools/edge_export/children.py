"""Converters of the runtimes, each run in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from tuneutils.shared.errors import ExitCode, ToolError


def run_child(arguments: Sequence[str], environment: Mapping[str, str], what: str) -> None:
    """Run ``python -m ARGUMENTS``; its failure becomes one line with the right exit code.

    Args:
        what: what cannot be done when it fails, for the message.
    """
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return
    ended = f"ended by signal {-done.returncode}" if done.returncode < 0 else f"exit {done.returncode}"
    lines = done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or [ended]
    known = done.returncode in list(ExitCode) and done.returncode != 1
    code = (
        ExitCode(done.returncode)
        if known
        else ExitCode.RETRYABLE
        if done.returncode < 0
        else ExitCode.BAD_DATA
    )
    raise ToolError(f"{what}: {lines[-1].strip()[:300]}", code=code)
