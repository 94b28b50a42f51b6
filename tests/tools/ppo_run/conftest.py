"""``ppo``: ppo-run in this process on the tiny model; ``world``: in processes of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import Result, environment, invoke, load_tool, tiny_records, tool_args, write_jsonl

sys.path.insert(0, str(Path(__file__).parent))  # ``from bandit import …``, also for --reward bandit:reward
CPU = ("--device", "cpu", "--dtype", "float32")
SMALL = ("--updates", "3", "--batch-size", "6", "--micro-batch-size", "2", "--max-new-tokens", "8")


@pytest.fixture
def prompts(workdir: Path) -> Path:
    write_jsonl(workdir / "prompts.jsonl", tiny_records("prompt", 10))
    return Path("prompts.jsonl")


@pytest.fixture
def heldout(workdir: Path) -> Path:
    write_jsonl(workdir / "heldout.jsonl", tiny_records("prompt", 16)[10:])
    return Path("heldout.jsonl")


@pytest.fixture
def ppo(workdir: Path, tiny_model: Path) -> Callable[..., Result]:
    """``ppo(*args, model=…, output=…, command=…)``; small sizes come first, so that ``args`` may override."""

    def call(*args: Any, model: Path = tiny_model, output: str = "out", command: str = "train") -> Result:
        out = ["-o", output] if command == "train" else []
        return invoke(load_tool("ppo-run"), command, "-m", model, *CPU, *SMALL, *out, *map(str, args))

    return call


@pytest.fixture
def world(workdir: Path, tiny_model: Path) -> Callable[..., list[Result]]:
    """``world(2, *args)``: the same in processes that are joined as torchrun would join them."""

    def call(size: int, *args: Any, output: str = "out") -> list[Result]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        line = [sys.executable, *tool_args("ppo-run"), "train", "-m", os.fspath(tiny_model)]
        line += [*CPU, *SMALL, "-o", output, *map(str, args)]
        processes = []
        for rank in range(size):
            ranks: dict[str, str | None] = {}
            if size > 1:
                ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
                ranks |= {"LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen(line, env=environment(ranks), cwd=workdir, **pipes))
        made = []
        for process in processes:
            out, err = process.communicate(timeout=300)
            made.append(Result(process.returncode, out, err))
        return made

    return call


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
