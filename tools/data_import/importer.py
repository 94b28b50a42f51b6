"""Rows of any source → records: mapped, checked, deduplicated, subsetted, divided and counted."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import (
    MANIFEST,
    Artifact,
    Input,
    load_manifest,
    portable_path,
    sha256_file,
    sidecar,
)
from tuneutils.shared.command import Run, Summary
from tuneutils.shared.errors import ExitCode, ToolError, UpToDate, nearest
from tuneutils.shared.records import (
    FORMATS,
    STREAM_SUFFIXES,
    Located,
    Reader,
    Record,
    Writer,
    check,
    format_of,
    open_writer,
)
from tuneutils.shared.sources import UNKNOWN, Source, parse, resolve_source
from tuneutils.tools.data_import.cli import Params
from tuneutils.tools.data_import.rows import RowOptions, data_files, hub_rows, rows
from tuneutils.tools.data_import.shapes import mapped, to_record
from tuneutils.tools.data_import.subset import digest, parse_split, side_of, smallest
from tuneutils.tools.data_import.testsets import TEST_SET, test_set_of

PLACEHOLDER = re.compile(r"\{\{\s*\w+\s*\}\}")
ALLOWED = tuple(name for name in FORMATS if name != "prompt")


@dataclass
class Counts:
    """What happened to every row read; ``read`` is the sum of the others."""

    read: int = 0
    written: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    sides: Counter[str] = field(default_factory=Counter)
    placeholders: int = 0

    def as_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"read": self.read, "written": self.written, "dropped": dict(self.dropped)}
        out["formats"] = dict(self.formats)
        if self.sides:
            out["split"] = dict(self.sides)
        return out


def import_data(run: Run[Params]) -> Summary:
    """Import ``run.inputs`` into the stream or folder ``run.output``."""
    Plan.of(run.params)
    output = str(run.output)
    to_file = output != "-" and names_a_stream(output)
    if run.params.split and (to_file or output == "-"):
        raise ToolError("--split writes several streams: name a folder with -o", code=ExitCode.USAGE)
    found = [_bring(text, run) for text in run.inputs]
    inputs = [given for given, _ in found]
    licence = " AND ".join(dict.fromkeys(i.licence or UNKNOWN for i in inputs))
    if UNKNOWN in licence:
        run.log.warning("a source declares no licence; name it with --licence")
    origin = ", ".join(i.source or i.path for i in inputs)
    importer = Importer(run, [rows_of for _, rows_of in found])
    if output == "-":
        with open_writer("-") as writer:
            importer.write({"": writer})
        run.log.info("licence %s; source %s", licence, origin)
    elif to_file:
        _require_free(run, inputs)
        with open_writer(output) as writer:
            importer.write({"": writer})
        if Path(output).is_file():
            sidecar(
                run, Path(output), inputs, licence=licence, source=origin, metrics=importer.counts.as_json()
            )
    else:
        with run.artifact("records", inputs) as art:
            importer.write_folder(art)
            art.licence, art.source, art.metrics = licence, origin, importer.counts.as_json()
    importer.report()
    return {"output": output, "licence": licence, "source": origin, **importer.counts.as_json()}


def names_a_stream(output: str) -> bool:
    """Whether ``-o`` names a file rather than a folder: by its ending, or as a device or named pipe.

    Raises:
        ToolError: it looks like a file of a kind that is not written (2).
    """
    if output.endswith(STREAM_SUFFIXES):
        return True
    if output.endswith((".json", ".csv", ".tsv", ".txt", ".gz", ".zst")):
        endings = ", ".join(STREAM_SUFFIXES)
        raise ToolError(f"-o {output}: a record stream ends in one of {endings}", code=ExitCode.USAGE)
    path = Path(output)
    return path.exists() and not path.is_dir() and not path.is_file()


@dataclass(frozen=True)
class Plan:
    """The parameters that need parsing."""

    mapping: tuple[tuple[str, str], ...]
    replacements: tuple[tuple[str, str], ...]
    drop: re.Pattern[str] | None
    shares: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, params: Params) -> Plan:
        """Raises ToolError (2) for what cannot be parsed."""
        try:
            drop = re.compile(params.drop_matching) if params.drop_matching else None
        except re.error as exc:
            raise ToolError(f"--drop-matching: not a regular expression: {exc}", code=ExitCode.USAGE) from exc
        return cls(
            tuple(_assignment("--map", a) for a in params.map),
            tuple(_assignment("--replace", a) for a in params.replace),
            drop,
            parse_split(params.split) if params.split else (),
        )


def _assignment(flag: str, text: str) -> tuple[str, str]:
    left, mark, right = text.partition("=")
    if not mark or not left or (flag == "--map" and not right):
        raise ToolError(f"{flag} {text!r}: write LEFT=RIGHT", code=ExitCode.USAGE)
    return left, right


class RowSource:
    """The rows of one resolved source; iterate with the reader that judges bad lines."""

    def __init__(
        self, files: Sequence[str], options: RowOptions, dataset: Any = None, shown: str = ""
    ) -> None:
        self.files, self.options, self.dataset, self.shown = files, options, dataset, shown

    def located(self, open_reader: Callable[[str], Reader]) -> Iterator[tuple[Located, Reader]]:
        """Every row with the reader whose ``refuse`` takes it back if it is bad."""
        for file in self.files or [self.shown]:
            reader = open_reader(file)
            found = (
                hub_rows(self.dataset, file) if self.dataset is not None else rows(file, self.options, reader)
            )
            for located in found:
                yield located, reader


def _bring(text: str, run: Run[Params]) -> tuple[Input, RowSource]:
    """Resolve one source to the manifest's entry and its rows."""
    params = run.params
    options = RowOptions(params.records_key, params.text_unit)
    if text == "-":
        return Input("source", "-", "", licence=params.licence or UNKNOWN), RowSource(["-"], options)
    source = parse(text)
    if source.scheme == "hf" and source.member is None:
        return _hub_dataset(source, run)
    resolved = resolve_source(source, "dataset")
    files = [str(p) for p in data_files(resolved.paths, text)]
    return resolved.as_input("source", params.licence), RowSource(files, options)


def _hub_dataset(source: Source, run: Run[Params]) -> tuple[Input, RowSource]:
    """A Hub data set by id: fetched at a commit, then opened by ``datasets`` without any of its code."""
    from tuneutils.shared.errors import require

    require("datasets", "train")
    resolved = resolve_source(source, "dataset")
    import datasets

    datasets.disable_progress_bars()
    try:
        split = datasets.load_dataset(
            str(resolved.path), run.params.subset, split=run.params.hub_split, streaming=True
        )
    except (ValueError, FileNotFoundError) as exc:
        raise ToolError(f"{source}: {' '.join(str(exc).split())[:240]}", code=ExitCode.MISSING_INPUT) from exc
    return resolved.as_input("source", run.params.licence), RowSource(
        [], RowOptions(), split, resolved.source
    )


class Importer:
    """Runs rows through mapping, checks, deduplication and subsetting, and counts what happens to each."""

    def __init__(self, run: Run[Params], sources: Sequence[RowSource]) -> None:
        self.run, self.params, self.sources = run, run.params, sources
        self.plan = Plan.of(run.params)
        self.counts = Counts()
        self.readers: list[Reader] = []

    def write(self, sinks: dict[str, Writer]) -> None:
        """Write every record to the sink of its side (``""`` without a split)."""
        for record in self._subset():
            side = side_of(record, self.plan.shares, self.run.seed) if self.plan.shares else ""
            sinks[side].write(record)
            self.counts.written += 1
            kind = TEST_SET if self._is_test_set(record) else str(format_of(record))
            self.counts.formats[kind] += 1
            if side:
                self.counts.sides[side] += 1
        for reader in self.readers:
            self.counts.read += reader.stats.refused
            self.counts.dropped.update(reader.stats.reasons)
        self._require_some(sinks)

    def write_folder(self, art: Artifact) -> None:
        names = [name for name, _ in self.plan.shares] or ["records"]
        with ExitStack() as stack:
            opened = {n: stack.enter_context(open_writer(art.dir / f"{n}.jsonl")) for n in names}
            self.write(opened if self.plan.shares else {"": opened["records"]})

    def _require_some(self, sinks: dict[str, Writer]) -> None:
        if not self.counts.written:
            why = ", ".join(f"{n} {reason}" for reason, n in self.counts.dropped.most_common(3))
            raise ToolError(
                f"{', '.join(self.run.inputs)}: no records"
                + (f" ({self.counts.read} read: {why})" if why else "")
            )
        for side, writer in sinks.items():
            if not writer.written:
                raise ToolError(
                    f"--split: {side!r} got none of {self.counts.written} records; give it a larger share"
                )

    def _subset(self) -> Iterator[Record]:
        records = self._distinct()
        if self.params.sample is not None:
            everything = list(records)
            kept = smallest(everything, self.params.sample, self.run.seed)
            self._drop("not sampled", len(everything) - len(kept))
            records = iter(kept)
        return islice(records, self.params.limit)

    def _distinct(self) -> Iterator[Record]:
        seen: set[bytes] = set()
        for record in self._records():
            if self.params.dedup:
                key = digest(record)
                if key in seen:
                    self._drop("exact duplicate", 1)
                    continue
                seen.add(key)
            yield record

    def _drop(self, reason: str, count: int) -> None:
        if count:
            self.counts.dropped[reason] += count

    def _records(self) -> Iterator[Record]:
        for source in self.sources:
            for located, reader in source.located(self._open_reader):
                try:
                    record = self._record(located.record)
                except ValueError as exc:
                    reader.refuse(located, str(exc), located.record)
                    continue
                self.counts.read += 1
                if record is None:
                    self._drop("matches --drop-matching", 1)
                else:
                    yield record

    def _open_reader(self, file: str) -> Reader:
        """A reader of one file, with a quarantine of its own beside the output."""
        quarantine = None
        if self.run.output not in (None, "-"):
            number = f"-{len(self.readers) + 1}" if self.readers else ""
            quarantine = f"{self.run.output}.quarantine{number}.jsonl"
        stream = file if file == "-" or file.endswith(STREAM_SUFFIXES) else "-"
        reader = Reader([stream], on_error=self.run.on_error, quarantine=quarantine, allow_empty=True)
        self.readers.append(reader)
        if self.run.on_error == "quarantine":
            Path(str(quarantine)).unlink(missing_ok=True)
        return reader

    def _record(self, row: Record) -> Record | None:
        """One row as a checked record; None when ``--drop-matching`` says so."""
        fields = mapped(row, self.plan.mapping) if self.plan.mapping else row
        record = to_record(fields, self.params.format)
        record = {**self._kept(fields, record), **record}
        record = _replaced(record, self.plan.replacements)
        strings = "\n".join(_strings(record))
        if self.plan.drop is not None and self.plan.drop.search(strings):
            return None
        if not self._is_test_set(record):
            check(record, ALLOWED)
        self.counts.placeholders += bool(PLACEHOLDER.search(strings))
        return record

    def _is_test_set(self, record: Record) -> bool:
        return self.params.format in ("auto", TEST_SET) and test_set_of(record) is not None

    def _kept(self, row: Record, record: Record) -> Record:
        """The fields that ``--keep`` names."""
        if "*" in self.params.keep:
            return {k: v for k, v in row.items() if k not in record}
        absent = [name for name in self.params.keep if name not in row]
        if absent:
            raise ValueError(f"field {absent[0]!r}: absent, but --keep names it{nearest(absent[0], row)}")
        return {k: row[k] for k in self.params.keep}

    def report(self) -> None:
        counts, log = self.counts, self.run.log
        stopped = f"; stopped at --limit {self.params.limit}" if self.params.limit == counts.written else ""
        log.info("%d read, %d written (%s)%s", counts.read, counts.written, _listed(counts.formats), stopped)
        for reason, number in counts.dropped.most_common():
            log.info("%d dropped: %s", number, reason)
        if counts.sides:
            log.info("split: %s", _listed(counts.sides))
        if counts.placeholders:
            log.warning(
                "%d records hold placeholders such as {{name}}; use --replace '{{name}}=...' or "
                r"--drop-matching '\{\{\w+\}\}'",
                counts.placeholders,
            )


def _listed(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counter.items())


def _replaced(value: Any, replacements: Sequence[tuple[str, str]]) -> Any:
    if not replacements:
        return value
    if isinstance(value, str):
        for old, new in replacements:
            value = value.replace(old, new)
        return value
    if isinstance(value, list):
        return [_replaced(v, replacements) for v in value]
    if isinstance(value, dict):
        return {k: _replaced(v, replacements) for k, v in value.items()}
    return value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _require_free(run: Run[Params], inputs: Sequence[Input]) -> None:
    """The rule of directory artifacts, for a stream: the same again is left, another needs ``--force``."""
    path = Path(str(run.output))
    if run.force or not path.is_file():
        return
    beside = path.with_name(f"{path.name}.{MANIFEST}")
    if beside.is_file() and "-" not in run.inputs:
        manifest = load_manifest(beside)
        wanted = json.loads(json.dumps([run.manifest_params(), [i.as_json() for i in inputs], run.seed]))
        values = [{k: v["value"] for k, v in params.items()} for params in (manifest["params"], wanted[0])]
        same = values[0] == values[1] and [manifest["inputs"], manifest["seed"]] == wanted[1:]
        if same and manifest["files"][path.name]["sha256"] == sha256_file(path):
            raise UpToDate(manifest)
    raise ToolError(
        f"{portable_path(path)}: exists and differs; --force replaces it", code=ExitCode.CANNOT_WRITE
    )
