"""Directory artifacts: whole or absent, true to their manifest, leading back to their sources."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
from support import Result, environment, invoke

from tuneutils.shared.artifact import (
    Artifact,
    Input,
    describe_input,
    lineage,
    load_manifest,
    manifest_of,
    sha256_file,
    sha256_tree,
    sidecar,
    verify,
    write_json,
)
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ExitCode, ToolError, UpToDate
from tuneutils.shared.manifest import without_secrets

TOY = Path(__file__).parent / "toy.py"
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1


@pytest.fixture(autouse=True)
def source(workdir: Path) -> Path:
    path = workdir / "in.jsonl"
    path.write_text('{"text": "a"}\n')
    return path


def build(*args: str, output: str = "out", inputs: str = "in.jsonl") -> Result:
    return invoke(toy.build, "-q", "--json", "-o", output, *args, inputs)


def run_for(output: str, **params: Any) -> Run[toy.BuildParams]:
    return Run(tool="toy-build", params=toy.BuildParams(**params), output=output, uses_model=False)


def make(output: str, inputs: list[Input], content: str = "x", **keys: Any) -> Path:
    run = run_for(output)
    with run.artifact("report", inputs) as art:
        (art.dir / "data.jsonl").write_text(content)
        art.licence, art.source = keys.get("licence"), keys.get("source")
    return Path(output)


def refusal(*args: str, **keywords: Any) -> str:
    done = build(*args, **keywords)
    assert done.code == ExitCode.CANNOT_WRITE, done
    return done.error


class TestHashes:
    def test_known_value(self, workdir: Path) -> None:
        Path("abc").write_bytes(b"abc")
        assert sha256_file("abc") == ABC

    def test_tree_is_sha256sum_of_a_sorted_listing(self, workdir: Path) -> None:
        for name in ("d/b", "d/sub/a", "d/sub/artifact.json"):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(name)
        Path("d/artifact.json").write_text("the folder's own manifest is not part of it")
        listing = subprocess.run(
            "cd d && find . -type f ! -path ./artifact.json -printf '%P\n' | LC_ALL=C sort | xargs sha256sum | sha256sum",
            shell=True,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert sha256_tree(Path("d")) == listing.split()[0]


class TestManifest:
    def test_names_everything(self, source: Path) -> None:
        assert build("--files", "2").code == 0
        manifest = load_manifest("out")
        assert verify(Path("out")) == []
        assert set(manifest["files"]) == {"sub/0.bin", "sub/1.bin", "train.jsonl"}
        assert manifest["files"]["sub/0.bin"]["bytes"] == 1024
        assert manifest["inputs"] == [{"role": "records", "path": "in.jsonl", "sha256": sha256_file(source)}]
        assert manifest["params"]["files"] == {"value": 2, "source": "flag"}
        assert manifest["params"]["kilobytes"] == {"value": 1, "source": "default"}
        assert (manifest["kind"], manifest["tool"], manifest["seed"]) == ("report", "toy-build", 0)
        assert "torch" in manifest["libraries"]

    def test_two_builds_are_equal_byte_for_byte(self) -> None:
        build(output="one")
        time.sleep(0.01)
        build("--force", output="two")
        for path in Path("one").rglob("*"):
            if path.is_file():
                assert path.read_bytes() == (Path("two") / path.relative_to("one")).read_bytes()

    def test_nothing_in_it_depends_on_when_and_where(self) -> None:
        build()
        text = Path("out/artifact.json").read_text()
        assert os.uname().nodename not in text
        assert str(Path.cwd()) not in text
        assert str(os.getpid()) not in json.dumps(load_manifest("out")["params"])

    def test_files_of_an_artifact_inside_are_hashed_too(self) -> None:
        with run_for("out").artifact("report") as art:
            (art.dir / "best").mkdir()
            (art.dir / "best/artifact.json").write_text("{}")
        assert set(load_manifest("out")["files"]) == {"best/artifact.json"}

    def test_verify_names_what_changed(self) -> None:
        build()
        Path("out/sub/0.bin").write_text("changed")
        Path("out/sub/1.bin").unlink()
        assert verify(Path("out")) == [
            "out/sub/0.bin: changed since it was written",
            "out/sub/1.bin: missing",
        ]

    def test_numpy_and_torch_numbers(self, workdir: Path) -> None:
        import torch

        write_json(
            Path("m.json"),
            {"a": np.float64(0.5), "b": np.int32(3), "c": torch.tensor(2), "d": np.bool_(True)},
        )
        assert json.loads(Path("m.json").read_text()) == {"a": 0.5, "b": 3, "c": 2, "d": True}

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan")])
    def test_a_number_that_is_none_is_named(self, value: float) -> None:
        with (
            pytest.raises(ToolError, match=r"metrics\.loss\[1\] is (nan|inf)"),
            run_for("out").artifact("x") as art,
        ):
            art.metrics = {"loss": [1.0, value]}
        assert os.listdir() == ["in.jsonl"]

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ("{", "damaged manifest"),
            ("[]", "no manifest of schema 1"),
            ('{"schema": 99}', "no manifest of schema 1"),
        ],
    )
    def test_damaged(self, content: str, says: str) -> None:
        Path("d").mkdir()
        Path("d/artifact.json").write_text(content)
        with pytest.raises(ToolError, match=says):
            load_manifest("d")
        with pytest.raises(ToolError, match="is the artifact complete"):
            load_manifest("nosuch")


@pytest.mark.parametrize(
    ("given", "recorded"),
    [
        ("https://h:8/a?api_key=s&x=", "https://h:8/a?api_key=***&x=e3b0c442"),
        ("http://u:p@h/a@b", "http://h/a@b"),
        ("HTTPS://h?bare", "HTTPS://h?***"),
        ("https://h/a", "https://h/a"),
        ("a folder?key=x", "a folder?key=x"),
        (("http://h?token=s", "b"), ("http://h?token=***", "b")),
        (3, 3),
    ],
)
def test_secrets_in_urls_are_not_recorded(given: object, recorded: object) -> None:
    """``e3b0c442`` begins the SHA-256 of nothing (FIPS 180-4's example)."""
    assert without_secrets(given) == recorded


class TestIdempotence:
    def test_same_again_is_left(self) -> None:
        build()
        before = os.stat("out").st_ino
        assert build().json()["up_to_date"] is True
        assert build("--pause", "0.001").json()["up_to_date"] is True  # a runtime option
        assert os.stat("out").st_ino == before

    def test_the_way_a_value_was_given_is_no_difference(self) -> None:
        build()
        assert build("--files", "3").json()["up_to_date"] is True

    def test_differences_are_named(self, source: Path) -> None:
        build()
        assert "exists and differs (files 3, now 4); --force replaces it" in refusal("--files", "4")
        assert "seed 0, now 1" in refusal("--seed", "1")
        assert "on_error 'stop', now 'skip'" in refusal("--on-error", "skip")
        source.write_text('{"text": "b"}\n')
        assert "other inputs" in refusal()
        source.write_text('{"text": "a"}\n')
        assert build().code == 0
        Path("out/train.jsonl").write_text("edited")
        assert "changed since it was written" in refusal()

    def test_force_replaces(self) -> None:
        build("--files", "5")
        assert build("--files", "1", "--force").code == 0
        assert set(load_manifest("out")["files"]) == {"sub/0.bin", "train.jsonl"}
        assert sorted(os.listdir()) == [".work", "in.jsonl", "out"]

    def test_failed_replacement_leaves_the_old(self) -> None:
        build()
        run = Run(tool="toy-build", params=toy.BuildParams(files=9), output="out", force=True)
        art = Artifact.open(run, "report", [])
        with pytest.raises(RuntimeError), art:  # noqa: PT012
            (art.dir / "half").write_text("half")
            raise RuntimeError
        assert verify(Path("out")) == []
        assert load_manifest("out")["params"]["files"]["value"] == 3

    @pytest.mark.parametrize("force", [[], ["--force"]])
    def test_what_is_no_artifact_is_never_replaced(self, force: list[str]) -> None:
        Path("out").mkdir()
        Path("out/thesis.txt").write_text("years of work")
        assert "is no artifact" in refusal(*force)
        assert Path("out/thesis.txt").read_text() == "years of work"
        assert "exists and is no directory" in refusal(*force, output="in.jsonl")
        Path("broken").symlink_to("nowhere")
        assert "exists and is no directory" in refusal(*force, output="broken")
        assert "is no artifact" in refusal(*force, output=".")

    def test_an_empty_folder_is_used(self) -> None:
        Path("out").mkdir()
        assert build().code == 0
        assert verify(Path("out")) == []

    def test_stdin_cannot_be_compared(self) -> None:
        line = '{"text": "a"}\n'
        assert invoke(toy.build, "-q", "-o", "out", stdin=line).code == 0
        done = invoke(toy.build, "-q", "-o", "out", stdin=line)
        assert (done.code, "stdin cannot be compared" in done.error) == (73, True)


class TestStreamIdempotence:
    def copy(self, *args: str, output: str = "copy.jsonl") -> Result:
        return invoke(toy.copy, "-q", "--json", "-o", output, *args, "in.jsonl")

    def test_same_again_is_left(self) -> None:
        assert self.copy().json()["read"] == 1
        before = os.stat("copy.jsonl").st_ino
        assert self.copy("--fail", "never").json()["up_to_date"] is True
        assert os.stat("copy.jsonl").st_ino == before

    def test_differences_are_named(self, source: Path) -> None:
        self.copy()
        assert "(rank 4, now 5); --force replaces it" in self.copy("--rank", "5").error
        assert self.copy("--rank", "5").code == 73
        assert self.copy("--rank", "5", "--force").code == 0
        Path("copy.jsonl").write_text("edited")
        assert "changed since it was written" in self.copy("--rank", "5").error
        Path("copy.jsonl.artifact.json").unlink()
        assert "no copy.jsonl.artifact.json beside it" in self.copy("--rank", "5").error

    def test_devices_are_written_to(self) -> None:
        assert self.copy(output="/dev/null").code == 0
        assert not Path("/dev/null.artifact.json").exists()


class TestLineage:
    def test_three_generations_and_a_split_folder(self) -> None:
        make(
            "raw",
            [Input("records", "https://example.org/a", "0" * 64, licence="CC0-1.0")],
            licence="MIT",
            source="s",
        )
        split = make("split", [describe_input("records", "raw")], "rows")
        Path("other.jsonl").write_text("rows of nobody")
        model = make(
            "model", [describe_input("records", "split/data.jsonl"), describe_input("other", "other.jsonl")]
        )
        card = make("card", [describe_input("model", model)])
        found = [(depth, i.role, i.path, m is not None) for depth, i, m in lineage(card)]
        assert found == [
            (1, "model", "model", True),
            (2, "records", "split/data.jsonl", True),
            (3, "records", "raw", True),
            (4, "records", "https://example.org/a", False),
            (2, "other", "other.jsonl", False),
        ]
        assert describe_input("x", "raw").licence == "MIT"
        (split / "data.jsonl").write_text("edited")
        assert [m is not None for _, _, m in lineage(card)] == [True, False, False]

    def test_licence_and_source_come_from_the_inputs_manifest(self) -> None:
        make("raw", [], licence="CC-BY-4.0", source="https://example.org")
        given = describe_input("records", "raw/data.jsonl")
        assert (given.kind, given.licence, given.source) == ("report", "CC-BY-4.0", "https://example.org")
        assert describe_input("records", Path("raw").absolute()).path == "raw"

    def test_file_beside_a_listed_one_is_nobodys(self) -> None:
        make("raw", [], licence="MIT")
        Path("raw/notes.jsonl").write_text("not listed")
        assert manifest_of(Path("raw/notes.jsonl")) is None
        assert describe_input("records", "raw/notes.jsonl").licence is None

    def test_a_changed_file_has_no_licence_and_a_changed_folder_is_refused(self) -> None:
        make("raw", [], licence="MIT")
        Path("raw/data.jsonl").write_text("longer than before")
        assert describe_input("records", "raw/data.jsonl").licence is None
        with pytest.raises(ToolError, match=r"raw/data\.jsonl: missing or changed") as caught:
            describe_input("records", "raw")
        assert caught.value.code == ExitCode.BAD_DATA

    def test_sidecar_of_a_stream(self, source: Path) -> None:
        sidecar(run_for("in.jsonl"), source, [], licence="CC0-1.0", source="made up")
        given = describe_input("records", source)
        assert (given.kind, given.licence, given.source) == ("records", "CC0-1.0", "made up")
        make("out", [given])
        assert [m is not None for _, _, m in lineage(Path("out"))] == [True]
        source.write_text('{"text": "edited"}\n')
        assert describe_input("records", source).licence is None

    def test_missing_input(self) -> None:
        with pytest.raises(ToolError) as caught:
            describe_input("model", "nosuch")
        assert caught.value.code == ExitCode.MISSING_INPUT

    def test_stdin(self) -> None:
        assert describe_input("records", "-") == Input("records", "-", "")


class TestKill:
    """SIGKILL while an artifact is written: its name holds a whole artifact or nothing."""

    ARGS = (sys.executable, str(TOY), "build", "-q", "-o", "out", "--files", "40", "--kilobytes", "64")

    def killed(self, delay: float, *args: str) -> bool:
        process = subprocess.Popen([*self.ARGS, *args, "in.jsonl"], stderr=subprocess.PIPE, env=environment())
        assert process.stderr is not None
        process.stderr.readline()
        time.sleep(delay)
        process.kill()
        process.stderr.close()
        return process.wait() == -signal.SIGKILL

    def test_new_artifact(self) -> None:
        chance = random.Random(0)
        kills = whole = 0
        for _ in range(25):
            kills += self.killed(chance.uniform(0, 0.06))
            if Path("out").exists():
                assert verify(Path("out")) == []
                whole += 1
                assert invoke(toy.build, *self.ARGS[3:], "--force", "in.jsonl").code == 0
                Path("out").rename(f"done{whole}")
        assert kills > 5
        assert build("--files", "40", "--kilobytes", "64").code == 0
        assert [n for n in os.listdir() if n.startswith(".out.")] == []

    def test_replacing(self) -> None:
        """The old artifact survives, if not under its name then until the next run puts it back."""
        build("--files", "2")
        chance = random.Random(1)
        for _ in range(25):
            self.killed(chance.uniform(0, 0.06), "--force")
            if Path("out").exists():
                assert verify(Path("out")) == []
            else:
                assert any(n.endswith(".old") for n in os.listdir())
        assert build("--files", "2").code in (0, 73)
        assert verify(Path("out")) == []
        assert build("--files", "2", "--force").code == 0
        assert sorted(os.listdir()) == [".work", "in.jsonl", "out"]

    def test_between_the_two_renames_of_a_replacement(self) -> None:
        build("--files", "2")
        os.rename("out", ".out.4194305.old")
        assert build("--files", "2").json()["up_to_date"] is True
        assert sorted(os.listdir()) == [".work", "in.jsonl", "out"]

    def test_leftover_with_our_own_number(self) -> None:
        """In a container every run may have the same process id."""
        Path(f".out.{os.getpid()}.tmp").mkdir()
        assert build().code == 0

    def test_a_running_process_keeps_its_folder(self) -> None:
        Path(f".out.{os.getppid()}.tmp").mkdir()
        assert build().code == 0
        assert Path(f".out.{os.getppid()}.tmp").is_dir()


def test_up_to_date_carries_the_manifest() -> None:
    make("raw", [])
    with pytest.raises(UpToDate) as caught:
        make("raw", [])
    assert caught.value.manifest["kind"] == "report"
