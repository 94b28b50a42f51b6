"""What every command does alike, shown on small commands of the test's own."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toy
from support import Result, environment, invoke, run_cli

TOY = Path(__file__).parent / "toy.py"
LINE = '{"text": "a"}\n'


def params_of(*args: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    done = invoke(toy.copy, "--dry-run", *args, env=env, stdin=LINE)
    assert done.code == 0, done.stderr
    return done.json()["params"]


def _interruptible() -> None:
    """A shell lets what it starts in the background ignore interrupts, and the tests then pass that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def spawn(*args: str, **keywords: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(TOY), *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=_interruptible,
        env=environment(),
        **keywords,
    )


@pytest.fixture
def section(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text("toy:\n  common: {rank: 7, learning_rate: 1e-4, tags: [a, b c], upper: true}\n")
    return path


class TestPrecedence:
    def test_default_then_params_then_environment_then_flag(self, section: Path) -> None:
        env = {"TUNEUTILS_TOY_COPY_RANK": "9"}
        file = ("--params", f"{section}:toy.common")
        assert params_of()["rank"] == {"value": 4, "source": "default"}
        assert params_of(*file)["rank"] == {"value": 7, "source": "params"}
        assert params_of(*file, env=env)["rank"] == {"value": 9, "source": "environment"}
        assert params_of(*file, "-r", "11", env=env)["rank"] == {"value": 11, "source": "flag"}

    def test_params_keep_types(self, section: Path) -> None:
        got = params_of("--params", f"{section}:toy.common")
        values = {k: v["value"] for k, v in got.items()}
        assert values["learning_rate"] == 1e-4
        assert values["tags"] == ["a", "b c"]
        assert values["upper"] is True

    def test_later_section_wins(self, section: Path, tmp_path: Path) -> None:
        other = tmp_path / "other.yaml"
        other.write_text("rank: 8\n")
        got = params_of("--params", f"{section}:toy.common", "--params", str(other))
        assert got["rank"]["value"] == 8
        assert got["upper"]["value"] is True

    def test_null_leaves_the_default(self, tmp_path: Path) -> None:
        path = tmp_path / "p.yaml"
        path.write_text("rank:\n")
        assert params_of("--params", str(path))["rank"]["source"] == "default"

    def test_flag_turns_a_true_section_off(self, section: Path) -> None:
        got = params_of("--params", f"{section}:toy.common", "--no-upper")
        assert got["upper"] == {"value": False, "source": "flag"}

    def test_hyphen_and_underscore_are_one(self, tmp_path: Path) -> None:
        path = tmp_path / "p.yaml"
        path.write_text("learning-rate: 0.5\nmode: slow_path\n")
        assert params_of("--learning_rate", "0.25")["learning_rate"]["value"] == 0.25
        assert params_of("--mode", "slow_path")["mode"]["value"] == "slow-path"
        got = params_of("--params", str(path))
        assert (got["learning_rate"]["value"], got["mode"]["value"]) == (0.5, "slow-path")

    def test_runtime_options_stay_out_of_the_manifest(self) -> None:
        assert "fail" not in params_of("--fail", "nothing")

    def test_subcommand_has_its_own_environment(self) -> None:
        done = invoke(toy.group, "two", "--json", env={"TUNEUTILS_TOY_GROUP_TWO_RANK": "5"})
        assert done.json() == {"rank": 5}


class TestUsageErrors:
    @pytest.mark.parametrize(
        ("args", "says"),
        [
            (["--rnak", "3"], "'--rank'"),
            (["--rank", "x"], "'x' is not a valid integer"),
            (["--rank", "65"], "65 is not in the range"),
            (["--learning-rate", "nan"], "'--learning-rate': nan is not a finite number"),
            (["--learning-rate", "inf"], "inf is not a finite number"),
            (["--learning-rate", "1e999"], "1e999 is not a finite number"),
            (["--mode", "fats"], "'fats' is not one of 'fast-path', 'slow-path'"),
            (["--seed", "-1"], "-1 is not in the range"),
            (["--seed", str(2**32)], "not in the range"),
            (["-", "-"], "only once"),
            (["--json"], "--json and data"),
            (["--params", "x.yaml"], "x.yaml: no such file"),
        ],
    )
    def test_one_line_names_the_value(self, args: list[str], says: str, workdir: Path) -> None:
        done = invoke(toy.copy, *args, stdin=LINE)
        assert says in done.error
        assert done.code == (66 if "no such file" in says else 2)
        assert len(done.stderr.splitlines()) == 1
        assert done.stdout == ""

    @pytest.mark.parametrize(
        ("yaml", "key", "says"),
        [
            ("rnak: 3", "", "unknown key 'rnak' (did you mean 'rank'?)"),
            ("params: x", "", "unknown key 'params'"),
            ("version: true", "", "unknown key 'version'"),
            ("rank: 1.5", "", "key 'rank': '1.5' is not a valid integer"),
            ("learning_rate: .nan", "", "key 'learning_rate': nan is not a finite number"),
            ("learning_rate: -.inf", "", "key 'learning_rate': -inf is not a finite number"),
            ("rank: true", "", "key 'rank': 'true' is not a valid integer"),
            ("rank: [1, 2]", "", "takes one value"),
            ("tags: {a: 1}", "", "must be a plain value"),
            ("mode: fats", "", "key 'mode': 'fats' is not one of"),
            ("upper: perhaps", "", "key 'upper'"),
            ("a: {b: {rank: 1}}", ":a.c", "no section 'a.c'"),
            ("a: [1]", ":a", "not a mapping"),
            ("a: [1", "", "not YAML"),
        ],
    )
    def test_params_file(self, tmp_path: Path, yaml: str, key: str, says: str) -> None:
        path = tmp_path / "p.yaml"
        path.write_text(yaml)
        done = invoke(toy.copy, "--params", f"{path}{key}", stdin=LINE)
        assert says in done.error
        assert str(path) in done.error
        assert done.code == 2

    def test_a_word_for_a_list_is_one_item(self, tmp_path: Path) -> None:
        path = tmp_path / "p.yaml"
        path.write_text("tags: word")
        assert params_of("--params", str(path))["tags"]["value"] == ["word"]

    def test_one_input_only(self) -> None:
        assert invoke(toy.group, "one", "a", "b").code == 2
        assert invoke(toy.group, "one", "--json", "a").json() == {"one": ["a"]}

    def test_default_subcommand_may_go_unnamed(self) -> None:
        assert invoke(toy.group, "--json", "a").json() == {"one": ["a"]}
        assert "one" in invoke(toy.group, "--help").stdout

    def test_output_of_a_directory_tool_is_required(self) -> None:
        done = invoke(toy.build, stdin=LINE)
        assert (done.code, "missing -o" in done.error) == (2, True)

    def test_directory_artifact_cannot_go_to_stdout(self) -> None:
        assert invoke(toy.build, "-o", "-", stdin=LINE).code == 2


class TestExitCodes:
    @pytest.mark.parametrize(
        ("fail", "code", "says"),
        [
            ("", 0, None),
            ("gate", 1, "the answer is no"),
            ("data", 65, "data: bad"),
            ("device", 69, "no such device"),
            ("extra", 69, "pip install 'tuneutils[qlora]'"),
            ("absent", 69, "pip install nosuch"),
            ("bug", 70, "bug: RuntimeError: something broke"),
            ("eof", 70, "bug: EOFError: cut off"),
            ("memory", 75, "out of memory"),
            ("network", 75, "network: Connection reset by peer"),
            ("interrupt", 130, "interrupted"),
        ],
    )
    def test_exception(self, fail: str, code: int, says: str | None) -> None:
        done = invoke(toy.copy, "-q", "--fail", fail, stdin=LINE)
        assert done.code == code
        if says is None:
            assert done.stderr == ""
        else:
            assert says in done.error
            assert len(done.stderr.splitlines()) == 1

    def test_missing_input(self, workdir: Path) -> None:
        done = invoke(toy.copy, "nosuch.jsonl")
        assert (done.code, done.error) == (66, "nosuch.jsonl: no such file or directory")

    def test_verbose_shows_the_traceback(self) -> None:
        done = invoke(toy.copy, "-v", "--fail", "bug", stdin=LINE)
        assert done.code == 70
        assert "Traceback" in done.stderr

    def test_sigint(self) -> None:
        process = spawn("copy", "--fail", "wait")
        assert process.stderr is not None
        assert process.stderr.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == b"toy-copy: error: interrupted\n"

    def test_sigterm_removes_what_is_unfinished(self, tmp_path: Path) -> None:
        process = spawn("build", "-q", "-o", str(tmp_path / "out"), "--pause", "60", str(TOY))
        assert process.stderr is not None
        assert process.stderr.readline() == b"wrote 0\n"
        assert [p.name for p in tmp_path.iterdir()] == [f".out.{process.pid}.tmp"]
        process.terminate()
        assert process.wait(30) == 143
        assert list(tmp_path.iterdir()) == []
        assert process.stderr.read() == b""

    def test_broken_pipe(self, tmp_path: Path) -> None:
        source = tmp_path / "in.jsonl"
        source.write_text(LINE * 100_000)
        process = spawn("copy", "-q", str(source))
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == LINE.encode()
        process.stdout.close()
        assert process.wait(30) == 141
        assert process.stderr.read() == b""

    def test_pipe_closed_before_the_first_byte(self) -> None:
        process = spawn("copy", "-q")
        assert process.stdout is not None
        process.stdout.close()
        _, err = process.communicate(LINE.encode())
        assert (process.returncode, err) == (141, b"")

    def test_stdout_on_a_full_disk(self) -> None:
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [sys.executable, str(TOY), "copy", "-q"],
                input=LINE.encode(),
                stdout=full,
                stderr=subprocess.PIPE,
                env=environment(),
                check=False,
            )
        assert done.returncode == 73
        assert done.stderr == b"toy-copy: error: output: no space left on device\n"

    @pytest.mark.parametrize("tool", ["copy", "build"])
    def test_file_too_large(self, tool: str, tmp_path: Path) -> None:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

        source = tmp_path / "in" / "in.jsonl"
        source.parent.mkdir()
        source.write_text(LINE * 5_000)
        extra = ["--kilobytes", "100"] if tool == "build" else []
        done = run_cli(TOY, tool, "-q", source, "-o", tmp_path / "out.jsonl", *extra, preexec_fn=limit)
        assert (done.code, "file too large" in done.error) == (73, True)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]

    @pytest.mark.parametrize("tool", ["copy", "build"])
    def test_full_disk(self, tool: str, small_disk: Path) -> None:
        extra = ["--kilobytes", "2000"] if tool == "build" else []
        done = run_cli(TOY, tool, "-q", "-o", small_disk / "out.jsonl", *extra, stdin=LINE * 100_000)
        assert (done.code, "no space left" in done.error.lower()) == (73, True)
        assert list(small_disk.iterdir()) == []

    @pytest.mark.parametrize("tool", ["copy", "build"])
    @pytest.mark.parametrize("place", ["file/out.jsonl", "file/sub/out.jsonl", "/proc/nosuch/out.jsonl"])
    def test_unwritable(self, tool: str, place: str, workdir: Path) -> None:
        Path("file").write_text("in the way")
        done = invoke({"copy": toy.copy, "build": toy.build}[tool], "-q", "-o", place, stdin=LINE)
        assert done.code == 73
        assert place.split("/")[1 if place.startswith("/") else 0] in done.error

    @pytest.mark.parametrize("tool", ["copy", "build"])
    def test_read_only_folder(self, tool: str, tmp_path: Path) -> None:
        if os.geteuid() == 0:
            pytest.skip("root may write anywhere")
        tmp_path.chmod(0o500)
        done = invoke({"copy": toy.copy, "build": toy.build}[tool], "-o", tmp_path / "o", stdin=LINE)
        assert done.code == 73

    def test_out_of_memory(self) -> None:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_AS, (150 << 20, 150 << 20))

        big = '{"text": "' + "a" * (60 << 20) + '"}\n'
        done = run_cli(TOY, "copy", "-q", stdin=big, preexec_fn=limit)
        assert (done.code, "out of memory" in done.error) == (75, True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("may not mount a small file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


class TestStreams:
    def test_data_alone_on_stdout(self) -> None:
        done = invoke(toy.copy, stdin=LINE)
        assert (done.stdout, done.stderr) == (LINE, "toy-copy: copying\n")

    def test_quiet_and_verbose(self) -> None:
        assert invoke(toy.copy, "-q", stdin=LINE).stderr == ""
        assert "in detail" in invoke(toy.copy, "-v", stdin=LINE).stderr

    def test_json_prints_one_object(self, tmp_path: Path) -> None:
        done = invoke(toy.copy, "--json", "-o", tmp_path / "o.jsonl", stdin=LINE * 2)
        assert done.json() == {"read": 2, "refused": 0}

    def test_stdin_is_read_without_an_input(self) -> None:
        assert invoke(toy.copy, stdin=LINE * 3).stdout == LINE * 3
        assert invoke(toy.copy, "-", stdin=LINE * 3).stdout == LINE * 3

    def test_chain_through_pipes(self, tmp_path: Path) -> None:
        source = tmp_path / "in.jsonl"
        source.write_text(LINE * 10)
        command = f"{sys.executable} {TOY} copy -q {source} | {sys.executable} {TOY} copy -q"
        done = subprocess.run(command, shell=True, capture_output=True, env=environment(), check=True)
        assert done.stdout.decode() == LINE * 10

    def test_no_colour_when_asked_or_no_terminal(self) -> None:
        for env in ({}, {"NO_COLOR": "1"}):
            done = invoke(toy.copy, "--help", env=env)
            assert "\x1b" not in done.stdout

    def test_terminal_without_input_is_a_usage_error(self) -> None:
        master, slave = os.openpty()
        done = subprocess.run(
            [sys.executable, str(TOY), "copy"],
            stdin=slave,
            capture_output=True,
            env=environment(),
            check=False,
        )
        os.close(master)
        os.close(slave)
        assert (done.returncode, b"missing RECORDS" in done.stderr) == (2, True)

    def test_progress_is_a_bar_on_a_terminal_only(self) -> None:
        code = (
            "from tuneutils.shared.command import Run;r = Run(tool='t', params=None);"
            "p = r.progress(40, 'steps');[p.update() for _ in range(40)];p.__exit__()"
        )
        master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        process = subprocess.Popen([sys.executable, "-c", code], stderr=slave, env=environment())
        process.wait()
        shown = b""
        # Read while the other end is open: closing it can discard what was written.
        while select.select([master], [], [], 0.5)[0]:
            shown += os.read(master, 65536)
        os.close(slave)
        os.close(master)
        assert b"steps" in shown
        assert b"40/40" in shown

    def test_progress_is_ten_lines_elsewhere(self, capsys: pytest.CaptureFixture[str]) -> None:
        from tuneutils.shared.command import Run, _configure_logging

        run: Run[None] = Run(tool="toy", params=None)
        _configure_logging(run)
        with run.progress(1000, "steps") as progress:
            for _ in range(1000):
                progress.update()
        assert len(capsys.readouterr().err.splitlines()) == 10


class TestOptions:
    def test_help_shows_defaults_and_common_options(self) -> None:
        text = invoke(toy.copy, "-h").stdout
        assert invoke(toy.copy, "--help").stdout == text
        for shown in (
            "--rank",
            "[default: 4",
            "-o, --output",
            "--dry-run",
            "--on-error",
            "--seed",
            "--version",
        ):
            assert shown in text
        assert "--device" not in text
        assert "--device" in invoke(toy.build, "-h").stdout

    def test_version(self) -> None:
        from importlib.metadata import version

        assert invoke(toy.copy, "--version").stdout == f"toy-copy (tuneutils) {version('tuneutils')}\n"

    def test_dry_run_writes_nothing(self, workdir: Path) -> None:
        done = invoke(toy.build, "--dry-run", "-o", "out", "--files", "5", "nosuch.jsonl")
        assert done.json()["bytes"] == 5 * 1024
        assert done.json()["output"] == "out"
        assert list(workdir.iterdir()) == []

    def test_completion(self) -> None:
        env = {"_TOY_COPY_COMPLETE": "bash_complete", "COMP_WORDS": "toy-copy --ra", "COMP_CWORD": "1"}
        done = run_cli(TOY, "copy", env=env)
        assert done.stdout.strip() == "plain,--rank"

    def test_importing_the_command_layer_loads_nothing_heavy(self) -> None:
        code = (
            "import sys; sys.argv = ['x', 'copy', '--version']; import runpy; "
            f"\ntry: runpy.run_path({str(TOY)!r}, run_name='__main__')"
            "\nexcept SystemExit: pass"
            "\nprint(sorted({'torch', 'numpy', 'transformers', 'tqdm', 'yaml'} & set(sys.modules)))"
        )
        assert run_cli("-c", code).stdout.splitlines()[-1] == "[]"


def test_summary_of_a_second_run_says_up_to_date(workdir: Path) -> None:
    Path("in.jsonl").write_text(LINE)
    args = ("-q", "--json", "-o", "out", "in.jsonl")
    assert invoke(toy.build, *args).json() == {"files": 3}
    started = time.time_ns()
    again = invoke(toy.build, *args)
    assert again.json() == {"output": "out", "up_to_date": True, "metrics": {"files": 3}}
    assert all(p.stat().st_mtime_ns < started for p in Path("out").rglob("*"))
    assert json.loads(Path("out/artifact.json").read_text())["metrics"] == {"files": 3}


def test_result_error_needs_exactly_one_line() -> None:
    with pytest.raises(AssertionError):
        _ = Result(1, "", "x: error: a\nx: error: b\n").error
