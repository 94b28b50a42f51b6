"""Two small tools for the tests of the shared layer: ``python toy.py copy …`` and ``python toy.py build …``."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tuneutils.shared.artifact import check_stream, describe_input, sidecar, write_json
from tuneutils.shared.command import Run, Summary, option, tool, tool_group
from tuneutils.shared.errors import ExitCode, GateFailed, ToolError, require
from tuneutils.shared.records import Reader, open_writer


@dataclass(frozen=True, kw_only=True)
class CopyParams:
    rank: int = option(4, help="Rank of nothing.", min=1, max=64, short="-r")
    learning_rate: float = option(1e-3, help="Rate of nothing.", min=0.0)
    mode: str = option("fast-path", help="How.", choices=("fast-path", "slow-path"))
    tags: tuple[str, ...] = option((), help="Any number of words.")
    title: str | None = option(None, help="A title.")
    upper: bool = option(False, help="In capitals.")
    fail: str = option("", help="How to fail.", role="runtime")


FAILURES = {
    "gate": GateFailed("the answer is no"),
    "data": ToolError("data: bad"),
    "device": ToolError("no such device", code=ExitCode.UNAVAILABLE),
    "bug": RuntimeError("something\nbroke"),
    "memory": MemoryError(),
    "interrupt": KeyboardInterrupt(),
    "eof": EOFError("cut off"),
    "network": ConnectionResetError(104, "Connection reset by peer"),
    "absent": ModuleNotFoundError("No module named 'nosuch'", name="nosuch"),
}


@tool(
    "toy-copy", CopyParams, group="data", inputs="RECORDS", output="records", streams=True, uses_model=False
)
def copy(run: Run[CopyParams]) -> Summary:
    """Copy records."""
    if run.params.fail in FAILURES:
        raise FAILURES[run.params.fail]
    if run.params.fail == "extra":
        require("no_such_package", "qlora")
    if run.params.fail == "wait":
        print("ready", file=sys.stderr, flush=True)
        time.sleep(60)
    run.log.info("copying")
    run.log.debug("in detail")
    inputs = [describe_input("records", p) for p in run.inputs]
    check_stream(run, inputs)
    quarantine = f"{run.output}.quarantine" if run.output not in (None, "-") else None
    reader = Reader(run.inputs, on_error=run.on_error, quarantine=quarantine)
    assert run.output is not None
    with open_writer(run.output) as writer, run.progress(None, "copy") as progress:
        for record in reader:
            writer.write(record)
            progress.update()
    if Path(run.output).is_file():
        sidecar(run, Path(run.output), inputs)
    return {"read": reader.stats.read, "refused": reader.stats.refused}


@dataclass(frozen=True, kw_only=True)
class BuildParams:
    files: int = option(3, help="How many files.", min=1)
    kilobytes: int = option(1, help="Size of each.", min=0)
    pause: float = option(0.0, help="Seconds between files.", role="runtime")


def plan(run: Run[BuildParams]) -> Summary:
    return {"bytes": run.params.files * run.params.kilobytes * 1024}


@tool("toy-build", BuildParams, group="data", inputs="RECORDS", output="report", plan=plan)
def build(run: Run[BuildParams]) -> Summary:
    """Build a folder."""
    with run.artifact("report", [describe_input("records", p) for p in run.inputs]) as art:
        for i in range(run.params.files):
            (art.dir / "sub").mkdir(exist_ok=True)
            (art.dir / "sub" / f"{i}.bin").write_bytes(bytes([i % 256]) * (1024 * run.params.kilobytes))
            print("wrote", i, file=sys.stderr, flush=True)
            time.sleep(run.params.pause)
        (art.dir / "train.jsonl").write_text('{"text": "a"}\n')
        art.metrics = {"files": run.params.files}
        art.licence = "CC0-1.0"
        art.work.mkdir(parents=True, exist_ok=True)
        write_json(art.work / "run.json", {"when": time.time()})
    return {"files": run.params.files}


@dataclass(frozen=True, kw_only=True)
class NoParams:
    pass


group = tool_group("toy-group", group="data", help="Two in one.", default="one")


@tool("one", NoParams, group="data", inputs="FILE", many=False, uses_model=False, parent=group)
def one(run: Run[NoParams]) -> Summary:
    """Take one file."""
    return {"one": [Path(p).name for p in run.inputs]}


@tool("two", CopyParams, group="data", uses_model=False, parent=group)
def two(run: Run[CopyParams]) -> Summary:
    """Take none."""
    return {"rank": run.params.rank}


if __name__ == "__main__":
    {"copy": copy, "build": build, "group": group}[sys.argv.pop(1)]()
