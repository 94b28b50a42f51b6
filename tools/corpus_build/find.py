"""The files of the inputs, as items of work: what may be read, from where to where, under which licence."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tuneutils.shared import licences
from tuneutils.shared.artifact import MANIFEST, Input, load_manifest, manifest_of
from tuneutils.shared.errors import ToolError
from tuneutils.shared.sources import Resolved, resolve
from tuneutils.tools.corpus_build.extract import PACKED, record_stream

LICENCE_FILE = re.compile(r"(LICEN[CS]E|COPYING|COPYRIGHT)([.-].*)?", re.IGNORECASE)
RANGE_BYTES = 4 << 20
TASK_BYTES = 1 << 20


@dataclass(frozen=True)
class Item:
    """One file, or a stretch of a large one.

    Attributes:
        shown: the path below the input that it came by, as provenance has it.
        start, end: bytes; ``end`` is None for the whole file.
        licence: that of the file's surroundings; the file itself may say another.
    """

    path: str
    shown: str
    licence: str | None
    bytes: int
    start: int = 0
    end: int | None = None
    records: bool = False


@dataclass
class Found:
    """What the walk met: files taken, and those left with the reason."""

    files: int = 0
    bytes: int = 0
    left: Counter[str] = field(default_factory=Counter)
    named: list[dict[str, str]] = field(default_factory=list)

    def leave(self, shown: str, reason: str) -> None:
        self.left[reason] += 1
        self.named.append({"path": shown, "reason": reason})


def bring(text: str) -> tuple[Input, Resolved | None]:
    """An input as the manifest has it, and its files; None for stdin."""
    if text == "-":
        return Input("raw", "-", ""), None
    resolved = resolve(text, "dataset")
    return resolved.as_input("raw"), resolved


def items(
    sources: Sequence[Resolved], found: Found, *, cut_bytes: int, licence: str | None = None
) -> Iterator[Item]:
    """Every readable file below the sources, sorted by path; ``found`` is filled on the way."""
    seen: set[tuple[int, int]] = set()
    for source in sources:
        declared = source.licence if source.licence != licences.UNKNOWN else licence
        for root in source.paths:
            base = root if root.is_dir() else root.parent
            for path, near in _walk(root, base, declared, seen, found):
                yield from _stretches(path, path.relative_to(base).as_posix(), near, cut_bytes, found)


def _walk(
    root: Path, base: Path, declared: str | None, seen: set[tuple[int, int]], found: Found
) -> Iterator[tuple[Path, str | None]]:
    stack: list[tuple[Path, str | None]] = [(root, declared)]
    while stack:
        path, licence = stack.pop()
        shown = path.relative_to(base).as_posix()
        try:
            status = path.stat()
        except OSError as exc:
            found.leave(
                shown, "link without an end" if path.is_symlink() else f"cannot be read ({exc.strerror})"
            )
            continue
        if path.is_dir():
            if path.is_symlink() and base.resolve().is_relative_to(path.resolve()):
                found.leave(shown, "link to a folder above")
                continue
            key = (status.st_dev, status.st_ino)
            if key in seen:
                found.leave(shown, "folder met before (a link)")
                continue
            seen.add(key)
            below = _below(path, shown, found)
            near = _near(below, licence)
            stack += [(p, near) for p in below]
        elif not path.is_file():
            found.leave(shown, "no regular file")
        elif path == root or not _passed_over(path.name):
            yield path, licence
        else:
            found.leave(shown, "hidden, or a manifest")


def _below(folder: Path, shown: str, found: Found) -> list[Path]:
    try:
        return sorted(folder.iterdir(), reverse=True)
    except OSError as exc:
        found.leave(shown, f"cannot be read ({exc.strerror})")
        return []


def _passed_over(name: str) -> bool:
    return name.startswith(".") or name == MANIFEST or name.endswith(f".{MANIFEST}")


def _near(below: Sequence[Path], licence: str | None) -> str | None:
    """The licence that a folder's own manifest or licence file gives, else that of its parent."""
    for path in below:
        try:
            if path.name == MANIFEST:
                return load_manifest(path).get("licence") or licence
            if LICENCE_FILE.fullmatch(path.name) and path.is_file() and path.stat().st_size < 1 << 20:
                text = licences.of_text(path.read_text(encoding="utf-8", errors="replace"))
                return text if text != licences.UNKNOWN else licence
        except (OSError, ToolError):
            continue
    return licence


def _stretches(path: Path, shown: str, licence: str | None, cut_bytes: int, found: Found) -> Iterator[Item]:
    size = path.stat().st_size
    found.files += 1
    found.bytes += size
    beside = path.with_name(f"{path.name}.{MANIFEST}")
    if beside.is_file() and (manifest := manifest_of(path)):
        licence = load_manifest(manifest).get("licence") or licence
    item = Item(str(path), shown, licence, size, records=record_stream(path.name))
    if item.records and not path.name.endswith((*PACKED, ".parquet")):
        yield from _ranges(item, RANGE_BYTES, (b"\n",))
    elif not item.records and size > cut_bytes and _plain(path):
        yield from _ranges(item, cut_bytes, (b"\n\n", b"\n", b" "))
    else:
        yield item


def _plain(path: Path) -> bool:
    """Whether a large file is text that can be cut anywhere between lines."""
    if path.name.lower().endswith((*PACKED, ".html", ".htm", ".xhtml", ".pdf")):
        return False
    try:
        with open(path, "rb") as stream:
            head = stream.read(8192)
    except OSError:
        return False
    return b"\0" not in head and not head.startswith((b"%PDF-", b"\xff\xfe", b"\xfe\xff"))


def _ranges(item: Item, step: int, marks: Sequence[bytes]) -> Iterator[Item]:
    """Stretches of at most ``step`` bytes that end after a mark; of records, longer where none comes."""
    start = 0
    try:
        with open(item.path, "rb") as stream:
            while start < item.bytes:
                end = min(start + step, item.bytes)
                if end < item.bytes:
                    end = _cut(stream, start, end, item.bytes, marks, longer=item.records)
                yield replace(item, start=start, end=end, bytes=end - start)
                start = end
    except OSError:
        yield item
    if not item.bytes:
        yield item


def _cut(stream: object, start: int, end: int, size: int, marks: Sequence[bytes], *, longer: bool) -> int:
    read = stream.read  # type: ignore[attr-defined]
    seek = stream.seek  # type: ignore[attr-defined]
    back = max(start, end - (end - start) // 2)
    seek(back)
    tail = read(end - back)
    for mark in marks:
        at = tail.rfind(mark)
        if at >= 0:
            return back + at + len(mark)
    if not longer:
        while end > start + 1 and tail[end - back - 1] & 0xC0 == 0x80:  # not inside a character
            end -= 1
        return end - 1 if end - 1 > start and tail[end - back - 1] >= 0xC0 else end
    while end < size:
        seek(end)
        block = read(1 << 20)
        at = block.find(marks[0])
        if at >= 0:
            return end + at + 1
        end += len(block)
    return size


def tasks(found_items: Iterator[Item]) -> Iterator[list[Item]]:
    """Items in groups of about ``TASK_BYTES``; the same groups for any number of workers."""
    group: list[Item] = []
    size = 0
    for item in found_items:
        group.append(item)
        size += item.bytes
        if size >= TASK_BYTES or len(group) >= 500:
            yield group
            group, size = [], 0
    if group:
        yield group


def spdx(head: str) -> str | None:
    """The licence that a file's own ``SPDX-License-Identifier`` names."""
    match = re.search(r"SPDX-License-Identifier:\s*([\w.+() -]+?)\s*(?:\*/|-->|$)", head, re.MULTILINE)
    return match.group(1) if match else None


def lines_before(path: str, start: int) -> int:
    """How many lines of a file lie before a byte."""
    lines = 0
    with open(path, "rb") as stream:
        while start > 0 and (block := stream.read(min(1 << 20, start))):
            lines += block.count(b"\n")
            start -= len(block)
    return lines
