"""``qat`` in this process on a tied two-layer model, and files to learn from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import Result, build_tiny_model, invoke, load_tool, tiny_records, write_jsonl


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with tied embeddings and weights large enough that it has opinions."""
    return build_tiny_model(
        tmp_path_factory.mktemp("qat") / "model",
        hidden_size=64,
        intermediate_size=128,
        tie_word_embeddings=True,
        initializer_range=0.15,
    )


@pytest.fixture
def texts(workdir: Path) -> Path:
    return write_jsonl(workdir / "texts.jsonl", tiny_records("text", 12))


@pytest.fixture
def qat(workdir: Path, model: Path) -> Callable[..., Result]:
    """``qat(texts, "--bits", 8, output="out")`` in float32, 4 bits by groups of 16 unless told."""
    command = load_tool("qat-tune")

    def call(*args: Any, output: str = "out", source: Path | str = model, **keywords: Any) -> Result:
        given = [str(a) for a in args]
        dtype = [] if "--dtype" in given else ["--dtype", "float32"]
        group = [] if "--group-size" in given else ["--group-size", "16"]
        return invoke(command, *given, *group, "-m", str(source), "-o", output, *dtype, **keywords)

    return call


@pytest.fixture
def quantize(workdir: Path) -> Callable[..., Result]:
    command = load_tool("quantize")

    def call(source: Path, *args: Any, output: str = "ptq") -> Result:
        return invoke(command, str(source), *map(str, args), "-o", output, "--dtype", "float32")

    return call


def manifest(folder: Path | str = "out") -> dict[str, Any]:
    return dict(json.loads(Path(folder, "artifact.json").read_text()))


def report(folder: Path | str = "out") -> dict[str, Any]:
    return dict(json.loads(Path(folder, "report.json").read_text()))


def losses(folder: Path | str = "out") -> list[float]:
    return [json.loads(line)["loss"] for line in Path(folder, "log.jsonl").read_text().splitlines()]


def contents(folder: Path | str = "out") -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    root = Path(folder)
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
