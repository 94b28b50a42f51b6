"""Whole runs on the tiny model: what is learnt, measured, reported and refused, and kills."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import PROVERBS, Result, forked, invoke, load_tool, tiny_records, write_jsonl

from tuneutils.shared import device  # noqa: F401

import torch  # isort: skip
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

CPU = ("--device", "cpu", "--dtype", "float32")
GENERAL = [{"text": f"General thing {i} is {i * i} of all numbers."} for i in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cpt")
    write_jsonl(made / "domain.jsonl", [*tiny_records("text", 20), {"text": " ".join(PROVERBS)}])
    write_jsonl(made / "general.jsonl", GENERAL)
    return made


def cpt(folder: Path, model: Path, output: str, *args: str) -> Result:
    common = (*("--batch-size", "2", "--max-length", "64", "--learning-rate", "0.01"), *CPU)
    given = ("-m", str(model), "-o", str(folder / output), str(folder / "domain.jsonl"))
    return invoke(load_tool("cpt-run"), *given, *common, *args)


def measured(folder: Path) -> list[str]:
    return [
        *("--eval", str(folder / "domain.jsonl"), "--general", str(folder / "general.jsonl")),
        *("--replay", str(folder / "general.jsonl"), "--replay-share", "0.25"),
    ]


@pytest.fixture(scope="module")
def done(folder: Path, tiny_model: Path) -> Path:
    result = cpt(folder, tiny_model, "out", *measured(folder), "--eval-every", "4", "--warmup", "0.3")
    assert result.code == 0, result.stderr
    return folder / "out"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def plain_nll(folder: Path, texts: list[str]) -> np.ndarray[Any, Any]:
    """Per text: nats and tokens, the first token from BOS, by plain Transformers."""
    model, tokenizer = (C.from_pretrained(folder) for C in (AutoModelForCausalLM, AutoTokenizer))
    made = []
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
        total, start = 0.0, 1
        while start < len(ids):  # windows of 64 fed tokens, as the harness cuts them
            end = min(start + 64, len(ids))
            given = torch.tensor([ids[max(0, end - 65) : end - 1]])
            with torch.no_grad():
                logprobs = model(given).logits[0].double().log_softmax(-1)
            for i in range(start, end):
                total -= logprobs[i - 1 - max(0, end - 65), ids[i]].item()
            start = end
        made.append((total, len(ids) - 1))
    return np.array(made)


@pytest.mark.parametrize("side", ["before", "after"])
def test_perplexities_are_those_of_plain_transformers(
    done: Path, folder: Path, tiny_model: Path, side: str
) -> None:
    texts = [json.loads(line)["text"] for line in (folder / "domain.jsonl").read_text().splitlines()]
    totals = plain_nll(tiny_model if side == "before" else done, texts).sum(0)
    text = read(done / "report.json")["texts"]["domain"]
    assert text["perplexity"][side]["value"] == pytest.approx(math.exp(totals[0] / totals[1]), rel=1e-5)
    bits = totals[0] / math.log(2) / sum(len(t.encode()) for t in texts)
    assert text["bits_per_byte"][side]["value"] == pytest.approx(bits, rel=1e-5)
    assert text["documents"] == 21


def test_forgetting_is_the_ratio_of_perplexities_within_its_interval(done: Path) -> None:
    text = read(done / "report.json")["texts"]["general"]
    change, sides = text["perplexity_change"], text["perplexity"]
    assert change["value"] == pytest.approx(sides["after"]["value"] / sides["before"]["value"] - 1)
    assert change["low"] < change["value"] < change["high"]
    assert change["n"] == len(GENERAL)


def test_the_learning_rate_is_the_formula_and_the_share_is_kept(done: Path) -> None:
    log = [json.loads(line) for line in (done / "log.jsonl").read_text().splitlines()]
    metrics = read(done / "artifact.json")["metrics"]
    steps, warmup = metrics["steps"], math.ceil(0.3 * metrics["steps"])
    assert len(log) == steps
    for entry in log:
        t = entry["step"]
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * (t - warmup) / (steps - warmup))) / 2
        assert entry["learning_rate"] == pytest.approx(0.01 * (t / warmup if t <= warmup else cosine))
    assert abs(metrics["replay_tokens"] - 0.25 * metrics["tokens"]) <= 64
    assert metrics["passes"] == pytest.approx(1.0)
    curve = [p["step"] for p in read(done / "report.json")["curve"] if p["text"] == "domain"]
    assert curve == sorted({0, *range(4, steps, 4), steps})


def test_the_gate_is_asked_also_of_a_report_that_is_up_to_date(
    done: Path, folder: Path, tiny_model: Path
) -> None:
    again = (*measured(folder), "--eval-every", "4", "--warmup", "0.3", "--max-forgetting")
    change = read(done / "report.json")["texts"]["general"]["perplexity_change"]["value"]
    assert change < 0
    assert cpt(folder, tiny_model, "out", *again, "3%").code == 0
    report = read(done / "report.json")
    try:
        report["texts"]["general"]["perplexity_change"]["value"] = 0.031
        manifest = read(done / "artifact.json")
        keep = (done / "report.json").read_bytes(), (done / "artifact.json").read_bytes()
        (done / "report.json").write_text(json.dumps(report))
        from tuneutils.shared.artifact import sha256_file

        manifest["files"]["report.json"] = {
            "sha256": sha256_file(done / "report.json"),
            "bytes": (done / "report.json").stat().st_size,
        }
        (done / "artifact.json").write_text(json.dumps(manifest))
        failed = cpt(folder, tiny_model, "out", *again, "3%")
        assert failed.code == 1
        assert "+3.1 %" in failed.error
    finally:
        (done / "report.json").write_bytes(keep[0])
        (done / "artifact.json").write_bytes(keep[1])


def test_a_budget_is_a_number_of_tokens(folder: Path, tiny_model: Path) -> None:
    timed = cpt(folder, tiny_model, "timed", "--budget", "4s", "--checkpoint-every", "0")
    assert timed.code == 0, timed.stderr
    manifest = read(folder / "timed" / "artifact.json")
    counted = cpt(folder, tiny_model, "counted", "--tokens", str(manifest["metrics"]["tokens"]))
    assert counted.code == 0, counted.stderr
    one, two = ((folder / n / "model.safetensors").read_bytes() for n in ("timed", "counted"))
    assert one == two
    assert cpt(folder, tiny_model, "never", "--budget", "0.001s").code == 2


def test_a_killed_run_ends_in_the_same_bytes(
    done: Path, folder: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = {p.name: p.read_bytes() for p in done.rglob("*") if p.is_file()}
    args = (*measured(folder), "--eval-every", "4", "--warmup", "0.3", "--checkpoint-every", "2")

    def run() -> Result:
        return cpt(folder, tiny_model, "killed", *args)

    for moment in (30, 45):
        code, _ = forked(run, kill_at=moment)
        assert code == -9
        assert not (folder / "killed").exists()
    resumed = run()
    assert resumed.code == 0, resumed.stderr
    assert "going on from step" in resumed.stderr
    made = {p.name: p.read_bytes() for p in (folder / "killed").rglob("*") if p.is_file()}
    assert made == expected
    shutil.rmtree(folder / "killed")


def test_lora_with_embeddings_loads_with_peft_and_keeps_them_tied(folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from support import build_tiny_model

    base = build_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    args = ("--method", "lora", "--lora-rank", "2", "--embeddings", "train", "--tokens", "300")
    result = cpt(folder, base, "lora", *args, "--general", str(folder / "general.jsonl"))
    assert result.code == 0, result.stderr
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "lora")
    merged = model.merge_and_unload()
    before = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(merged.get_input_embeddings().weight, before)
    assert torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "merged")
    totals = plain_nll(tmp_path / "merged", [r["text"] for r in GENERAL]).sum(0)
    after = read(folder / "lora" / "report.json")["texts"]["general"]["perplexity"]["after"]["value"]
    assert after == pytest.approx(math.exp(totals[0] / totals[1]), rel=1e-4)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--tokens", "5", "--budget", "3m"], "said once"),
        (["--budget", "soon"], "no time"),
        (["--max-forgetting", "3%"], "needs --general"),
        (["--max-forgetting", "much", "--general", "x"], "no share"),
        (["--method", "prefix"], "virtual tokens"),
        (["--method", "lora", "--embeddings", "freeze"], "goes with --method full"),
        (["--eval-every", "2"], "needs --eval or --general"),
    ],
)
def test_options_that_do_not_go_together(folder: Path, tiny_model: Path, args: list[str], says: str) -> None:
    refused = cpt(folder, tiny_model, "refused", *args)
    assert refused.code == 2
    assert says in refused.error
    assert not (folder / "refused").exists()
