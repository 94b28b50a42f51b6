"""Models and calibration records that quantize is tried on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import PROVERBS, Result, build_tiny_model, write_jsonl

CALIBRATE = ("--calibration-rows", "8", "--calibration-length", "32")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for bitsandbytes' blocks, with a head of its own."""
    return build_tiny_model(
        tmp_path_factory.mktemp("q") / "model",
        hidden_size=64,
        intermediate_size=128,
        tie_word_embeddings=False,
    )


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(
        tmp_path_factory.mktemp("q") / "tied", hidden_size=64, intermediate_size=128, tie_word_embeddings=True
    )


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("q") / "text.jsonl", [{"text": p} for p in PROVERBS * 4])


@pytest.fixture
def quantize(click_cli: Callable[..., Result], texts: Path, workdir: Path) -> Callable[..., Result]:
    """``quantize(model, "--scheme", ...)`` writes ``out``; calibrated schemes get records."""

    def run(source: Path, scheme: str, *args: Any, out: str = "out", **keywords: Any) -> Result:
        calibrated = scheme in ("gptq", "awq", "mixed") and "--calibration" not in args
        given = ["--calibration", texts, *CALIBRATE] if calibrated else []
        common = ["-q", "-o", out, "--device", "cpu", "--dtype", "float32"]
        return click_cli("quantize", source, "--scheme", scheme, *given, *common, *map(str, args), **keywords)

    return run
