"""``distill`` in this process on a four-layer teacher, and files to learn from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import Result, build_tiny_model, invoke, load_tool, tiny_records, write_jsonl


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four layers with weights large enough that it has opinions."""
    return build_tiny_model(
        tmp_path_factory.mktemp("distill") / "teacher", num_hidden_layers=4, initializer_range=0.15
    )


@pytest.fixture
def records(workdir: Path) -> Path:
    return write_jsonl(workdir / "records.jsonl", tiny_records("prompt-completion", 11))


@pytest.fixture
def texts(workdir: Path) -> Path:
    return write_jsonl(workdir / "texts.jsonl", tiny_records("text", 12))


@pytest.fixture
def distill(workdir: Path, teacher: Path) -> Callable[..., Result]:
    """``distill(records, "--student-layers", 2, output="out")`` in float32, without timings."""
    command = load_tool("distill")

    def call(*args: Any, output: str = "out", model: Path | str = teacher, **keywords: Any) -> Result:
        given = [str(a) for a in args]
        dtype = [] if "--dtype" in given else ["--dtype", "float32"]
        return invoke(command, *given, "-m", str(model), "-o", output, "--no-speed", *dtype, **keywords)

    return call


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "artifact.json").read_text()))


def report(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "report.json").read_text()))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
