"""The command: what it measures, what it writes, and what it refuses."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Result, build_tiny_model, tiny_records, write_jsonl

from tuneutils.shared.artifact import sha256_file
from tuneutils.tools.lm_bench.tradeoff import pareto

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models ``a`` and ``b`` and the streams ``held.jsonl`` and ``general.jsonl``."""
    folder = tmp_path_factory.mktemp("bench")
    build_tiny_model(folder / "a")
    build_tiny_model(folder / "b", seed=1)
    write_jsonl(folder / "held.jsonl", tiny_records("prompt-completion", 12))
    write_jsonl(folder / "general.jsonl", tiny_records("text", 10))
    return folder


@pytest.fixture
def bench(models: Path, workdir: Path, click_cli: Cli) -> Callable[..., Result]:
    """``bench(*args, output="r")`` in float32; ``A`` and ``B`` in args stand for the models' folders."""
    named = {
        "A": models / "a",
        "B": models / "b",
        "HELD": models / "held.jsonl",
        "GENERAL": models / "general.jsonl",
    }

    def call(*args: Any, output: str = "r") -> Result:
        given = [named.get(str(a), a) for a in args]
        return click_cli("lm-bench", *given, "--dtype", "float32", "--device", "cpu", "-o", output)

    return call


def report(folder: str = "r") -> dict[str, Any]:
    return json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))


def items(folder: str, model: str, task: str) -> list[dict[str, Any]]:
    with gzip.open(Path(folder) / "items.jsonl.gz", "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    return [r for r in rows if (r["model"], r["task"]) == (model, task)]


def test_two_models_are_compared_item_by_item(bench: Cli) -> None:
    result = bench("A", "B", "--records", "HELD", "--general", "GENERAL", "--baseline", "a")
    assert result.code == 0, result.stderr
    a, b = report()["models"]
    assert (a["label"], b["label"]) == ("a", "b")
    assert "differences" not in a

    nll = {m: np.array([i["nll"] for i in items("r", m, "general")]) for m in "ab"}
    size = np.array([i["bytes"] for i in items("r", "a", "general")])
    bits = {m: nll[m].sum() / size.sum() / math.log(2) for m in "ab"}
    assert a["results"]["general"]["bits_per_byte"]["value"] == pytest.approx(bits["a"], rel=1e-12)
    lost = b["differences"]["general"]["bits_per_byte"]
    assert lost["value"] == pytest.approx(bits["b"] - bits["a"], rel=1e-9)
    # normal approximation of a paired ratio's error: linear in the per-item differences
    error = np.sqrt((((nll["b"] - nll["a"]) / math.log(2) - lost["value"] * size) ** 2).sum()) / size.sum()
    assert lost["high"] - lost["low"] == pytest.approx(2 * 1.96 * error, rel=0.25)
    assert (lost["n"], a["results"]["held"]["perplexity"]["n"]) == (10, 12)


def test_forgetting_is_the_bits_lost_on_general_text(bench: Cli) -> None:
    bench("A", "B", "--records", "HELD", "--general", "GENERAL", "--baseline", "a")
    first, second = csv.DictReader(io.StringIO(Path("r/table.csv").read_text(encoding="utf-8")))
    assert first["forgetting"] == ""
    assert second["forgetting"] == second["general:bits_per_byte_diff"] != ""
    assert float(second["forgetting_low"]) < float(second["forgetting"]) < float(second["forgetting_high"])


def test_joining_reports_gives_what_measuring_together_gives(bench: Cli) -> None:
    suite = ("--records", "HELD", "--general", "GENERAL", "--generate", "3", "--max-new-tokens", "4")
    assert bench("A", "B", "--baseline", "a", *suite, output="together").code == 0
    assert bench("A", *suite, output="bench/a").code == 0
    assert bench("B", *suite, output="bench/b").code == 0
    result = bench("bench/a", "bench/b", "--baseline", "a", output="joined")
    assert result.code == 0, result.stderr
    assert report("joined") == report("together")
    for name in ("table.csv", "items.jsonl.gz", "report.md", "plots/tradeoff.csv", "plots/tradeoff.svg"):
        assert sha256_file(Path("joined") / name) == sha256_file(Path("together") / name), name


def test_a_report_can_be_the_baseline_of_a_model(bench: Cli) -> None:
    bench("A", "--records", "HELD", output="base")
    result = bench("B", "--records", "HELD", "--baseline", "base")
    assert result.code == 0, result.stderr
    assert report()["baseline"] == "base"
    assert [m["label"] for m in report()["models"]] == ["base", "b"]


def test_a_metric_may_rise_by_a_share_of_the_baselines(bench: Cli) -> None:
    suite = ("A", "B", "--records", "HELD")
    assert bench(*suite, "--baseline", "a", output="first").code == 0
    found = {m["label"]: m["results"]["held"]["perplexity"]["value"] for m in report("first")["models"]}
    low, high = sorted(found, key=lambda label: found[label])
    rise = found[high] / found[low] - 1
    gate = ("--baseline", low, "--max-rise")
    assert bench(*suite, *gate, f"held:perplexity={rise + 0.001}", output="wide").code == 0
    assert bench(*suite, *gate, "held:perplexity=0", "--baseline", high, output="fall").code == 0
    for _ in range(2):  # the second time of a report that is up to date
        done = bench(*suite, *gate, f"held:perplexity={rise - 0.001}", output="narrow")
        assert done.code == 1
        assert f"{high}: held:perplexity rises by {100 * rise:.2f} %" in done.error
    assert bench(*suite, *gate, "held:perplexty=0.1").code == 2
    assert bench(*suite, "--max-rise", "held:perplexity=0.1").code == 2
    assert bench(*suite, *gate, "held:perplexity=nan").code == 2


def test_every_byte_of_a_report_repeats(bench: Cli) -> None:
    args = ("A", "B", "--records", "HELD", "--general", "GENERAL", "--baseline", "a", "--generate", "2")
    bench(*args, output="one")
    bench(*args, output="two")
    files = sorted(p.relative_to("one") for p in Path("one").rglob("*") if p.is_file())
    assert {"tradeoff.png", "tradeoff.svg", "report.json"} <= {p.name for p in files}
    assert [sha256_file("one" / p) for p in files] == [sha256_file("two" / p) for p in files]
    assert "up to date" in bench(*args, output="one").stderr


def test_a_stop_is_seen_and_its_lack_too(bench: Cli, models: Path) -> None:
    from transformers import AutoTokenizer

    _favour(models / "stops", models / "a", AutoTokenizer.from_pretrained(models / "a").eos_token_id)
    _favour(models / "drones", models / "a", 300)
    suite = ("--records", "HELD", "--generate", "4", "--max-new-tokens", "6")
    result = bench(models / "stops", models / "drones", *suite)
    assert result.code == 0, result.stderr
    stops, drones = (m["results"]["generation"] for m in report()["models"])
    assert (stops["stop_rate"]["value"], stops["length"]["value"]) == (1, 0)
    assert (drones["stop_rate"]["value"], drones["length"]["value"]) == (0, 6)
    assert drones["distinct_1"]["value"] == pytest.approx(1 / 6)
    assert drones["repetition"]["value"] == pytest.approx(1 - 1 / 3)


def _favour(folder: Path, source: Path, token: int) -> None:
    """A copy of a model whose likeliest next token is always the same: layers off, all embeddings alike."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = 1.0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def test_an_adapter_is_measured_with_its_size_and_parameters(bench: Cli, models: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models / "a")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(models / "lora")
    result = bench("A", models / "lora", "--records", "HELD", "--baseline", "a")
    assert result.code == 0, result.stderr
    base, adapter = report()["models"]
    assert adapter["info"]["trainable_parameters"] == 2 * 2 * (32 + 32)
    assert adapter["info"]["base_bytes"] == base["info"]["bytes"]
    assert adapter["info"]["bytes"] == sum(p.stat().st_size for p in (models / "lora").iterdir())
    same = adapter["differences"]["held"]["perplexity"]  # B starts at zero
    assert (same["value"], same["low"], same["high"]) == pytest.approx((0, 0, 0), abs=1e-3)


def test_time_and_memory_come_from_run_logs_and_stay_out_of_the_report(bench: Cli, models: Path) -> None:
    log = models / ".work" / "b" / "run.jsonl"
    log.parent.mkdir(parents=True)
    event = {"event": "done", "train_s": 12.5, "peak_rss_bytes": 5_000_000}
    log.write_text(json.dumps({"event": "step"}) + "\n" + json.dumps(event) + "\n" + '{"event": "do')
    bench("A", "B", "--records", "HELD", output="plain")
    speed = ("--speed", "--speed-prompt", "16", "--speed-tokens", "3", "--repeats", "1", "--csv", "-")
    result = bench("A", "B", "--records", "HELD", *speed, output="bench")
    assert result.code == 0, result.stderr
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert rows[1]["train_s"] == "12.5"
    assert rows[1]["train_peak_rss_bytes"] == "5000000"
    for key in ("load_s", "ttft_s", "prefill_tokens_per_s", "decode_tokens_per_s", "peak_rss_bytes"):
        assert float(rows[0][key]) > 0
    assert sha256_file("plain/artifact.json") == sha256_file("bench/artifact.json")
    assert "train_s" in Path(".work/bench/plots/tradeoff.csv").read_text(encoding="utf-8")

    joined = bench("bench", "--json", output="joined").json()
    assert joined["runs"]["b"]["train_s"] == 12.5
    assert joined["runs"]["a"]["decode_tokens_per_s"] > 0


def test_json_is_the_only_thing_on_stdout(bench: Cli) -> None:
    shown = bench("A", "--records", "HELD", "--json").json()
    assert shown["models"][0]["results"]["held"]["perplexity"]["low"] is not None
    assert shown["tasks"]["held"]["formulas"]["perplexity"] == "exp(Σ nll / Σ tokens)"


def test_items_of_one_cluster_are_resampled_together(bench: Cli, workdir: Path) -> None:
    records = [{**r, "document": i // 4} for i, r in enumerate(tiny_records("text", 12))]
    write_jsonl(workdir / "chapters.jsonl", records)
    bench("A", "--records", "chapters.jsonl", "--cluster", "document")
    found = report()["models"][0]["results"]["chapters"]["bits_per_byte"]
    assert (found["n"], found["clusters"]) == (12, 3)


def test_pareto_keeps_what_nothing_beats() -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"label": str(i), "cost": int(c), "quality": float(q)}
        for i, (c, q) in enumerate(zip(rng.integers(0, 9, 40), rng.integers(0, 9, 40)))
    ]

    def beaten(a: dict[str, Any]) -> bool:
        as_good = [b for b in rows if b["cost"] <= a["cost"] and b["quality"] >= a["quality"]]
        return any(b["cost"] < a["cost"] or b["quality"] > a["quality"] for b in as_good)

    kept = pareto(rows, "cost", "higher")
    assert set(kept) == {r["label"] for r in rows if not beaten(r)}
    assert pareto([{"label": "x", "cost": None, "quality": 1.0}], "cost", "higher") == []


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("A",), 2, "nothing to measure"),
        (("A", "missing", "--records", "HELD"), 66, "missing: no such model"),
        (("A", "x=A", "--records", "HELD", "--baseline", "aa"), 2, "aa"),
        (("A", "--records", "HELD", "--records", "GENERAL", "--records", "held=GENERAL"), 2, "two sets are called"),
        (("A", "--records", "nowhere.jsonl"), 66, "nowhere.jsonl: no such file"),
        (("A", "--records", "GENERAL", "--generate", "2"), 2, "no record of --records has a prompt"),
        (("A", "B", "--records", "HELD", "--quality", "held:acc"), 2, "held:perplexity"),
        (("A", "A", "--records", "HELD"), 2, "two models are called 'a'"),
        (("-", "--records", "HELD"), 2, "stdin"),
        (("A", "--records", "HELD", "--records-files", "x"), 2, "--records"),
    ],
)  # fmt: skip
def test_bad_requests(bench: Cli, models: Path, args: tuple[str, ...], code: int, said: str) -> None:
    result = bench(
        *(
            a.replace("=A", f"={models / 'a'}").replace("=GENERAL", f"={models / 'general.jsonl'}")
            for a in args
        )
    )
    assert result.code == code, result.stderr
    assert said in result.stderr
    assert not Path("r").exists()


def test_a_bad_model_among_several_is_named(bench: Cli, models: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(models / "a")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(models / "broken")
    AutoTokenizer.from_pretrained(models / "a").save_pretrained(models / "broken")
    result = bench("A", models / "broken", "--records", "HELD")
    assert result.code == 65
    assert "broken" in result.error
    assert "not finite" in result.error
    assert not Path("r").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "no records"), ('{"text": "a"}\n{"text": \n', ":2: not JSON"), ('{"txt": "a"}\n', ":1: needs")],
)
def test_bad_records_are_named_by_line(bench: Cli, workdir: Path, content: str, said: str) -> None:
    (workdir / "bad.jsonl").write_text(content, encoding="utf-8")
    result = bench("A", "--records", "bad.jsonl")
    assert result.code == 65
    assert "bad.jsonl" in result.error
    assert said in result.error


def test_reports_of_different_settings_or_records_do_not_join(
    bench: Cli, models: Path, workdir: Path
) -> None:
    bench("A", "--records", "HELD", output="one/a")
    bench("B", "--records", "HELD", "--max-length", "50", output="one/b")
    result = bench("one/a", "one/b", "--baseline", "a")
    assert result.code == 65
    assert "held: a and b were measured differently (max_length, stride)" in result.error
    write_jsonl(workdir / "held.jsonl", tiny_records("prompt-completion", 5))
    bench("B", "--records", "held.jsonl", output="two/b")
    assert "(sha256)" in bench("one/a", "two/b").error
    assert "every MODEL is a report" in bench("one/a", "--records", "HELD").error


def test_a_difference_across_precisions_is_warned_of(bench: Cli, models: Path, click_cli: Cli) -> None:
    bench("A", "--records", "HELD", output="one/a")
    args = (models / "b", "--records", models / "held.jsonl", "--dtype", "bfloat16", "-o", "one/b")
    assert click_cli("lm-bench", *args).code == 0
    result = bench("one/a", "one/b", "--baseline", "a")
    assert result.code == 0
    assert "b was measured in bfloat16, the baseline a in float32" in result.stderr
    assert report()["warnings"]


def test_new_labels_replace_a_report_only_by_force(bench: Cli, models: Path) -> None:
    bench("A", "--records", "HELD")
    result = bench(f"other={models / 'a'}", "--records", "HELD")
    assert result.code == 73
    assert "--force" in result.error
