"""Fixtures of all tests, and the environment that they run in."""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "shared")]  # ``from support import …`` in any test file

from support import Result, build_tiny_model, invoke, load_tool, run_cli, tool_args  # noqa: E402


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random two-layer Llama. Shared by the whole session: do not write into it."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def other_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of another width than ``tiny_model``, for adapters that do not fit."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "other", seed=1, hidden_size=48)


@pytest.fixture
def cli() -> Callable[..., Result]:
    """``cli("lora-tune", *args)``: one of our tools in a process of its own."""
    return lambda tool, *args, **keywords: run_cli(*tool_args(tool), *args, **keywords)


@pytest.fixture
def click_cli() -> Callable[..., Result]:
    """``click_cli("lora-tune", *args)``: the same in this process."""
    return lambda tool, *args, **keywords: invoke(load_tool(tool), *args, **keywords)


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
