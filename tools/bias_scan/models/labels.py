"""``[LABEL=]PATH`` arguments of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tuneutils.shared.errors import ExitCode, ToolError, nearest


def labelled(given: Sequence[str], baseline: str | None) -> list[tuple[str, str]]:
    """``(label, path)`` of each; the label of a bare path is its folder's or file's name.

    Raises:
        ToolError: two have one label, or the baseline is none of them (2).
    """
    made = [_split(text) for text in given]
    labels = [label for label, _ in made]
    for label in labels:
        if not label or ":" in label:
            raise ToolError(f"{label!r} is no label: empty, or with a colon", code=ExitCode.USAGE)
        if labels.count(label) > 1:
            raise ToolError(f"two are called {label!r}; name them with LABEL=PATH", code=ExitCode.USAGE)
    if baseline is not None and baseline not in labels:
        raise ToolError(
            f"--baseline {baseline}: none of {', '.join(labels)}{nearest(baseline, labels)}",
            code=ExitCode.USAGE,
        )
    return made


def _split(given: str) -> tuple[str, str]:
    label, equals, path = given.partition("=")
    if equals and not Path(given).exists():
        return label, path
    at = Path(given)
    name = at.resolve().name if at.exists() else at.name
    return (name.split(".")[0] if at.is_file() else name), given
