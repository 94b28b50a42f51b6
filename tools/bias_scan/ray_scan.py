"""The same scan over the machines of a Ray cluster, by Ray Data: each task reads and counts a part of a file.

Files must be where every machine can read them. A plain JSONL file is cut into byte ranges; one that is
compressed, or Parquet, is one part. Tallies do not depend on the cut, unless rare words are forgotten, which
the report says.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from tuneutils.shared.errors import ExitCode, ToolError, require
from tuneutils.shared.records import Reader, Record
from tuneutils.shared.streams import raw_lines
from tuneutils.tools.bias_scan.scan import Refused, Settings, add_block, deal, refuse
from tuneutils.tools.bias_scan.tally import Tally

PART_BYTES = 64 << 20
Part = dict[str, Any]


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
    try:
        ray.init(None if address == "local" else address, log_to_driver=False, include_dashboard=False)
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
        tally, refused = count_part(part, ray.get(kept))
        return {"number": part["number"], "done": (tally, refused)}

    numbered = [{"number": i, **part} for i, part in enumerate(parts)]
    # One part a block, so that as many tasks run as there are cores.
    rows = ray.data.from_items(numbered, override_num_blocks=len(numbered)).map(count).iter_rows()
    whole = settings.tally()
    for row in rows:
        tally, refused = row["done"]
        start = numbered[row["number"]]["start"]
        before = _lines_before(refused[0].path, start) if refused and start else 0
        refuse(reader, [Refused(r.path, r.number + before, r.reason, r.raw) for r in refused])
        whole.merge(tally)
    return whole


def parts_of(path: str, shown: str) -> list[Part]:
    """The byte ranges of a plain file, in order, or the whole of another."""
    size = os.path.getsize(path)
    plain = path.endswith((".jsonl", ".ndjson", ".json"))
    cuts = range(0, max(1, size), PART_BYTES) if plain else [0]
    ends = [*list(cuts)[1:], size] if plain else [-1]
    return [{"path": path, "shown": shown, "start": a, "end": b} for a, b in zip(cuts, ends)]


def count_part(part: Part, settings: Settings) -> tuple[Tally, list[Refused]]:
    """The tally of a part, and its bad lines with their numbers within the part."""
    tally = settings.tally()
    refused: list[Refused] = []
    for blocks, bad in deal(part["shown"], lines_of(part)):
        refused += bad
        refused += [r for block in blocks for r in add_block(tally, block, settings.fields)]
    return tally, refused


def lines_of(part: Part) -> Iterator[tuple[int, bytes | Record]]:
    """The lines that start within the part's bytes; a line belongs where its first byte is."""
    if part["end"] < 0:
        yield from raw_lines(part["path"])
        return
    with open(part["path"], "rb") as source:
        if part["start"]:
            source.seek(part["start"] - 1)
            source.readline()
        number = 0
        while source.tell() < part["end"] and (raw := source.readline()):
            number += 1
            if number == 1 and not part["start"]:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.strip():
                yield number, raw.rstrip(b"\r\n")


def _lines_before(path: str, start: int) -> int:
    """How many lines start before a byte."""
    with open(path, "rb") as source:
        source.seek(start - 1)
        whole = source.read(1) == b"\n"
        source.seek(0)
        count, left = 0, start
        while left and (block := source.read(min(left, 1 << 20))):
            count, left = count + block.count(b"\n"), left - len(block)
    return count if whole else count + 1
