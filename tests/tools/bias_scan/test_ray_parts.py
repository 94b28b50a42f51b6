"""The parts that tasks of a Ray cluster scan, without a cluster: each line once, tallies as of the whole."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from tuneutils.shared.errors import ToolError
from tuneutils.shared.lexicons import Lexicon, Term
from tuneutils.shared.records import Reader
from tuneutils.shared.streams import raw_lines
from tuneutils.tools.bias_scan import ray_scan
from tuneutils.tools.bias_scan.near import Window
from tuneutils.tools.bias_scan.scan import Settings, scan

LEXICON = Lexicon("gender", "en", (Term("he", "male"), Term("she", "female")), "MIT", "test")
SETTINGS = Settings((LEXICON,), Window(), frozenset(), (), 5, 0)


@pytest.fixture
def path(workdir: Path) -> Path:
    words = ["nurse", "engine", "größe", "東京"]
    rows = [{"text": f"{'he' if i % 3 else 'she'} {words[i % 4]} {words[i % 2]}"} for i in range(97)]
    made = workdir / "in.jsonl"
    made.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows).encode())
    return made


@pytest.mark.parametrize("size", [1, 7, 64, 1000, 10**6])
def test_parts_hold_each_line_once(path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_scan, "PART_BYTES", size)
    got, before = [], 0
    for part in ray_scan.parts_of(str(path), "in.jsonl"):
        lines = ray_scan.Lines(part)
        got += [(number + before, line) for number, line in lines]
        before += lines.count
    assert got == list(raw_lines(str(path)))


@pytest.mark.parametrize("size", [64, 1000])
def test_merged_parts_are_the_whole(path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_scan, "PART_BYTES", size)
    whole = scan(Reader([str(path)]), SETTINGS)
    parts = ray_scan.parts_of(str(path), str(path))
    done = (
        pickle.loads(pickle.dumps(ray_scan.count_part(part, SETTINGS))) for part in parts
    )  # as it travels
    merged = ray_scan.merged(done, parts, Reader([str(path)]), SETTINGS)
    for name in ("mentions", "rows_with", "bucket_rows", "terms"):
        assert np.array_equal(getattr(merged, name), getattr(whole, name))
    assert (merged.rows, merged.tokens) == (whole.rows, whole.tokens) == (97, 97 * 3)
    for ours, theirs in zip(merged.near, whole.near):
        assert set(ours.words) == set(theirs.words)
        for group in theirs.tables:
            for word, column in theirs.words.items():
                assert ours.table(group)[ours.words[word]] == theirs.table(group)[column]
    assert [merged.sampled(g) for g in (0, 1)] == [whole.sampled(g) for g in (0, 1)]


def test_a_compressed_file_is_one_part(workdir: Path) -> None:
    (workdir / "in.jsonl.gz").write_bytes(b"")
    assert [(p["start"], p["end"]) for p in ray_scan.parts_of("in.jsonl.gz", "x")] == [(0, -1)]


def test_a_bad_line_is_named_by_its_number_in_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_scan, "PART_BYTES", 100)
    lines = path.read_bytes().split(b"\n")
    lines[60] = b"garbage"
    path.write_bytes(b"\n".join(lines))
    parts = ray_scan.parts_of(str(path), "in.jsonl")
    done = (ray_scan.count_part(part, SETTINGS) for part in parts)
    with pytest.raises(ToolError, match=r"^in\.jsonl:61: not JSON"):
        ray_scan.merged(done, parts, Reader([str(path)]), SETTINGS)
