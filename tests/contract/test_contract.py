"""What every tool does alike, checked on every tool. A tool without a case in ``cases.py`` fails."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from support import ROOT, Result, fork, invoke, load_tool, tiny_records, write_jsonl

from tuneutils.shared.artifact import load_manifest, verify
from tuneutils.shared.records import read

sys.path.insert(0, str(Path(__file__).parent))
from cases import CASES, Assets, Case

TOOLS = sorted(p.parent.name.replace("_", "-") for p in (ROOT / "tools").glob("*/cli.py"))
FORMATS = ("text", "prompt", "prompt-completion", "messages", "preference", "unpaired", "parallel")

each_tool = pytest.mark.parametrize("tool", TOOLS)


def cases(*, reads: bool = False, makes: Sequence[str] = (), stdin: bool = False, paths: bool = False) -> Any:
    """Parametrise over the cases with these properties."""
    found = [
        c
        for c in CASES
        if c.tool.split()[0] in TOOLS
        and (not reads or c.reads)
        and (not makes or c.makes in makes)
        and (not stdin or c.stdin)
        and (not paths or c.paths)
    ]
    return pytest.mark.parametrize("case", found, ids=lambda c: c.id)


@pytest.fixture(scope="session")
def assets(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Assets:
    folder = tmp_path_factory.mktemp("assets")
    for format in FORMATS:  # noqa: A001 - the records' own word
        write_jsonl(folder / f"{format}.jsonl", tiny_records(format))
    adapters = tuple(make_adapter(tiny_model, folder / f"adapter-{i}", seed=i) for i in (1, 2))
    imported = folder / "imported"
    done = invoke(load_tool("model-import"), "-q", "--licence", "MIT", "-o", imported, tiny_model)
    assert done.code == 0, done.stderr
    return Assets(tiny_model, imported, (adapters[0], adapters[1]), folder)


def make_adapter(model: Path, folder: Path, *, seed: int) -> Path:
    """A LoRA adapter with a small effect, as PEFT saves it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
        tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.02)
        tuned.save_pretrained(folder)
    return folder


def command_of(tool: str) -> tuple[click.Command, list[str]]:
    """A tool's command, and the words that lead to its subcommand."""
    name, *below = tool.split()
    return load_tool(name), below


def arguments(
    case: Case, assets: Assets, *, output: str | None = None, inputs: Sequence[Any] | None = None
) -> list[str]:
    """A command line that works, or one changed from it."""
    given = [os.fspath(i) for i in (case.inputs(assets) if inputs is None else inputs)]
    out = [] if case.makes == "nothing" else ["-o", case.output if output is None else output]
    return [*case.tool.split()[1:], *(os.fspath(a) for a in case.args(assets)), *out, *given]


def run(case: Case, assets: Assets, *extra: str, stdin: str | bytes | None = None, **changes: Any) -> Result:
    return invoke(load_tool(case.tool.split()[0]), *arguments(case, assets, **changes), *extra, stdin=stdin)


def files_of(path: Path) -> dict[str, str]:
    """Name → SHA-256 of a stream and its sidecar, or of all files of a folder; work files left out."""
    if not path.is_dir():
        found = [p for p in path.parent.iterdir() if p.is_file() and p.name.startswith(path.name)]
    else:
        found = [p for p in path.rglob("*") if p.is_file()]
    return {
        str(p.relative_to(path.parent)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(found)
    }


def leftovers(folder: Path) -> list[str]:
    return [str(p) for p in folder.rglob(".*") if p.name.endswith((".tmp", ".old"))]


@each_tool
def test_has_a_case(tool: str) -> None:
    assert tool in {c.tool.split()[0] for c in CASES}, f"add a Case for {tool} to tests/contract/cases.py"


@each_tool
class TestWithoutInput:
    def test_help(self, tool: str) -> None:
        command = load_tool(tool)
        text = invoke(command, "--help")
        assert text.code == 0
        assert text.stdout.startswith(f"Usage: {tool} ")
        assert invoke(command, "-h").stdout == text.stdout
        assert "\x1b" not in text.stdout
        leaves = list(command.commands.values()) if isinstance(command, click.Group) else [command]
        for leaf in leaves:
            names = {o for p in leaf.params for o in p.opts}
            common = {
                "--params",
                "--seed",
                "--force",
                "--dry-run",
                "--json",
                "--quiet",
                "--verbose",
                "--on-error",
            }
            assert common <= names
            assert all(p.help for p in leaf.params if isinstance(p, click.Option))

    def test_version(self, tool: str) -> None:
        assert invoke(load_tool(tool), "--version").stdout.startswith(f"{tool} (tuneutils) ")

    def test_unknown_option(self, tool: str) -> None:
        words = [c.tool.split()[1:] for c in CASES if c.tool.split()[0] == tool]
        done = invoke(load_tool(tool), *(words[0] if words else []), "--dry-rnu")
        assert (done.code, done.stdout) == (2, "")
        assert "'--dry-rnu' (did you mean '--dry-run'?)" in done.error


@cases()
class TestUsage:
    def test_unknown_params_key(self, case: Case, assets: Assets, workdir: Path) -> None:
        Path("params.yaml").write_text("a: {b: {sede: 1}}\n")
        done = run(case, assets, "--params", "params.yaml:a.b")
        assert done.code == 2
        assert done.error == "params.yaml:a.b: unknown key 'sede' (did you mean 'seed'?)"

    def test_dry_run_writes_nothing(self, case: Case, assets: Assets, workdir: Path) -> None:
        done = run(case, assets, "--dry-run", "-q")
        assert done.code == 0, done.stderr
        shown = done.json()
        assert shown["tool"] == case.tool
        assert shown["params"]
        assert list(workdir.iterdir()) == []

    def test_numbers_must_be_finite(self, case: Case, assets: Assets, workdir: Path) -> None:
        command, below = command_of(case.tool)
        for name in below:
            command = command.commands[name]  # type: ignore[attr-defined]
        for option in (p for p in command.params if p.type.name in ("float", "float range")):
            for value in ("nan", "inf"):
                done = run(case, assets, f"{option.opts[-1]}={value}")
                assert (done.code, f"{value} is not a finite number" in done.error) == (2, True), done.stderr
        assert list(workdir.iterdir()) == []

    def test_missing_input(self, case: Case, assets: Assets, workdir: Path) -> None:
        done = run(case, assets, inputs=["nosuch/folder/in.jsonl"] * len(case.inputs(assets)))
        assert (done.code, "nosuch" in done.error) == (66, True), done.stderr
        assert [p for p in workdir.iterdir() if p.name != ".work"] == []


@cases(paths=True)
def test_missing_file_of_an_option(case: Case, assets: Assets, workdir: Path) -> None:
    for option in case.paths:
        done = run(case, assets, option, "nosuch/folder/file")
        assert (done.code, "nosuch/folder/file" in done.error) == (66, True), (option, done.stderr)
        assert [p for p in workdir.iterdir() if p.name != ".work"] == []


@cases(reads=True)
class TestBadRecords:
    @pytest.mark.parametrize(
        ("data", "place", "says"),
        [
            (b"", "", "no records"),
            (b"\n\n", "", "no records"),
            (b'%s\n{"pro', ":2", "cut off"),
            (b"%s\n%s\n\xff\n", ":3", "not UTF-8: byte 0xff"),
            (b"%s\n[1]\n", ":2", "must be a JSON object"),
            (b'%s\n{"nothing": "known"}\n', ":2", "nothing"),
            (b'%s\n{"prompt": 3, "completion": "x"}\n', ":2", "field 'prompt'"),
        ],
        ids=["empty", "blank", "cut", "bytes", "list", "unknown", "type"],
    )
    def test_is_named(
        self, case: Case, assets: Assets, workdir: Path, data: bytes, place: str, says: str
    ) -> None:
        good = json.dumps(tiny_records(str(case.reads))[0]).encode()
        Path("bad.jsonl").write_bytes(data.replace(b"%s", good))
        done = run(case, assets, inputs=["bad.jsonl"])
        assert done.code == 65, done.stderr
        assert done.error.startswith(f"bad.jsonl{place}: "), done.stderr
        lacks_fields = says in ("nothing", "field 'prompt'")
        assert (case.says if case.says and lacks_fields else says) in done.error
        assert [p.name for p in workdir.iterdir() if p.name != ".work"] == ["bad.jsonl"]

    def test_on_error_skip_goes_on(self, case: Case, assets: Assets, workdir: Path) -> None:
        good = "".join(json.dumps(r) + "\n" for r in tiny_records(str(case.reads)))
        Path("in.jsonl").write_text("garbage\n" + good)
        done = run(case, assets, "-q", "--on-error", "skip", inputs=["in.jsonl"])
        assert done.code == 0, done.stderr

    def test_on_error_quarantine_keeps_the_line(self, case: Case, assets: Assets, workdir: Path) -> None:
        good = "".join(json.dumps(r) + "\n" for r in tiny_records(str(case.reads)))
        Path("in.jsonl").write_text("garbage\n" + good)
        done = run(case, assets, "-q", "--on-error", "quarantine", inputs=["in.jsonl"])
        assert done.code == 0, done.stderr
        kept = [p for p in workdir.rglob("*") if "quarantine" in p.name]
        entries = [json.loads(line) for p in kept for line in p.read_text().splitlines()]
        assert [(e["line"], e["raw"]) for e in entries] == [(1, "garbage")]


@cases(makes=("directory", "stream"))
class TestOutput:
    def test_whole_quiet_repeatable_and_idempotent(self, case: Case, assets: Assets, workdir: Path) -> None:
        done = run(case, assets, "-q", "--json")
        assert (done.code, done.stderr) == (0, ""), done.stderr
        assert isinstance(done.json(), dict)
        output = workdir / case.output
        first = files_of(output)
        if case.makes == "directory":
            assert verify(output) == []
            manifest = load_manifest(output)
            assert manifest["tool"] == case.tool
            assert len(manifest["inputs"]) >= len(case.inputs(assets))
        text = "".join(p.read_text() for p in [*output.parent.glob("*.json"), *output.glob("artifact.json")])
        assert os.uname().nodename not in text
        assert leftovers(workdir) == []

        again = run(case, assets, "-q", "--json")
        assert again.code == 0, again.stderr
        assert files_of(output) == first

        other = run(case, assets, "-q", "--seed", "12345")
        assert (other.code, "--force" in other.error) == (73, True)
        assert files_of(output) == first

        forced = run(case, assets, "-q", "--force")
        assert forced.code == 0, forced.stderr
        if case.same_again:
            assert files_of(output) == first
        assert leftovers(workdir) == []

    @pytest.mark.parametrize("place", ["file/out", "/proc/nosuch/out"])
    def test_unwritable(self, case: Case, assets: Assets, workdir: Path, place: str) -> None:
        Path("file").write_text("in the way")
        done = run(case, assets, "-q", output=place + Path(case.output).suffix)
        assert (done.code, place.split("/")[-2] in done.error) == (73, True), done.stderr
        assert Path("file").read_text() == "in the way"

    def test_what_is_not_ours_is_not_replaced(self, case: Case, assets: Assets, workdir: Path) -> None:
        Path(case.output).mkdir()
        Path(case.output, "thesis.txt").write_text("years of work")
        done = run(case, assets, "-q", "--force")
        assert done.code == 73, done.stderr
        assert Path(case.output, "thesis.txt").read_text() == "years of work"

    @pytest.mark.parametrize("longest", [0.02, 1.0])
    def test_killed_while_writing(self, case: Case, assets: Assets, workdir: Path, longest: float) -> None:
        """The name holds nothing or something whole, and the next run cleans up and succeeds."""
        line = [*arguments(case, assets), "-q"]
        pid = fork(lambda: load_tool(case.tool.split()[0]).main(line))
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and not leftovers(workdir):
            time.sleep(0.002)
        if not ended[0]:
            time.sleep(random.Random(case.id).uniform(0, longest))
            os.kill(pid, signal.SIGKILL)
            ended = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(ended[1]) in (0, -signal.SIGKILL)
        output = Path(case.output)
        if output.is_dir():
            assert verify(output) == []
        elif output.exists() and not case.keeps:
            assert all(isinstance(r, dict) for r in read(output))
        elif output.exists():
            given = read(case.inputs(assets)[0])  # a tool may add fields
            assert [{k: r[k] for k in g} for r, g in zip(read(output), given, strict=True)] == given
        done = run(case, assets, "-q")
        assert done.code in (0, 73) if output.is_file() else done.code == 0, done.stderr
        done = run(case, assets, "-q", "--force")
        assert done.code == 0, done.stderr
        assert leftovers(workdir) == []


@cases(stdin=True)
def test_stdin(case: Case, assets: Assets, workdir: Path) -> None:
    text = case.inputs(assets)[0].read_text()
    done = run(case, assets, "-q", inputs=[], stdin=text)
    assert done.code == 0, done.stderr
    assert Path(case.output).exists()


@cases(makes=("stream",))
class TestStream:
    def test_stdout_is_what_the_file_would_be(self, case: Case, assets: Assets, workdir: Path) -> None:
        run(case, assets, "-q")
        done = run(case, assets, "-q", output="-")
        assert (done.code, done.stderr) == (0, "")
        assert done.stdout.encode() == Path(case.output).read_bytes()
        assert run(case, assets, "--json", output="-").code == 2

    def test_head(self, case: Case, assets: Assets, workdir: Path) -> None:
        if not case.long:
            pytest.skip("its output fits in the pipe")
        write_jsonl(Path("many.jsonl"), tiny_records(str(case.reads), 5000))
        line = arguments(case, assets, output="-", inputs=["many.jsonl"])
        reading, writing = os.pipe()
        errors = os.open("errors", os.O_WRONLY | os.O_CREAT)
        if hasattr(fcntl, "F_SETPIPE_SZ"):  # the output must not fit in the pipe, and end before head does
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)

        def call() -> int:
            os.close(reading)
            return int(load_tool(case.tool.split()[0]).main(line) or 0)

        pid = fork(call, stdout=writing, stderr=errors)
        os.close(writing)
        with os.fdopen(reading, "rb", buffering=0) as stream:
            assert json.loads(stream.readline())
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 141
        assert "error" not in Path("errors").read_text()
