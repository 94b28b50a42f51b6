"""Two files that belong together: Moses' line-aligned texts, and subtitles that show at the same time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tuneutils.shared.errors import ToolError
from tuneutils.shared.streams import open_binary

_TIME = re.compile(r"(?:(\d+):)?(\d+):(\d+)[,.](\d+)\s*-->\s*(?:(\d+):)?(\d+):(\d+)[,.](\d+)")
_TAG = re.compile(r"<[^>]*>|\{\\[^}]*\}")
#: The share of the shorter of two subtitles that must show together with the other.
OVERLAP = 0.5

Cue = tuple[float, float, str]


def read_lines(path: Path | str) -> list[str]:
    """The lines of a UTF-8 text, plain or packed, blank ones too.

    Raises:
        ToolError: not UTF-8, with the line (65).
    """
    with open_binary(str(path)) as stream:
        raw = stream.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = raw.count(b"\n", 0, exc.start) + 1
        raise ToolError(f"{path}:{line}: not UTF-8: byte 0x{raw[exc.start]:02x}") from exc
    lines = text.split("\n")
    return [line.rstrip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


def moses(src: Path, tgt: Path) -> Iterator[tuple[str, str]]:
    """Line i of one file with line i of the other.

    Raises:
        ToolError: one has more lines (65).
    """
    left, right = read_lines(src), read_lines(tgt)
    if len(left) != len(right):
        raise ToolError(
            f"{src} has {len(left)} lines, {tgt} has {len(right)}: not line-aligned; try xl-parallel align"
        )
    yield from zip(left, right)


def cues(path: Path) -> list[Cue]:
    """Start and end in seconds, and the text on one line, of SubRip or WebVTT."""
    found: list[Cue] = []
    waiting: tuple[float, float] | None = None
    text: list[str] = []
    for line in [*read_lines(path), ""]:
        if match := _TIME.search(line):
            waiting, text = _times(match), []
        elif line.strip() and waiting:
            text.append(_TAG.sub("", line).strip())
        elif waiting:
            if shown := " ".join(t for t in text if t):
                found.append((*waiting, shown))
            waiting = None
    if not found:
        raise ToolError(f"{path}: no subtitles (SubRip or WebVTT times, 00:00:01,000 --> 00:00:02,000)")
    return found


def _times(match: re.Match[str]) -> tuple[float, float]:
    parts = [int(g or 0) for g in match.groups()]
    fractions = [int(match.group(i)) / 10 ** len(match.group(i)) for i in (4, 8)]
    return (
        parts[0] * 3600 + parts[1] * 60 + parts[2] + fractions[0],
        parts[4] * 3600 + parts[5] * 60 + parts[6] + fractions[1],
    )


def subtitles(src: Path, tgt: Path) -> Iterator[tuple[str, str]]:
    """Texts that show together: groups joined by an overlap of ``OVERLAP`` of the shorter one's time."""
    left, right = sorted(cues(src)), sorted(cues(tgt))
    i = j = 0
    while i < len(left) and j < len(right):
        if not _together(left[i], right[j]):
            if left[i][1] <= right[j][1]:
                i += 1
            else:
                j += 1
            continue
        a, b = i + 1, j + 1
        while (a < len(left) and _together(left[a], right[b - 1])) or (
            b < len(right) and _together(left[a - 1], right[b])
        ):
            if a < len(left) and _together(left[a], right[b - 1]):
                a += 1
            else:
                b += 1
        yield " ".join(c[2] for c in left[i:a]), " ".join(c[2] for c in right[j:b])
        i, j = a, b


def _together(a: Cue, b: Cue) -> bool:
    shared = min(a[1], b[1]) - max(a[0], b[0])
    return shared > 0 and shared >= OVERLAP * min(a[1] - a[0], b[1] - b[0])
