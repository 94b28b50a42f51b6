"""Bad input and faults: one line with place and advice, the right exit code, nothing half done, nothing lost."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import CHATML, PROVERBS, Result, tiny_records, write_jsonl

from .conftest import Forks, log_of, weights_of

Tune = Callable[..., Result]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--method", "lorra"], "--method lorra: unknown (did you mean 'lora'?)"),
        (["--method", "hosulby"], "did you mean 'houlsby'?"),
        (["--learnig-rate", "1"], "no such option '--learnig-rate' (did you mean '--learning-rate'?)"),
        (["--peft-option", "lora_alpah=3"], "LoraConfig has no such field (did you mean 'lora_alpha'?)"),
        (["--peft-option", "lora_alpha"], "must be KEY=VALUE"),
        (["--method", "ia3", "--dora"], "--dora goes with --method lora or qlora"),
        (["--method", "full", "--quantization", "nf4"], "takes no --quantization"),
        (["--pissa", "--quantization", "nf4"], "4-bit storage cannot"),
        (["--patience", "2"], "--patience needs --heldout and --eval-every"),
        (["--target-modules", "nothing_proj"], "nothing_proj"),
        (["--batch-size", "0"], "--batch-size"),
    ],
)
def test_wrong_options(args: list[str], expected: str, tune: Tune, records: Path, workdir: Path) -> None:
    done = tune(records, *args)
    assert done.code == 2
    assert expected in done.error
    assert not (workdir / "out").exists()


def test_an_unknown_key_of_a_params_file(tune: Tune, records: Path, workdir: Path) -> None:
    (workdir / "params.yaml").write_text("lora:\n  learning_rate: 0.01\n  lora_rnak: 4\n")
    done = tune(records, "--params", "params.yaml:lora")
    assert done.code == 2
    assert "unknown key 'lora_rnak' (did you mean 'lora_rank'?)" in done.error
    (workdir / "params.yaml").write_text("lora:\n  learning_rate: 0.01\n  lora_rank: 4\n  warmup: 0\n")
    assert tune(records, "--params", "params.yaml:lora", "--max-steps", "1").code == 0
    params = json.loads((workdir / "out/artifact.json").read_text())["params"]
    assert params["lora_rank"] == {"value": 4, "source": "params"}
    assert log_of(workdir / "out")[0]["learning_rate"] == 0.01


GOOD = json.dumps(tiny_records("prompt-completion")[0])
LONG = json.dumps({"prompt": "Tell all.", "completion": " ".join(PROVERBS)})
BAD_LINES: dict[str, tuple[bytes, str]] = {
    "kind": (b'{"src": "a", "tgt": "b", "src_lang": "en", "tgt_lang": "de"}', "needs the fields"),
    "cut off": (b'{"prompt": "a", "completio', "the line seems cut off"),
    "not UTF-8": (b'{"prompt": "\xff", "completion": "a"}', "not UTF-8: byte 0xff"),
    "missing field": (b'{"prompt": "a", "complet": "b"}', "field 'complet' (did you mean 'completion'?)"),
    "no answer": (b'{"messages": [{"role": "user", "content": "a"}]}', "no assistant turn"),
    "too long": (LONG.encode(), "more than the model's context of 128 (--too-long truncate or drop"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_records_stop_are_skipped_or_kept(name: str, tune: Tune, workdir: Path) -> None:
    line, reason = BAD_LINES[name]
    path = workdir / "records.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + line + b"\n" + GOOD.encode() + b"\n")
    stopped = tune(path, "--max-steps", "1")
    assert stopped.code == 65
    assert stopped.error.startswith(f"{path}:2: ")
    assert reason in stopped.error
    assert not (workdir / "out").exists()

    skipped = tune(path, "--max-steps", "1", "--on-error", "skip", "--json", output="skipped")
    assert skipped.code == 0, skipped.stderr
    assert skipped.json()["metrics"]["examples"] == 2
    assert "1 bad records left out" in skipped.stderr

    for _ in range(2):  # the second run does nothing, and loses nothing
        kept = tune(path, "--max-steps", "1", "--on-error", "quarantine")
        assert kept.code == 0, kept.stderr
        (entry,) = map(json.loads, (workdir / ".work/out/records.quarantine.jsonl").read_text().splitlines())
        assert (entry["path"], entry["line"]) == (str(path), 2)
        assert reason in entry["reason"]
        assert "raw" in entry or entry["record"] == json.loads(line)


def test_an_empty_stream(tune: Tune, workdir: Path) -> None:
    path = write_jsonl(workdir / "empty.jsonl", [])
    done = tune(path)
    assert done.code == 65
    assert f"{path}: no records" in done.error
    assert tune(workdir / "absent.jsonl").code == 66


@pytest.mark.parametrize(("how", "examples"), [("truncate", 2), ("drop", 1)])
def test_what_is_too_long_is_cut_or_dropped_and_counted(
    how: str, examples: int, tune: Tune, workdir: Path
) -> None:
    path = workdir / "records.jsonl"
    path.write_text(f"{GOOD}\n{LONG}\n")
    done = tune(path, "--max-steps", "1", "--too-long", how, "--max-length", "60", "--json")
    assert done.code == 0, done.stderr
    metrics = done.json()["metrics"]
    assert metrics["examples"] == examples
    assert (metrics["truncated"], metrics["dropped"]) == ((1, 0) if how == "truncate" else (0, 1))
    assert "60 tokens" in done.stderr


def test_long_texts_are_split(tune: Tune, tiny_model: Path, workdir: Path) -> None:
    from transformers import AutoTokenizer

    text = " ".join(PROVERBS * 2)
    path = write_jsonl(workdir / "records.jsonl", [{"text": text}])
    done = tune(path, "--max-steps", "1", "--json")
    assert done.code == 0, done.stderr
    tokens = len(AutoTokenizer.from_pretrained(tiny_model)(text).input_ids) + 1
    assert done.json()["metrics"]["learnt_tokens"] == tokens - 1


def test_virtual_tokens_take_their_share_of_the_context(tune: Tune, workdir: Path) -> None:
    path = write_jsonl(workdir / "records.jsonl", [{"prompt": "a", "completion": "b" * 300}])
    done = tune(path, "--method", "prefix", "--virtual-tokens", "28")
    assert done.code == 65
    assert "the model's context of 100" in done.error


def test_a_template_without_eos_is_refused(
    tune: Tune, tiny_model: Path, records: Path, workdir: Path
) -> None:
    model = workdir / "model"
    shutil.copytree(tiny_model, model)
    (model / "chat_template.jinja").write_text(CHATML.replace("<|im_end|>", ""))
    done = tune(records, model=model)
    assert done.code == 65
    assert "11 of 11 examples do not end in EOS ('<|im_end|>')" in done.error
    assert "--show-labels" in done.error
    assert not (workdir / "out").exists()


def test_models_that_cannot_be_tuned(tune: Tune, tiny_model: Path, records: Path, workdir: Path) -> None:
    assert tune(records, "--max-steps", "1").code == 0
    for extra in ([], ["--dry-run"]):
        adapter = tune(records, *extra, model="out", output="second")
        assert adapter.code == 2
        assert "merge it into its base first (adapter-merge)" in adapter.error
    pickled = workdir / "pickled"
    shutil.copytree(tiny_model, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    done = tune(records, model=pickled, output="second")
    assert done.code == 65
    assert "pytorch_model.bin: pickled weights are refused" in done.error
    assert tune(records, model="no/where/at/all", output="second").code == 66
    assert not (workdir / "second").exists()


def test_outputs_that_cannot_be_written(tune: Tune, records: Path, workdir: Path) -> None:
    (workdir / "file").write_text("kept")
    assert tune(records, output="file").code == 73
    assert tune(records, output="file/out").code == 73
    (workdir / "folder").mkdir()
    (workdir / "folder" / "mine.txt").write_text("kept")
    done = tune(records, "--force", output="folder")
    assert done.code == 73
    assert (workdir / "folder" / "mine.txt").read_text() == "kept"
    assert (workdir / "file").read_text() == "kept"
    if os.geteuid():
        (workdir / "closed").mkdir(mode=0o500)
        assert tune(records, output="closed/out").code == 73


def test_show_labels(tune: Tune, records: Path, workdir: Path) -> None:
    shown = tune(records, "--show-labels", "1")
    assert shown.code == 0
    text, count = shown.stdout.rstrip().rsplit("\n", 1)
    first = json.loads(records.read_text().splitlines()[0])
    assert f"<|im_start|>user\n{first['prompt']}<|im_end|>" in text
    assert "[<|im_end|>]" in text
    assert count.startswith("-- ")
    counted = tune(records, "--show-labels", "1", "--json")
    assert counted.json()["examples"] == 11
    assert "[<|im_end|>]" in counted.stderr
    assert not (workdir / "out").exists()


def test_records_from_stdin_train_like_the_file(tune: Tune, records: Path, workdir: Path) -> None:
    assert tune(records, "--max-steps", "2", output="file").code == 0
    piped = tune("-", "--max-steps", "2", output="piped", stdin=records.read_bytes())
    assert piped.code == 0, piped.stderr
    with gzip.open(workdir / "records.jsonl.gz", "wb") as stream:
        stream.write(records.read_bytes())
    assert tune("records.jsonl.gz", "--max-steps", "2", output="packed").code == 0
    expected = weights_of(workdir / "file")
    for name in ("piped", "packed"):
        assert all((w == expected[n]).all() for n, w in weights_of(workdir / name).items())
    manifest = json.loads((workdir / "piped/artifact.json").read_text())
    assert {"role": "records", "path": "-"}.items() <= manifest["inputs"][1].items()


def test_dry_run_neither_reads_weights_nor_writes(
    tune: Tune, tiny_model: Path, records: Path, workdir: Path
) -> None:
    model = workdir / "model"
    shutil.copytree(tiny_model, model)
    (model / "model.safetensors").write_bytes(b"")
    planned = tune(records, "--dry-run", "--lora-rank", "4", model=model)
    assert planned.code == 0, planned.stderr
    assert planned.json()["trainable_parameters"] == 4096
    assert planned.json()["memory_estimate_bytes"] > 0
    assert sorted(p.name for p in workdir.iterdir()) == ["model", "records.jsonl"]


def test_streams_stay_clean(
    forks: Forks, tiny_model: Path, records: Path, heldout: Path, workdir: Path
) -> None:
    """As a process: what libraries print would not show in this one."""
    args: list[Any] = [
        records.name,
        "-m",
        tiny_model,
        "-o",
        "out",
        "--max-steps",
        "2",
        "--heldout",
        heldout.name,
    ]
    (plain,) = forks(*args, cwd=workdir)
    assert plain.code == 0
    assert plain.stdout == ""
    assert all(line.startswith("lora-tune: ") for line in plain.stderr.splitlines()), plain.stderr
    (quiet,) = forks(*args, "--force", "--lora-rank", "3", "-q", "--json", cwd=workdir)
    assert quiet.code == 0
    assert quiet.stderr == ""
    assert quiet.json()["output"] == "out"


def test_out_of_memory_is_retryable(forks: Forks, tiny_model: Path, workdir: Path) -> None:
    records = write_jsonl(workdir / "long.jsonl", [{"text": " ".join(PROVERBS)}] * 600)
    args: list[Any] = [
        records.name,
        "-m",
        tiny_model,
        "-o",
        "out",
        "--dtype",
        "float32",
        "--batch-size",
        "1024",
    ]
    (done,) = forks(*args, cwd=workdir, memory=400 * 2**20)
    assert done.code == 75, done.stderr
    assert "out of memory; try half the --batch-size" in done.error
    assert not (workdir / "out").exists()
    (enough,) = forks(*args[:-1], "2", "--max-steps", "1", cwd=workdir, memory=1200 * 2**20)
    assert enough.code == 0, enough.stderr
