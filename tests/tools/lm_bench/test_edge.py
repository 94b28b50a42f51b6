"""Edge packages and the original side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import Result, build_tiny_model, invoke, load_tool, tiny_records, write_jsonl

from tuneutils.shared.engines import runtimes
from tuneutils.shared.errors import ToolError
from tuneutils.shared.models import load_model
from tuneutils.tools.lm_bench import bandwidth, fidelity, plot, tradeoff
from tuneutils.tools.lm_bench.bench import flat

Cli = Callable[..., Result]
CPU = ("--device", "cpu", "--dtype", "float32")
llama_cpp = pytest.mark.skipif(not runtimes.installed("llama.cpp"), reason="run edge-export runtime first")


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, its float32 and 4-bit packages, and text."""
    root = tmp_path_factory.mktemp("bench")
    wide = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.2}
    model = build_tiny_model(root / "base", tie_word_embeddings=True, **wide)
    text = write_jsonl(root / "text.jsonl", tiny_records("text"))
    loose = ("--min-agreement", "0", "--max-kl", "50", "--threads", "1")
    for scheme in ("f32", "q4-0"):
        args = ("--heldout", text, "--scheme", scheme, *loose, "-o", root / scheme)
        done = invoke(load_tool("edge-export"), model, *args)
        assert done.code == 0, done.stderr
    return {"base": model, "text": text, "f32": root / "f32", "q4-0": root / "q4-0"}


def results(click_cli: Cli, assets: dict[str, Path], *args: Any) -> dict[str, Any]:
    models = [assets["base"], assets["f32"], assets["q4-0"]]
    done = click_cli("lm-bench", *models, "--records", assets["text"], *CPU, *args, "-o", "report", "--json")
    assert done.code == 0, done.stderr
    return {m["label"]: m for m in done.json()["models"]}


@llama_cpp
def test_a_package_scores_as_its_source(click_cli: Cli, assets: dict[str, Path], workdir: Path) -> None:
    found = results(click_cli, assets, "--reference", "base", "--baseline", "base")
    ours, exact, coarse = (
        found[n]["results"]["text"]["perplexity"]["value"] for n in ("base", "f32", "q4-0")
    )
    assert exact == pytest.approx(ours, rel=1e-3)
    assert coarse != pytest.approx(ours, rel=1e-3)
    kl = {n: found[n]["results"]["fidelity"]["kl"]["value"] for n in ("f32", "q4-0")}
    assert kl["f32"] < 1e-4 < kl["q4-0"]
    assert found["f32"]["results"]["fidelity"]["agreement"]["value"] > 0.99
    assert "fidelity" not in found["base"]["results"]
    assert found["base"]["info"]["bits_per_weight"] == pytest.approx(32, rel=0.05)
    assert found["f32"]["info"]["bits_per_weight"] == pytest.approx(32)
    assert found["q4-0"]["info"]["bits_per_weight"] < 9
    assert "Smallest within 1 % of base" in Path("report/report.md").read_text()


@llama_cpp
def test_speed_of_several_shapes_stays_out_of_the_report(
    click_cli: Cli, assets: dict[str, Path], workdir: Path
) -> None:
    shapes = ("--speed-prompt", "8", "--speed-prompt", "16", "--speed-batch", "1", "--speed-batch", "2")
    few = ("--speed-tokens", "3", "--repeats", "2", "--no-bandwidth")
    results(click_cli, assets, "--speed", *shapes, *few)
    rows = [json.loads(line) for line in Path(".work/report/run.jsonl").read_text().splitlines()]
    assert {r["label"] for r in rows} == {"base", "f32", "q4-0"}
    for row in rows:
        assert [(s["prompt"], s["batch"]) for s in row["speed"]] == [(8, 1), (8, 2), (16, 1), (16, 2)]
        assert all(s["decode_tokens_per_s_low"] <= s["decode_tokens_per_s"] for s in row["speed"])
        assert row["load_s"] > 0
        assert row["peak_rss_bytes"] > 0
    stored = {r["label"]: r["weight_bytes"] for r in rows}
    parameters = sum(p.numel() for p in load_model(str(assets["base"])).model.parameters())
    assert stored["base"] == stored["f32"] == 4 * parameters
    assert "decode_tokens_per_s" not in Path("report/report.json").read_text()


def test_more_than_the_bandwidth_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked:
        class params:
            bandwidth = True

        device = "cpu"

    monkeypatch.setattr(bandwidth, "measure_apart", lambda: {"bytes_per_s": 10e9, "cache_bytes": 1e6})
    speed = [{"batch": 1, "decode_tokens_per_s": 5.0}, {"batch": 4, "decode_tokens_per_s": 16.0}]
    run: Any = Asked()
    found = bandwidth.add_shares(run, [], lambda: {"weight_bytes": 1e9, "speed": speed})
    assert found["bandwidth_share"] == 0.5
    with pytest.raises(ToolError, match="reached 200%"):
        bandwidth.add_shares(run, [], lambda: {"weight_bytes": 4e9, "speed": speed})
    cached = bandwidth.add_shares(run, [], lambda: {"weight_bytes": 9e5, "speed": speed})
    assert cached["bandwidth_share"] is None
    assert cached["in_cache"]


def test_the_choice_is_the_smallest_and_fastest_within_one_percent() -> None:
    def model(label: str, quality: float, size: int) -> dict[str, Any]:
        value = {"value": quality, "low": None, "high": None}
        return {"label": label, "info": {"bytes": size}, "results": {"text": {"perplexity": value}}}

    report = {
        "baseline": "base",
        "quality": "text:perplexity",
        "tasks": {"text": {"kind": "text", "metrics": ["perplexity"]}},
        "models": [model("base", 10.0, 100), model("q8", 10.09, 50), model("q4", 11.0, 25)],
    }
    report["choice"] = tradeoff.choice(report, ("text", "perplexity"))
    assert report["choice"] == {"best": "base", "within": ["base", "q8"], "smallest": "q8"}
    speeds = {n: {"decode_tokens_per_s": s} for n, s in (("base", 1.0), ("q8", 9.0), ("q4", 20.0))}
    line = tradeoff.choice_line(report, speeds)
    assert line == "text:perplexity: smallest within 1 % of base: q8, fastest within 1 %: q8"


@llama_cpp
def test_greedy_answers_of_a_package(click_cli: Cli, assets: dict[str, Path], workdir: Path) -> None:
    records = write_jsonl(workdir / "qa.jsonl", tiny_records("prompt-completion", 3))
    args = ("--records", records, "--generate", "2", "--max-new-tokens", "6", *CPU, "-o", "report", "--json")
    done = click_cli("lm-bench", assets["base"], assets["f32"], *args)
    assert done.code == 0, done.stderr
    import gzip

    lines = gzip.decompress(Path("report/items.jsonl.gz").read_bytes()).decode().splitlines()
    texts = [(r["model"], r["text"]) for r in map(json.loads, lines) if r["task"] == "generation"]
    assert [t for m, t in texts if m == "base"] == [t for m, t in texts if m == "f32"]


def test_kl_and_agreement_of_two_distributions_by_hand() -> None:
    import torch

    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    q = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]])
    kl, agree = fidelity.compare(p.log(), q.log())
    assert kl == pytest.approx(0.25 * math.log(2), rel=1e-6)  # .5 ln 2 - .25 ln 2, and nothing in the second
    assert agree == 1


def test_the_original_is_loaded_once_for_all_models(
    click_cli: Cli, assets: dict[str, Path], workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def counted(given: str, **options: Any) -> Any:
        asked.append(given)
        return load_model(given, **options)

    monkeypatch.setattr(fidelity, "load_model", counted)
    twins = [f"{name}={assets['base']}" for name in ("one", "two", "three")]
    args = ("--records", assets["text"], "--reference", "one", *CPU, "-o", "report", "--json")
    done = click_cli("lm-bench", *twins, *args)
    assert done.code == 0, done.stderr
    assert len(asked) == 1
    for model in done.json()["models"][1:]:
        assert model["results"]["fidelity"]["kl"]["value"] == pytest.approx(0, abs=1e-6)
        assert model["results"]["fidelity"]["agreement"]["value"] == 1


def test_rates_of_each_shape_are_columns() -> None:
    speed = [{"prompt": 64, "batch": b, "ttft_s": 0.1 * b, "decode_tokens_per_s": 10.0 * b} for b in (1, 8)]
    assert flat({"load_s": 1.0, "ttft_s": 0.1, "speed": speed}) == {
        "load_s": 1.0, "ttft_s": 0.1,
        "ttft_s@64x1": 0.1, "decode_tokens_per_s@64x1": 10.0,
        "ttft_s@64x8": 0.8, "decode_tokens_per_s@64x8": 80.0,
    }  # fmt: skip


def test_labels_cover_neither_points_nor_each_other() -> None:
    points = [(100.0 + 6 * (i % 4), 100.0 + 5 * (i // 4)) for i in range(12)]
    names = [f"model-{i}" for i in range(12)]
    frame = (0.0, 0.0, 400.0, 300.0)
    boxes = []
    for name, (x, y), (dx, dy) in zip(names, points, plot.place(names, points, frame), strict=True):
        left, bottom = x + dx, y + dy - plot.LINE / 2
        boxes.append((left, bottom, left + plot.CHARACTER * len(name), bottom + plot.LINE))
        assert left >= 0
        assert left + plot.CHARACTER * len(name) <= 400
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        for x, y in points:
            assert not (a[0] < x < a[2] and a[1] < y < a[3])


def test_only_the_costs_asked_for_have_fronts(click_cli: Cli, assets: dict[str, Path], workdir: Path) -> None:
    twins = [f"{name}={assets['base']}" for name in ("one", "two")]
    args = ("--records", assets["text"], "--cost", "bytes", *CPU, "-o", "report", "--json")
    done = click_cli("lm-bench", *twins, *args)
    assert done.code == 0, done.stderr
    assert set(done.json()["pareto"]) == {"bytes"}
    assert done.json()["choice_line"].startswith("text:bits_per_byte: smallest within 1 % of")
