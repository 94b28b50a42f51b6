"""The same scan over the machines of a Ray cluster, by Ray Data: each task reads and counts a part of a file.

Files must be where every machine can read them. A plain JSONL file is cut into byte ranges; one that is
compressed, or Parquet, is one part. Tallies do not depend on the cut, unless rare words are forgotten, which
the report says.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

from tuneutils.shared.errors import ExitCode, ToolError, require
from tuneutils.shared.records import Reader, Record
from tuneutils.shared.streams import raw_lines
from tuneutils.tools.bias_scan.scan import Refused, Settings, add_block, deal, refuse
from tuneutils.tools.bias_scan.tally import Tally

PART_BYTES = 64 << 20
Part = dict[str, Any]
Counted = tuple[Tally, list[Refused], int]


def ray_scan(reader: Reader, settings: Settings, address: str) -> Tally:
    """Scan the reader's files on the cluster at ``address``; ``local`` starts one of this machine's cores.

    Raises:
        ToolError: Ray is not there (69), stdin cannot be read by others (2), or a record is bad (65).
    """
    require("ray", "ray")
    if "-" in reader.paths:
        raise ToolError("--ray needs files that every machine can read, not stdin", code=ExitCode.USAGE)
    parts = [part for path in reader.paths for part in parts_of(os.path.abspath(path), path)]
    _join(address)
    try:
        return _scan(reader, settings, parts)
    finally:
        if address == "local":
            import ray

            ray.shutdown()


def _join(address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")  # a busy machine takes longer than its 60
    import ray

    if ray.is_initialized():
        return
    here: Any = {"_node_ip_address": "127.0.0.1"} if address == "local" else {"address": address}
    try:
        ray.init(log_to_driver=False, include_dashboard=False, **here)
    except Exception as exc:  # Ray raises plain ones
        reason = " ".join(str(exc).split())[:200]
        raise ToolError(f"--ray {address}: no cluster: {reason}", code=ExitCode.UNAVAILABLE) from exc


def _scan(reader: Reader, settings: Settings, parts: list[Part]) -> Tally:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    kept = ray.put(settings)

    def count(part: Part) -> Part:
        return {"done": count_part(part, ray.get(kept))}

    # One part a block, so that as many tasks run as there are cores.
    rows = ray.data.from_items(parts, override_num_blocks=len(parts)).map(count).iter_rows()
    return merged((row["done"] for row in rows), parts, reader, settings)


def merged(done: Iterable[Counted], parts: list[Part], reader: Reader, settings: Settings) -> Tally:
    """The tally of all parts, which come in order; line numbers become those within the file."""
    whole = settings.tally()
    before = 0
    for part, (tally, refused, lines) in zip(parts, done):
        before = before if part["start"] else 0
        refuse(reader, [Refused(r.path, r.number + before, r.reason, r.raw) for r in refused])
        tally.renumber(before)
        whole.merge(tally)
        before += lines
    return whole


def parts_of(path: str, shown: str) -> list[Part]:
    """The byte ranges of a plain file, in order, or the whole of another."""
    size = os.path.getsize(path)
    plain = path.endswith((".jsonl", ".ndjson", ".json"))
    cuts = range(0, max(1, size), PART_BYTES) if plain else [0]
    ends = [*list(cuts)[1:], size] if plain else [-1]
    return [{"path": path, "shown": shown, "start": a, "end": b} for a, b in zip(cuts, ends)]


def count_part(part: Part, settings: Settings) -> Counted:
    """The tally of a part, its bad lines, and how many lines it has; lines are numbered within the part."""
    tally = settings.tally()
    refused: list[Refused] = []
    lines = Lines(part)
    for blocks, bad in deal(part["shown"], iter(lines)):
        refused += bad
        refused += [r for block in blocks for r in add_block(tally, block, settings.fields)]
    return tally, refused, lines.count


class Lines:
    """The lines that start within the part's bytes; a line belongs where its first byte is.

    Attributes:
        count: lines read, blank ones too.
    """

    def __init__(self, part: Part) -> None:
        self.count = 0
        self._part = part

    def __iter__(self) -> Iterator[tuple[int, bytes | Record]]:
        start, end = self._part["start"], self._part["end"]
        if end < 0:
            yield from raw_lines(self._part["path"])
            return
        with open(self._part["path"], "rb") as source:
            if start:
                source.seek(start - 1)
                source.readline()
            while source.tell() < end and (raw := source.readline()):
                self.count += 1
                if self.count == 1 and not start:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                if raw.strip():
                    yield self.count, raw.rstrip(b"\r\n")
