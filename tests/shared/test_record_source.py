"""Record streams of a run: hashed before they are read, and shared by several processes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import write_jsonl

from tuneutils.shared.command import Run
from tuneutils.shared.errors import ToolError
from tuneutils.shared.record_source import open_source

GOOD = [{"text": "one"}, {"text": "two"}]


def run(on_error: str = "stop") -> Run[SimpleNamespace]:
    return Run("toy", SimpleNamespace(), on_error=on_error, output="out/made")


def test_a_stream_is_hashed_before_a_record_of_it_is_judged(workdir: Path) -> None:
    path = write_jsonl(workdir / "in.jsonl", [*GOOD, {"prompt": "alone"}])
    source = open_source(run(), [str(path)], "heldout", formats=("text",))
    (given,) = source.inputs
    assert (source.role, given.role) == ("heldout", "heldout")
    assert given.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ToolError, match=r"in\.jsonl:3"):
        list(source.located)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_the_first_process_keeps_refused_records(
    rank: str, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    path = write_jsonl(workdir / "in.jsonl", [*GOOD, {"prompt": "alone"}])
    source = open_source(run("quarantine"), [str(path)], "records", formats=("text",))
    assert [item.record for item in source.located] == GOOD
    kept = workdir / "out" / ".work" / "made" / "records.quarantine.jsonl"
    assert kept.exists() == (rank == "0")


def test_stdin_is_not_shared_by_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ToolError, match="give the records as a file") as refused:
        open_source(run(), ["-"], "records")
    assert refused.value.code == 2
