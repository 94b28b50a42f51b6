"""Record streams: what is read is what was written, and what is refused is named and kept."""

from __future__ import annotations

import base64
import gzip
import io
import json
import math
import os
import stat
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny_records

from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.records import (
    FORMATS,
    BadRecord,
    Located,
    Reader,
    check,
    format_of,
    open_writer,
    read,
    write,
)

SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".parquet")
GOOD = b'{"text": "a"}\n'


def stream(tmp_path: Path, data: bytes, name: str = "in.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def refusal(path: Path, **keywords: Any) -> str:
    with pytest.raises(ToolError) as caught:
        list(Reader([path], **keywords))
    assert caught.value.code == ExitCode.BAD_DATA
    return str(caught.value)


class TestRoundTrip:
    @pytest.mark.parametrize("suffix", SUFFIXES)
    @pytest.mark.parametrize("format", FORMATS)
    def test_every_format_in_every_file(self, tmp_path: Path, suffix: str, format: str) -> None:  # noqa: A002
        records = tiny_records(format)
        path = tmp_path / f"x{suffix}"
        assert write(path, records) == len(records)
        assert read(path, formats=[format]) == records

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_unknown_fields_and_fields_of_later_records_pass(self, tmp_path: Path, suffix: str) -> None:
        records = [
            {"text": "a"},
            {"text": "b", "meta": {"n": 1, "tags": ["x"]}, "z": 0.1},
            {"text": "c", "y": 2**40},
        ]
        path = tmp_path / f"x{suffix}"
        write(path, records)
        assert read(path, formats=["text"]) == records

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_same_records_make_the_same_bytes(self, tmp_path: Path, suffix: str) -> None:
        made = []
        for name in ("a", "b"):
            write(tmp_path / f"{name}{suffix}", tiny_records("messages"))
            made.append((tmp_path / f"{name}{suffix}").read_bytes())
        assert made[0] == made[1]

    def test_other_programs_read_what_we_write(self, tmp_path: Path) -> None:
        records = tiny_records("text")
        for suffix in SUFFIXES:
            write(tmp_path / f"x{suffix}", records)
        packed = (tmp_path / "x.jsonl.zst").read_bytes()
        plain = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(packed)).read()
        texts = [
            (tmp_path / "x.jsonl").read_bytes(),
            gzip.decompress((tmp_path / "x.jsonl.gz").read_bytes()),
            plain,
        ]
        for text in texts:
            assert [json.loads(line) for line in text.decode().splitlines()] == records
        import pyarrow.parquet as pq

        assert pq.read_table(tmp_path / "x.parquet").to_pylist() == records

    def test_several_frames_in_one_file(self, tmp_path: Path) -> None:
        """``cat a.zst b.zst`` is a valid .zst, as ``cat a.gz b.gz`` is a valid .gz."""
        one = zstandard.ZstdCompressor().compress(GOOD)
        assert len(read(stream(tmp_path, one * 3, "x.jsonl.zst"))) == 3
        assert len(read(stream(tmp_path, gzip.compress(GOOD) * 3, "x.jsonl.gz"))) == 3

    def test_large_zst(self, tmp_path: Path) -> None:
        records = [{"text": f"{i} " + "ab" * 500} for i in range(2000)]
        write(tmp_path / "x.jsonl.zst", records)
        assert read(tmp_path / "x.jsonl.zst") == records

    def test_line_endings_blank_lines_and_byte_order_mark(self, tmp_path: Path) -> None:
        path = stream(tmp_path, b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
        assert [(r.record["text"], r.line) for r in Reader([path]).located()] == [("a", 1), ("b", 4)]

    def test_line_separators_inside_strings_do_not_split(self, tmp_path: Path) -> None:
        record = {"text": "a\u2028b\u2029c\x85d\ve\ff\x1cg"}
        write(tmp_path / "x.jsonl", [record])
        assert read(tmp_path / "x.jsonl") == [record]

    def test_lone_surrogate_in_an_unknown_field_passes(self, tmp_path: Path) -> None:
        path = stream(tmp_path, b'{"text": "a", "note": "\\ud83d"}\n')
        write(tmp_path / "y.jsonl", read(path, formats=["text"]))
        assert (tmp_path / "y.jsonl").read_bytes() == b'{"text": "a", "note": "\\ud83d"}\n'

    def test_very_long_line(self, tmp_path: Path) -> None:
        record = {"text": "é" * 5_000_000}
        write(tmp_path / "x.jsonl.gz", [record])
        assert read(tmp_path / "x.jsonl.gz") == [record]

    def test_stdin_and_stdout(self, monkeypatch: pytest.MonkeyPatch, capfdbinary: Any) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(GOOD * 2)))
        reader = Reader(["-"])
        assert [r.place for r in reader.located()] == ["<stdin>:1", "<stdin>:2"]

    def test_several_streams_in_order(self, tmp_path: Path) -> None:
        a = stream(tmp_path, GOOD, "a.jsonl")
        b = stream(tmp_path, b'{"text": "b"}\n', "b.jsonl")
        assert [r["text"] for r in Reader([a, b, a])] == ["a", "b", "a"]

    def test_a_reader_can_be_read_again(self, tmp_path: Path) -> None:
        path = stream(tmp_path, GOOD + b"x\n" + GOOD)
        reader = Reader([path], on_error="quarantine", quarantine=tmp_path / "q.jsonl")
        for _ in range(2):
            assert len(list(reader)) == 2
            assert (reader.stats.read, reader.stats.refused) == (2, 1)
            assert len(read(tmp_path / "q.jsonl")) == 1


class TestRefusals:
    @pytest.mark.parametrize(
        ("line", "says"),
        [
            (b'{"text": "a', "Unterminated string starting at at column 10; the line seems cut off"),
            (b'{"text": "a"', "the line seems cut off"),
            (b'{"text": "\xff"}', "not UTF-8: byte 0xff at byte 11"),
            (b'{"text": "\xed\xa0\x80"}', "not UTF-8: byte 0xed at byte 11"),
            (b'["a"]', "must be a JSON object, is a list"),
            (b"3", "must be a JSON object, is a number"),
            (b"null", "must be a JSON object, is null"),
            (b'{"text": NaN}', "NaN is no JSON number"),
            (b'{"text": "a", "x": -Infinity}', "-Infinity is no JSON number"),
            (b'{"text": "a", "x": 1e999}', "1e999 is beyond a double"),
            (b"[" * 100_000, "nested too deeply"),
            (b'{"text": "a"} {"text": "b"}', "Extra data at column 15"),
            (b'{"txt": "a"}', "needs the fields text; has txt; field 'txt' (did you mean 'text'?)"),
            (b"{}", "needs the fields text; has none"),
            (b'{"text": 3}', "field 'text': must be a string, is a number"),
            (b'{"text": null}', "field 'text': must be a string, is null"),
            (b'{"text": " \\n"}', "field 'text': is empty"),
            (b'{"text": "ab\\ud83d"}', "field 'text': lone surrogate \\ud83d at character 3"),
            (b'{"text": "a", "prompt": "b", "completion": "c"}', "needs the fields text"),
        ],
    )
    def test_names_file_line_and_reason(self, tmp_path: Path, line: bytes, says: str) -> None:
        path = stream(tmp_path, GOOD + line + b"\n" + GOOD)
        message = refusal(path, formats=["text"])
        assert message.startswith(f"{path}:2: ")
        assert says in message
        assert "\n" not in message

    @pytest.mark.parametrize(
        ("record", "says"),
        [
            ({"messages": []}, "field 'messages': must be a non-empty list"),
            ({"messages": "hi"}, "must be a non-empty list of messages, is a string"),
            ({"messages": ["hi"]}, "field messages[0]: must be an object"),
            ({"messages": [{"role": "user"}]}, "field messages[0].content: must be a string, is null"),
            ({"messages": [{"role": 1, "content": "x"}]}, "field messages[0].role: must be a string"),
            ({"messages": [{"role": "user", "content": "\ud83d"}]}, "messages[0].content: lone surrogate"),
            ({"prompt": "a", "completion": "b", "label": "yes"}, "field 'label': must be true or false"),
            ({"prompt": "a", "completion": "b", "label": 2}, "field 'label': must be true or false"),
            ({"prompt": "a", "completion": "b", "label": 1.0}, "field 'label': must be true or false"),
            ({"prompt": "a", "chosen": [{"role": "user"}], "rejected": "c"}, "field chosen[0].content"),
            ({"prompt": "a", "chosen": "", "rejected": "c"}, "field 'chosen': is empty"),
            ({"src": "a", "tgt": 1, "src_lang": "en", "tgt_lang": "de"}, "field 'tgt': must be a string"),
        ],
    )
    def test_field_by_field(self, record: dict[str, Any], says: str) -> None:
        with pytest.raises(ValueError) as caught:
            check(record, list(FORMATS))
        assert says in str(caught.value)

    @pytest.mark.parametrize("format", FORMATS)
    def test_format_is_found(self, format: str) -> None:  # noqa: A002
        for record in tiny_records(format):
            assert format_of(record) == format
            assert check(record, [format]) == format

    def test_labels_are_booleans_or_bits(self) -> None:
        for label in (True, False, 0, 1):
            check({"prompt": "a", "completion": "b", "label": label}, ["unpaired"])

    def test_empty_and_all_refused(self, tmp_path: Path) -> None:
        empty = stream(tmp_path, b"")
        assert refusal(empty) == f"{empty}: no records"
        assert read(empty, allow_empty=True) == []
        bad = stream(tmp_path, b"x\ny\n")
        assert refusal(bad, on_error="skip") == f"{bad}: no records (2 refused)"

    @pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
    @pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
    def test_cut_off_file(self, tmp_path: Path, suffix: str, keep: float) -> None:
        path = tmp_path / f"x{suffix}"
        write(path, ({"text": os.urandom(40).hex()} for _ in range(3000)))
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep)])
        message = refusal(path)
        assert str(path) in message
        assert "cut-off" in message or "Parquet" in message

    @pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
    def test_damaged_file(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"x{suffix}"
        write(path, ({"text": os.urandom(40).hex()} for _ in range(3000)))
        data = bytearray(path.read_bytes())
        data[len(data) // 3 : len(data) // 3 + 200] = os.urandom(200)
        path.write_bytes(data)
        refusal(path)

    @pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
    def test_not_what_its_name_says(self, tmp_path: Path, suffix: str) -> None:
        refusal(stream(tmp_path, GOOD * 10, f"x{suffix}"))

    def test_missing_and_unreadable(self, tmp_path: Path) -> None:
        good = stream(tmp_path, GOOD)
        with pytest.raises(ToolError, match="no such file") as caught:
            Reader([good, tmp_path / "nosuch.jsonl"])
        assert caught.value.code == ExitCode.MISSING_INPUT

    def test_folder_of_streams(self, tmp_path: Path) -> None:
        folder = tmp_path / "split"
        folder.mkdir()
        stream(folder, GOOD, "train.jsonl")
        assert read(folder) == [{"text": "a"}]
        stream(folder, GOOD, "test.jsonl.gz")
        with pytest.raises(ToolError, match=r"2 record streams \(test.jsonl.gz, train.jsonl\)") as caught:
            Reader([folder])
        assert caught.value.code == ExitCode.MISSING_INPUT


class TestParquet:
    def write_table(self, tmp_path: Path, columns: dict[str, Any]) -> Path:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(columns), tmp_path / "x.parquet")
        return tmp_path / "x.parquet"

    def test_null_is_an_absent_field(self, tmp_path: Path) -> None:
        path = self.write_table(tmp_path, {"text": ["a", "b"], "score": [None, 1.5]})
        assert read(path) == [{"text": "a"}, {"text": "b", "score": 1.5}]

    def test_dates_and_decimals_become_text(self, tmp_path: Path) -> None:
        import datetime
        import decimal

        path = self.write_table(
            tmp_path,
            {"text": ["a"], "day": [datetime.date(2024, 2, 29)], "price": [decimal.Decimal("1.10")]},
        )
        assert read(path) == [{"text": "a", "day": "2024-02-29", "price": "1.10"}]

    def test_what_json_cannot_hold_is_refused_by_row(self, tmp_path: Path) -> None:
        path = self.write_table(tmp_path, {"text": ["a", "b"], "x": [1.0, math.nan]})
        assert refusal(path) == f"{path}:2: field 'x': nan is no JSON number"
        path = self.write_table(tmp_path, {"text": ["a"], "x": [{"bytes": b"\x89PNG"}]})
        assert "field 'x': bytes have no JSON form" in refusal(path)
        reader = Reader([path], on_error="quarantine", quarantine=tmp_path / "q.jsonl", allow_empty=True)
        assert list(reader) == []
        assert read(tmp_path / "q.jsonl")[0]["raw"] == repr({"text": "a", "x": {"bytes": b"\x89PNG"}})

    @pytest.mark.parametrize("records", [[{"a": 1}, {"a": "x"}], [{"a": 2**70}], [{"a": {}}]])
    def test_records_without_a_common_type_cannot_be_written(
        self, tmp_path: Path, records: list[dict[str, Any]]
    ) -> None:
        with pytest.raises(ToolError, match="do not fit Parquet"):
            write(tmp_path / "x.parquet", records)
        assert list(tmp_path.iterdir()) == []


def quarantined(path: Path) -> list[bytes]:
    out = []
    for entry in read(path, allow_empty=True):
        assert entry["reason"]
        raw = entry.get("raw_base64")
        out.append(base64.b64decode(raw) if raw is not None else entry["raw"].encode())
    return out


JSONISH = st.one_of(
    st.binary(max_size=30),
    st.text(max_size=20).map(lambda s: json.dumps({"text": s}).encode()),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5), lambda c: st.lists(c, max_size=3)
    ).map(lambda v: json.dumps({"text": "a", "x": v}).encode()),
)


class TestQuarantine:
    @settings(max_examples=300, deadline=None)
    @given(lines=st.lists(JSONISH, max_size=8))
    def test_every_line_is_read_or_kept(
        self, tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
    ) -> None:
        tmp_path = tmp_path_factory.mktemp("q", numbered=True)
        source = stream(tmp_path, b"\n".join(lines))
        reader = Reader(
            [source],
            formats=["text"],
            on_error="quarantine",
            quarantine=tmp_path / "q.jsonl",
            allow_empty=True,
        )
        read_lines = [r.line for r in reader.located()]
        kept = read(tmp_path / "q.jsonl", allow_empty=True)
        data = source.read_bytes()
        data = data.removeprefix(b"\xef\xbb\xbf")
        numbered = {i: raw.rstrip(b"\r\n") for i, raw in enumerate(data.split(b"\n"), 1) if raw.strip()}
        assert sorted(read_lines + [k["line"] for k in kept]) == sorted(numbered)
        assert quarantined(tmp_path / "q.jsonl") == [numbered[k["line"]] for k in kept]
        assert (reader.stats.read, reader.stats.refused) == (len(read_lines), len(kept))
        assert sum(reader.stats.reasons.values()) == len(kept)

    def test_what_only_the_tool_can_judge(self, tmp_path: Path) -> None:
        path = stream(tmp_path, GOOD + b'{"text": "b"}\n')
        reader = Reader([path], on_error="quarantine", quarantine=tmp_path / "q.jsonl")
        located = list(reader.located())
        reader.refuse(located[1], "longer than the context")
        entry = {"path": str(path), "line": 2, "reason": "longer than the context", "record": {"text": "b"}}
        assert read(tmp_path / "q.jsonl") == [entry]
        with pytest.raises(BadRecord, match=r"in\.jsonl:2: too long"):
            Reader([path]).refuse(located[1], "too long")

    def test_nothing_refused_leaves_an_empty_file(self, tmp_path: Path) -> None:
        """So that a pipeline can name it as an output, and an older one does not speak for this run."""
        stream(tmp_path, b"old\n", "q.jsonl")
        list(Reader([stream(tmp_path, GOOD)], on_error="quarantine", quarantine=tmp_path / "q.jsonl"))
        assert (tmp_path / "q.jsonl").read_bytes() == b""

    def test_a_reader_that_only_refuses_starts_a_new_file(self, tmp_path: Path) -> None:
        """Readers of other formats judge rows that came by another way than ``located``."""
        stream(tmp_path, b"old\n", "q.jsonl")
        reader = Reader(["-"], on_error="quarantine", quarantine=tmp_path / "q.jsonl")
        for i in (1, 2):
            reader.refuse(Located({"n": i}, "x.csv", i), "no text")
        assert [e["record"] for e in read(tmp_path / "q.jsonl")] == [{"n": 1}, {"n": 2}]

    def test_needs_a_place(self, tmp_path: Path) -> None:
        with pytest.raises(ToolError, match="needs -o FILE") as caught:
            Reader([stream(tmp_path, GOOD)], on_error="quarantine")
        assert caught.value.code == ExitCode.USAGE

    def test_skip_counts_reasons(self, tmp_path: Path) -> None:
        reader = Reader([stream(tmp_path, GOOD + b"x\n[1]\n{}\n" + GOOD)], formats=["text"], on_error="skip")
        assert len(list(reader)) == 2
        assert sum(reader.stats.reasons.values()) == reader.stats.refused == 3


class TestWriter:
    def test_failure_leaves_the_old_file(self, tmp_path: Path) -> None:
        path = stream(tmp_path, GOOD)
        with pytest.raises(RuntimeError), open_writer(path) as writer:  # noqa: PT012
            writer.write({"text": "new"})
            raise RuntimeError
        assert path.read_bytes() == GOOD
        assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]

    def test_input_may_be_the_output(self, tmp_path: Path) -> None:
        path = stream(tmp_path, GOOD * 3)
        with open_writer(path) as writer:
            for record in Reader([path]):
                writer.write({**record, "n": writer.written})
        assert [r["n"] for r in read(path)] == [0, 1, 2]

    def test_leftovers_are_swept(self, tmp_path: Path) -> None:
        left = [f".x.jsonl.{pid}.tmp" for pid in (os.getpid(), 2**22 + 1)]
        for name in [*left, ".other.jsonl.1.tmp", ".x.jsonl.word.tmp", f".x.jsonl.{os.getppid()}.tmp"]:
            (tmp_path / name).write_text("")
        write(tmp_path / "x.jsonl", [{"text": "a"}])
        gone = {p.name for p in tmp_path.iterdir()}.isdisjoint(left)
        assert gone
        assert len(list(tmp_path.iterdir())) == 4

    def test_a_device_or_pipe_is_written_to_not_replaced(self, tmp_path: Path) -> None:
        write("/dev/null", [{"text": "a"}])
        assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
        pipe = tmp_path / "pipe.jsonl"
        os.mkfifo(pipe)
        got: list[bytes] = []
        other = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
        other.start()
        write(pipe, [{"text": "a"}])
        other.join()
        assert got == [GOOD]
        with pytest.raises(OSError):
            write("/dev/full", [{"text": "a" * 100_000}])

    @pytest.mark.parametrize("value", [math.nan, math.inf, b"bytes", {1, 2}, pytest.param("deep", id="deep")])
    def test_what_is_no_json_is_not_written(self, tmp_path: Path, value: Any) -> None:
        if value == "deep":
            value = []
            for _ in range(100_000):
                value = [value]
        with pytest.raises(ToolError, match="cannot be written as JSON"):
            write(tmp_path / "x.jsonl", [{"x": value}])
        assert list(tmp_path.iterdir()) == []

    def test_folder_in_the_way(self, tmp_path: Path) -> None:
        with pytest.raises(ToolError, match="is a directory") as caught:
            write(tmp_path, [{"text": "a"}])
        assert caught.value.code == ExitCode.CANNOT_WRITE
