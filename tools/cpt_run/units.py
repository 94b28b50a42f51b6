"""Times and shares as people write them."""

from __future__ import annotations

import re

from tuneutils.shared.errors import ExitCode, ToolError

SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0}


def seconds(text: str) -> float:
    """``1h30m``, ``90s``, ``2.5m`` or ``90`` in seconds.

    Raises:
        ToolError: exit 2, it is no time, or none at all.
    """
    match = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s?)?", text.strip())
    try:
        parts = [float(part) for part in match.groups(default="0")] if match and text.strip() else []
    except ValueError:
        parts = []
    total = sum(part * unit for part, unit in zip(parts, SECONDS.values(), strict=False))
    if not total:
        raise ToolError(f"--budget {text}: no time; write 30m, 90s or 1h30m", code=ExitCode.USAGE)
    return total


def share(text: str, name: str) -> float:
    """``3%`` or ``0.03`` as 0.03.

    Raises:
        ToolError: exit 2, it is neither.
    """
    number, percent = (text.strip()[:-1], True) if text.strip().endswith("%") else (text, False)
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ToolError(f"{name} {text}: no share; write 3% or 0.03", code=ExitCode.USAGE)
    return value
