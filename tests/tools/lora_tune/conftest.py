"""``tune``: lora-tune in this process; ``forks``: in processes that can be killed, without the imports' cost."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import PROVERBS, Result, environment, invoke, load_tool, write_jsonl

SERVER = Path(__file__).with_name("forkserver.py")


def uneven_records(count: int) -> list[dict[str, Any]]:
    """Prompt–completion records of very different lengths."""
    made = []
    for i in range(count):
        words = PROVERBS[i % len(PROVERBS)].split()
        answer = " ".join(words[: 1 + (i * 5) % len(words)])
        made.append({"prompt": f"{i} " + "go on " * (i % 4), "completion": answer})
    return made


@pytest.fixture
def records(workdir: Path) -> Path:
    return write_jsonl(workdir / "records.jsonl", uneven_records(11))


@pytest.fixture
def heldout(workdir: Path) -> Path:
    return write_jsonl(workdir / "heldout.jsonl", uneven_records(16)[11:])


@pytest.fixture
def tune(workdir: Path, tiny_model: Path) -> Callable[..., Result]:
    """``tune(records, "--method", "lora", output="out")`` in float32 on the tiny model."""
    command = load_tool("lora-tune")

    def call(*args: Any, output: str = "out", model: Path | str = tiny_model, **keywords: Any) -> Result:
        given = [str(a) for a in args]
        dtype = [] if "--dtype" in given else ["--dtype", "float32"]
        return invoke(command, *given, "-m", str(model), "-o", output, *dtype, **keywords)

    return call


class Forks:
    """Runs lora-tune in forked processes; see ``forkserver.py``."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def __call__(self, *args: Any, cwd: Path, world: int = 1, **keywords: Any) -> list[Result]:
        """One result for each of ``world`` processes of one run, joined as torchrun would join them."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        jobs = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(world):
            env = dict(keywords.get("env", {}))
            if world > 1:
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
                env |= {k: str(v) for k, v in ranks.items()}
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            streams = {name: str(cwd / f".{name}.{rank}") for name in ("stdout", "stderr", "writes")}
            jobs.append({**keywords, **streams, "args": [str(a) for a in args], "cwd": str(cwd), "env": env})
        self._process.stdin.write(json.dumps(jobs) + "\n")
        self._process.stdin.flush()
        codes = json.loads(self._process.stdout.readline())
        return [
            Result(code, Path(job["stdout"]).read_text(), Path(job["stderr"]).read_text())
            for code, job in zip(codes, jobs, strict=True)
        ]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    server = Forks()
    yield server
    server.close()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    (path,) = folder.glob("*.safetensors")
    return load_file(path)
