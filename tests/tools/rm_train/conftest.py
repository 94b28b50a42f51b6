"""``rm``: rm-train in this process on the tiny model; ``trained``: a reward model made once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import PROVERBS, Result, invoke, load_tool, write_jsonl

CPU = ("--device", "cpu", "--dtype", "float32")


def preferences(count: int = 40, start: int = 0) -> list[dict[str, Any]]:
    """Proverbs are preferred to refusals; lengths differ widely."""
    made = []
    for i in range(start, start + count):
        words = PROVERBS[i % len(PROVERBS)].split()
        answer = " ".join(words[: 2 + (i * 5) % len(words)])
        made.append({"prompt": f"Say {i}." + " Go on." * (i % 4), "chosen": answer, "rejected": f"No, {i}."})
    return made


@pytest.fixture
def records(workdir: Path) -> Path:
    return write_jsonl(workdir / "records.jsonl", preferences())


@pytest.fixture
def rm(workdir: Path, tiny_model: Path) -> Callable[..., Result]:
    """``rm(records, "--method", "full", output="out")`` in float32 on the tiny model."""
    command = load_tool("rm-train")

    def call(*args: Any, output: str = "out", model: Path | str = tiny_model, **keywords: Any) -> Result:
        given = [str(a) for a in args]
        dtype = [] if "--dtype" in given else list(CPU)
        return invoke(command, *given, "-m", str(model), "-o", output, *dtype, **keywords)

    return call


QUICK = ("--batch-size", "4", "--learning-rate", "0.005", "--eval-share", "0.3")


@pytest.fixture(scope="session", params=["lora", "full"])
def trained(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A reward model of each kind, trained for a moment. Shared by the session: do not write into it."""
    folder = tmp_path_factory.mktemp("rm")
    path = write_jsonl(folder / "records.jsonl", preferences())
    args = (str(path), "-q", "-m", str(tiny_model), "-o", str(folder / "rm"), "--method", request.param)
    done = invoke(load_tool("rm-train"), *args, *QUICK, *CPU)
    assert done.code == 0, done.stderr
    return folder / "rm"


def report_of(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return loaded


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
