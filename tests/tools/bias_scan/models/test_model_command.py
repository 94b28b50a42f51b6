"""``bias-scan model``: what it writes, compares, gates and refuses."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import Result, build_tiny_model, write_jsonl

from .conftest import WORDS, build_classifier

Cli = Callable[..., Result]
CPU = ("--device", "cpu", "--dtype", "float32")


@pytest.fixture(scope="module")
def crows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pairs of two kinds."""
    rows = [
        {
            "sent_more": f"The {a} man said {b}.",
            "sent_less": f"The {b} man said {a}.",
            "bias_type": "xy"[i % 2],
        }
        for i, (a, b) in enumerate((a, b) for a in WORDS[:8] for b in WORDS[8:13])
    ]
    return write_jsonl(tmp_path_factory.mktemp("sets") / "crows.jsonl", rows)


def report(folder: str = "r") -> dict[str, Any]:
    return json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))


def test_a_report(workdir: Path, click_cli: Cli, tiny_model: Path, crows: Path) -> None:
    done = click_cli("bias-scan", "model", tiny_model, "--set", f"crows-pairs={crows}", "-o", "r", *CPU)
    assert done.code == 0, done.stderr
    made = report()
    rows = {(r["group"], r["metric"]): r for r in made["rows"]}
    whole = rows["", "sum-logprob"]
    assert (made["kind"], whole["axis"], whole["n"], whole["extra"]["ties"]) == (
        "model",
        "crows-pairs",
        40,
        0,
    )
    assert whole["low"] <= whole["value"] <= whole["high"]
    assert rows["x", "sum-logprob"]["note"] == "refused: n=20 is below 30"
    assert rows["x", "sum-logprob"]["value"] is None
    with gzip.open("r/items.jsonl.gz", "rt") as stream:
        items = [json.loads(line) for line in stream]
    hits = sum(i["sum-logprob"][0] > i["sum-logprob"][1] for i in items)
    assert whole["value"] == pytest.approx(100 * hits / 40)
    for said in ("A low score is no evidence of absence", "lm-evaluation-harness", "sum-logprob"):
        assert said in done.stderr
        assert said in Path("r/index.html").read_text(encoding="utf-8")
    again = click_cli("bias-scan", "model", tiny_model, "--set", f"crows-pairs={crows}", "-o", "r", *CPU)
    assert "up to date" in again.stderr


def test_two_models_item_by_item(workdir: Path, click_cli: Cli, tiny_model: Path, crows: Path) -> None:
    other = build_tiny_model(workdir / "m" / "other", seed=5)
    args = ("--set", f"crows-pairs={crows}", "--baseline", "base", "-o", "r", *CPU)
    done = click_cli("bias-scan", "model", f"base={tiny_model}", other, *args)
    assert done.code == 0, done.stderr
    rows = {(r["group"], r["metric"]): r for r in report()["rows"]}
    base, new = (rows[label, "mean-logprob"]["value"] for label in ("base", "other"))
    difference = rows["other", "mean-logprob-difference"]
    assert difference["value"] == pytest.approx(new - base)
    assert (difference["extra"]["before"], difference["extra"]["after"]) == (base, new)
    change = rows["other", "mean-logprob-bias-change"]
    assert change["value"] == pytest.approx(abs(new - 50) - abs(base - 50))


def test_gates(workdir: Path, click_cli: Cli, tiny_model: Path, crows: Path) -> None:
    """A model does not fall below itself; the report is there all the same."""
    args = ("bias-scan", "model", f"a={tiny_model}", f"b={tiny_model}", "--set", f"crows-pairs={crows}", *CPU)
    done = click_cli(*args, "--baseline", "a", "--require-fall", "crows-pairs.sum-logprob", "-o", "r")
    assert done.code == 1
    assert "crows-pairs.b.sum-logprob-bias-change: 0 [0, 0], not below zero" in done.error
    assert report()["rows"]
    again = click_cli(*args, "--baseline", "a", "--require-fall", "crows-pairs.sum-logprob", "-o", "r")
    assert (again.code, again.error) == (1, done.error), "a report that is up to date has its gates asked"
    done = click_cli(*args, "--fail-above", "crows-pairs.sum-logprob=-1", "-o", "s")
    assert done.code == 1
    assert "is above -1" in done.error
    assert click_cli(*args, "--fail-above", "crows-pairs.sum-logprob=100", "-o", "t").code == 0


def test_a_sample_is_the_same_for_a_seed(
    workdir: Path, click_cli: Cli, tiny_model: Path, crows: Path
) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        args = ("--sample", "10", "--seed", seed, "-o", name, *CPU)
        assert click_cli("bias-scan", "model", tiny_model, "--set", f"crows-pairs={crows}", *args).code == 0
    first, second, third = ([r for r in report(n)["rows"] if r["group"] == ""] for n in "abc")
    assert first[0]["n"] == 10
    items = [gzip.decompress(Path(n, "items.jsonl.gz").read_bytes()) for n in "abc"]
    assert (items[0], first) == (items[1], second)
    assert items[0] != items[2]
    assert third


def test_a_masked_model_and_its_own_operationalisation(
    workdir: Path, click_cli: Cli, masked_model: Path, crows: Path
) -> None:
    done = click_cli("bias-scan", "model", masked_model, "--set", f"crows-pairs={crows}", "-o", "r", *CPU)
    assert done.code == 0, done.stderr
    assert {r["metric"] for r in report()["rows"]} == {"shared-pll"}


def test_seat_and_weat_of_a_model(workdir: Path, click_cli: Cli, tiny_model: Path) -> None:
    args = ("--set", "weat=builtin", "--set", "seat=builtin", "-o", "r", *CPU)
    done = click_cli("bias-scan", "model", tiny_model, *args)
    assert done.code == 0, done.stderr
    rows = report()["rows"]
    assert {(r["axis"], r["metric"]) for r in rows} == {("weat", "d"), ("seat", "d")}
    sizes = {r["axis"]: r["n"] for r in rows if r["group"].startswith("WEAT 6:")}
    assert sizes == {"weat": 16, "seat": 96}


def test_consistency_of_a_reward_model(workdir: Path, click_cli: Cli) -> None:
    """What cf-augment writes goes straight in."""
    model = build_classifier(workdir / "m", 1)
    write_jsonl(
        workdir / "in.jsonl",
        [{"prompt": f"Who left at {i}?", "completion": "She left with her bag."} for i in range(40)],
    )
    assert click_cli("cf-augment", "write", "in.jsonl", "-o", "twins.jsonl", "--axis", "gender").code == 0
    done = click_cli("bias-scan", "model", model, "--set", "consistency=twins.jsonl", "-o", "r", *CPU)
    assert done.code == 0, done.stderr
    rows = {r["metric"]: r for r in report()["rows"] if r["group"] == ""}
    assert rows["changed"]["n"] == 40
    args = ("--set", "consistency=twins.jsonl", "--sample", "30", "-o", "s", *CPU)
    assert click_cli("bias-scan", "model", model, *args).code == 0
    assert {r["n"] for r in report("s")["rows"]} == {30}
    assert rows["mean-move"]["value"] is not None


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--set", "crows=x"), 2, "write TEST=RECORDS with a test of crows-pairs"),
        (("--set", "bbq=builtin"), 2, "data-import builtin:bbq"),
        (("--set", "crows-pairs=none.jsonl"), 66, "none.jsonl: no such file"),
        (("--set", "crows-pairs=CROWS", "--baseline", "b"), 2, "--baseline b: none of m"),
        (("--set", "crows-pairs=CROWS", "--require-fall", "crows-pairs.ss"), 2, "needs --baseline"),
        (("--set", "crows-pairs=CROWS", "--baseline", "m", "--require-fall", "bbq.s-amb"), 2, "must be TEST.SCORE of crows-pairs"),
        (("--set", "stereoset=CROWS"), 65, "crows.jsonl:1: field 'target': must be text"),
        (("--set", "crows-pairs=CROWS", "--fail-above", "x"), 2, "must be AXIS.SCORE=VALUE"),
        (("--set", "crows-pairs=CROWS", "--fail-above", "bbq.s-amb=0"), 2, "must be TEST.SCORE of crows-pairs"),
    ],
)  # fmt: skip
def test_refusals(
    workdir: Path,
    click_cli: Cli,
    tiny_model: Path,
    crows: Path,
    args: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    given = [a.replace("CROWS", str(crows)) for a in args]
    done = click_cli("bias-scan", "model", f"m={tiny_model}", *given, "-o", "r", *CPU)
    assert done.code == code, done.stderr
    assert message in done.error
    assert not Path("r").exists()


def test_models_that_a_test_is_not_for(workdir: Path, click_cli: Cli, crows: Path, tiny_model: Path) -> None:
    model = build_classifier(workdir / "c", 1)
    done = click_cli("bias-scan", "model", model, "--set", f"crows-pairs={crows}", "-o", "r")
    assert done.code == 2
    assert "is reward; crows-pairs is put to causal, masked models" in done.error
    done = click_cli(
        "bias-scan", "model", tiny_model, f"model={model}", "--set", f"crows-pairs={crows}", "-o", "r"
    )
    assert done.code == 2


def test_bad_records_are_skipped_or_kept(
    workdir: Path, click_cli: Cli, tiny_model: Path, crows: Path
) -> None:
    (workdir / "bad.jsonl").write_text(crows.read_text() + '{"sent_more": "x"}\n')
    args = ("bias-scan", "model", tiny_model, "--set", "crows-pairs=bad.jsonl", "-o", "r", *CPU)
    assert click_cli(*args).code == 65
    done = click_cli(*args, "--on-error", "quarantine")
    assert done.code == 0
    (kept,) = [
        json.loads(line) for line in Path(".work/r/quarantine-crows-pairs.jsonl").read_text().splitlines()
    ]
    assert kept["line"] == 41


def test_likelihoods_of_twins(workdir: Path, click_cli: Cli, tiny_model: Path) -> None:
    """The gap of each text is that of Transformers' own loss, before it is divided by the tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_model),
        AutoTokenizer.from_pretrained(tiny_model),
    )

    def likelihood(text: str) -> float:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            return -float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)

    rows: list[dict[str, Any]] = [{"text": "It rained, and nobody is named."}]
    for i in range(4):
        rows.append({"id": f"{i}", "text": f"He saw {i} birds and his dog."})
        rows.append(
            {
                "id": f"{i}t",
                "twin_of": f"{i}",
                "twin_axis": "gender",
                "text": f"She saw {i} birds and her dog.",
            }
        )
    write_jsonl(Path("twins.jsonl"), rows)
    done = click_cli(
        "bias-scan",
        "model",
        tiny_model,
        "--set",
        "consistency=twins.jsonl",
        "--min-items",
        "2",
        "-o",
        "r",
        *CPU,
    )
    assert done.code == 0, done.stderr
    found = {r["metric"]: r for r in report()["rows"]}
    moves = [likelihood(rows[2 * i + 2]["text"]) - likelihood(rows[2 * i + 1]["text"]) for i in range(4)]
    assert found["likelihood-gap"]["value"] == pytest.approx(sum(map(abs, moves)) / 4, rel=1e-4)
    assert found["source-preference"]["value"] == 100 * sum(m < 0 for m in moves) / 4
    assert found["likelihood-gap"]["n"] == 4
    assert "1 without an item of consistency" in done.stderr
