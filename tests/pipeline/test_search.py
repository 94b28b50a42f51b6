"""The learning-rate search: what it chooses and how sure it is, on reports made up; then through DVC."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LN2 = float(np.log(2))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "pipeline" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


search_report = load("search_report")
Bits = Mapping[str, Mapping[str, Sequence[float]]]


def made_up(scale: float, seed: int, bits: Bits, settings: str = "a") -> Any:
    """An experiment whose items have one byte and the bits given: model → task → bits of each item."""
    tasks = {t: {"kind": "text", "metrics": ["bits_per_byte"], "settings": {"sha256": settings}}
             for t in next(iter(bits.values()))}  # fmt: skip
    models = [
        {
            "label": label,
            "info": {"trainable_parameters": None if label == "base" else 100 * len(label)},
            "results": {t: {"bits_per_byte": {"value": float(np.mean(v))}} for t, v in by_task.items()},
        }
        for label, by_task in bits.items()
    ]
    items = {
        label: {t: [{"nll": v * LN2, "bytes": 1} for v in values] for t, values in by_task.items()}
        for label, by_task in bits.items()
    }
    report = {"baseline": "base", "tasks": tasks, "models": models}
    return search_report.Run(scale, seed, {k: scale for k in bits if k != "base"}, report, items)


def flat(valid: float, test: float, n: int = 5) -> dict[str, list[float]]:
    return {"valid": [valid] * n, "heldout": [test] * n}


def grid(valid: Mapping[float, Sequence[float]], test: Mapping[float, float]) -> list[Any]:
    """One method ``lora`` by scale, a validation value a seed."""
    return [
        made_up(scale, seed, {"base": flat(5, 5), "lora": flat(value, test[scale])})
        for scale, values in valid.items()
        for seed, value in enumerate(values)
    ]


def test_the_scale_is_chosen_by_the_mean_over_seeds_of_the_validation() -> None:
    # Scale 1 has the best single seed, scale 10 the best test result; scale 3 has the best mean.
    runs = grid({1: [1.0, 4.0], 3: [2.0, 2.0], 10: [2.5, 2.5]}, {1: 3.0, 3: 2.2, 10: 1.0})
    row = search_report.summarise(runs, "valid", "heldout")["methods"][0]
    assert (row["scale"], row["learning_rate"], row["at_edge"]) == (3, 3, False)
    assert (row["valid"], row["test"], row["difference"]["value"]) == pytest.approx((2.0, 2.2, -2.8))


@pytest.mark.parametrize(
    ("values", "scale", "edge"),
    [((1, 2, 3), 1, True), ((3, 2, 1), 10, True), ((2, 2, 3), 1, True), ((3, 2, 2), 3, False)],
)
def test_the_edge_of_the_grid_is_flagged_and_of_equal_ones_the_smallest_taken(
    values: Sequence[float], scale: float, edge: bool
) -> None:
    runs = grid({s: [v] for s, v in zip((1, 3, 10), values, strict=True)}, {1: 1, 3: 1, 10: 1})
    choice = search_report.choose(runs, "lora", "valid")
    assert (choice.scale, choice.edge) == (scale, edge)
    result = search_report.summarise(runs, "valid", "heldout")
    assert ("edge of the grid" in search_report.markdown(result)) == edge


def interval(differences: Any, **options: Any) -> dict[str, Any]:
    """Of ``(seeds, items)`` differences to a base of 5 bits, each item being one byte."""
    base = np.full(np.shape(differences), 5.0)
    ones = np.ones_like(base)
    ours = np.stack([base + differences, ones], axis=2)
    found: dict[str, Any] = search_report.paired_interval(ours, np.stack([base, ones], axis=2), **options)
    return found


def test_with_equal_items_the_interval_is_that_of_three_seeds() -> None:
    # All 27 draws of three seeds: each extreme has 1/27 > 2.5 %, so the percentiles are the extremes, and
    # their deviations from the mean are stretched by sqrt(3 / 2).
    found = interval(np.array([[-0.1] * 9, [-0.4] * 9, [-0.1] * 9]))
    assert found["value"] == pytest.approx(-0.2)
    assert found["low"] == pytest.approx(-0.2 - 0.2 * 1.5**0.5)
    assert found["high"] == pytest.approx(-0.2 + 0.1 * 1.5**0.5)


def test_with_one_seed_the_interval_is_that_of_the_mean_over_items() -> None:
    d = np.random.default_rng(3).normal(0.3, 1.0, size=(1, 400))
    found = interval(d)
    assert found["value"] == pytest.approx(d.mean())
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * d.std() / 20, rel=0.05)


def test_the_variances_of_items_and_of_seeds_add_up() -> None:
    # d[j, i] = b[j] + a[i]: the mean's variance is var(a) / n + var(b) / S, each with its own n - 1.
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 2.0, 500), rng.normal(0, 0.5, 40)
    found = interval(b[:, None] + a[None, :])
    width = 2 * 1.96 * (a.var(ddof=1) / 500 + b.var(ddof=1) / 40) ** 0.5
    assert found["high"] - found["low"] == pytest.approx(width, rel=0.05)


def test_the_difficulty_of_items_does_not_widen_a_paired_interval() -> None:
    base = np.random.default_rng(0).uniform(1, 9, size=(3, 50))
    ones = np.ones_like(base)
    found = search_report.paired_interval(np.stack([base - 1, ones], 2), np.stack([base, ones], 2))
    assert (found["low"], found["high"]) == pytest.approx((-1, -1))


def test_the_ratio_weighs_items_by_their_bytes() -> None:
    ours = np.array([[[6.0, 2.0], [0.0, 6.0]]])
    theirs = np.array([[[8.0, 2.0], [8.0, 6.0]]])
    assert search_report.paired_interval(ours, theirs)["value"] == pytest.approx(6 / 8 - 16 / 8)


def test_items_of_one_cluster_are_resampled_together() -> None:
    run = made_up(1, 0, {"base": flat(2, 2, n=4)})
    for i, item in enumerate(run.items["base"]["heldout"]):
        item["cluster"] = "ab"[i // 3]
    assert search_report.sums(run, "base", "heldout") == pytest.approx(np.array([[6, 3], [2, 1]]))


def three_seeds(shifts: Mapping[str, Any]) -> list[Any]:
    """Two scales; at scale 3 each method is off the base by its shift, 40 items, three seeds."""
    base = np.linspace(2, 6, 40)
    runs = []
    for scale in (1.0, 3.0):
        for seed in range(3):
            bits = {"base": {"valid": base, "heldout": base, "general": base}}
            for name, shift in shifts.items():
                values = base + shift(seed)
                # At scale 1 validation is worse, and the test better: nobody may look at it.
                valid, test = (values + 1, values - 2) if scale == 1 else (values, values)
                bits[name] = {"valid": valid, "heldout": test, "general": base + 0.25}
            runs.append(made_up(scale, seed, bits))
    return runs


def test_a_null_result_is_said_as_one() -> None:
    swing = np.where(np.arange(40) % 2, 0.5, -0.5)
    shifts = {"lora": lambda s: swing - 1, "ia3": lambda s: swing, "prompt": lambda s: swing + 1}
    result = search_report.summarise(three_seeds(shifts), "valid", "heldout")
    said = {row["method"]: row["verdict"] for row in result["methods"]}
    assert said == {
        "lora": "better than the base",
        "ia3": "no difference from the base shown",
        "prompt": "worse than the base",
    }
    text = search_report.markdown(result)
    assert "Null result against base, zero is inside: ia3." in text
    assert result["best_by_validation"] == "lora"
    assert "Not told apart" not in text


def test_a_method_that_is_not_told_apart_from_the_best_is_named() -> None:
    swing = np.where(np.arange(40) % 2, 0.5, -0.5)
    shifts = {"lora": lambda s: swing - 1.01, "dora": lambda s: -swing - 1}
    result = search_report.summarise(three_seeds(shifts), "valid", "heldout")
    dora = next(r for r in result["methods"] if r["method"] == "dora")
    assert dora["against_best"]["value"] == pytest.approx(0.01)
    assert "Not told apart from lora, the best by validation: dora." in search_report.markdown(result)


def test_forgetting_and_the_fronts_come_with_the_result(tmp_path: Path) -> None:
    shifts: dict[str, Callable[[int], float]] = {
        "ia3": lambda s: -1,
        "lora": lambda s: -2,
        "prompt": lambda s: -1.5,
    }
    result = search_report.summarise(three_seeds(shifts), "valid", "heldout")
    assert all(r["forgetting"]["value"] == pytest.approx(0.25) for r in result["methods"])
    assert result["n"] == {"valid": 40, "heldout": 40, "general": 40}
    # 300, 400 and 600 parameters: prompt is larger than lora and worse.
    assert result["pareto"]["trainable_parameters"] == ["ia3", "lora"]
    assert len(result["grid"]) == 3 * 2 * 3
    search_report.write(tmp_path, result)
    assert {p.name for p in tmp_path.iterdir()} >= {
        "report.json",
        "report.md",
        "table.csv",
        "grid.csv",
        "search.svg",
    }
    assert json.loads((tmp_path / "report.json").read_text()) == result


def test_what_cannot_be_compared_is_refused() -> None:
    good = {"base": flat(5, 5), "lora": flat(4, 4)}
    summarise, error = search_report.summarise, search_report.SearchError
    with pytest.raises(error, match="seed 1: measured on other records"):
        summarise([made_up(1, 0, good), made_up(1, 1, good, settings="b")], "valid", "heldout")
    with pytest.raises(error, match="seed 1 has other methods"):
        summarise([made_up(1, 0, good), made_up(1, 1, {**good, "ia3": flat(4, 4)})], "valid", "heldout")
    with pytest.raises(error, match="no bits_per_byte of 'dev' in the reports, which have valid, heldout"):
        summarise([made_up(1, 0, good)], "dev", "heldout")
    with pytest.raises(error, match="not every scale has the same number of seeds"):
        summarise([made_up(1, 0, good), made_up(1, 1, good), made_up(3, 0, good)], "valid", "heldout")
    with pytest.raises(error, match="cannot both choose"):
        summarise([made_up(1, 0, good)], "valid", "valid")


def profile(name: str) -> dict[str, Any]:
    base = yaml.safe_load((ROOT / "profiles" / "default.yaml").read_text())
    changes = yaml.safe_load((ROOT / "profiles" / f"{name}.yaml").read_text())
    overlaid: dict[str, Any] = load("profile").overlay(base, changes)
    return overlaid


def test_the_full_profile_chooses_on_records_that_it_does_not_test_on() -> None:
    full = profile("full")
    sides = [part.split("=")[0] for part in full["data"]["instructions"]["split"].split(",")]
    assert sides == ["train", "valid", "heldout"]
    named = dict(r.split("=") for r in full["bench"]["records"])
    assert {k: Path(v).stem for k, v in named.items()} == {"heldout": "heldout", "valid": "valid"}
    assert all("learning_rate" in options for options in full["methods"].values())


def test_a_profile_may_add_an_option_of_the_tool_and_no_other() -> None:
    overlay = load("profile").overlay
    assert overlay({"tune": {"seed": 0, "max_steps": 3}}, {"tune": {"epochs": 2, "max_steps": None}}) == {
        "tune": {"seed": 0, "epochs": 2}
    }
    with pytest.raises(SystemExit, match="unknown key 'epoch'"):
        overlay({"tune": {"seed": 0}}, {"tune": {"epoch": 2}})


METHODS = ("lora", "llama-adapter")
WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git and DVC repository of this pipeline up to its trade-off, with a tiny model and two methods."""
    here = tmp_path_factory.mktemp("search")
    shutil.copytree(ROOT / "pipeline", here / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    (here / ".dvc").mkdir()
    for name in ("params.schema.json", ".gitignore", ".dvcignore", ".dvc/config"):
        shutil.copy(ROOT / name, here / name)
    (here / "profiles").mkdir()
    dump(here / "profiles" / "default.yaml", tiny_params())
    dump(here / "profiles" / "full.yaml", {"tune": {"max_steps": 2}})
    dump(here / "dvc.yaml", stages_without_code())
    lines = [
        {"prompt": f"Count {i} {WORDS[i % 8]}", "completion": f" {i} {WORDS[i * 3 % 8]}"} for i in range(40)
    ]
    (here / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = [{"text": f"Text {i} of {WORDS[i % 8]} and {WORDS[i * 5 % 8]}."} for i in range(8)]
    (here / "general.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    shell(here, sys.executable, "pipeline/profile.py", "default")
    for command in (
        "init -q",
        "config user.email a@example.org",
        "config user.name A",
        "add -A",
        "commit -qm start",
    ):
        shell(here, "git", *command.split())
    return here


def dump(path: Path, value: Any) -> None:
    path.write_text(yaml.safe_dump(value, sort_keys=False))


def tiny_params() -> dict[str, Any]:
    params: dict[str, Any] = yaml.safe_load((ROOT / "profiles" / "default.yaml").read_text())
    sides = "artifacts/data/instructions"
    params["import"] = {
        "model": "builtin:tiny-llama",
        "instructions": "data.jsonl",
        "general": "general.jsonl",
    }
    params["data"]["instructions"] = {"split": "train=0.5,valid=0.25,heldout=0.25"}
    params["tune"] |= {"max_steps": 3, "max_length": 64, "dtype": "float32"}
    params["bench"] |= {"dtype": "float32", "max_length": 64}
    params["bench"]["records"] = [f"heldout={sides}/heldout.jsonl", f"valid={sides}/valid.jsonl"]
    params["methods"] = {m: params["methods"][m] for m in METHODS}
    return params


def stages_without_code() -> dict[str, Any]:
    """dvc.yaml without what follows the trade-off, and without the code as dependencies."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    wanted = (
        "import-model",
        "import-instructions",
        "import-general",
        "tune",
        "bench-base",
        "bench",
        "tradeoff",
    )
    stages = {name: document["stages"][name] for name in wanted}
    for outer in stages.values():
        stage = outer.get("do", outer)
        stage["deps"] = [d for d in stage.get("deps", []) if not d.startswith(("tools/", "shared/"))]
    return {"vars": document["vars"], "stages": stages}


def shell(here: Path, *command: str, code: int = 0) -> str:
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1", "LAUNCH": ""}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def search(here: Path, *args: str, code: int = 0) -> str:
    return shell(
        here, sys.executable, "pipeline/search.py", *args, "--scales", "1,30", "--seeds", "0,1", code=code
    )


def experiments(here: Path) -> dict[str, str]:
    """Name → commit, as DVC lists them."""
    rows = shell(here, sys.executable, "-m", "dvc", "exp", "list", "--name-only").split()
    refs = shell(here, "git", "for-each-ref", "--format=%(refname) %(objectname)", "refs/exps").splitlines()
    commits = {ref.split("/")[-1]: commit for ref, commit in (line.split() for line in refs)}
    return {name: commits[name] for name in rows}


def wait_for(condition: Callable[[], bool], seconds: float = 600) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_search_runs_as_dvc_experiments(repository: Path) -> None:
    here = repository
    assert "not finished at HEAD: full-lr1-seed0" in search(here, "report", code=1)

    search(here, "queue")
    assert search(here, "queue").count("queued already") == 4
    shell(here, sys.executable, "-m", "dvc", "queue", "remove", "full-lr30-seed0", "full-lr30-seed1")
    shell(here, sys.executable, "-m", "dvc", "queue", "start")
    wait_for(lambda: len(experiments(here)) == 2)
    assert "give --partial" in search(here, "report", code=1)
    assert "| lora | 0.0004 | 1 (edge) |" in search(here, "report", "--partial", "-o", "partial")

    wait_for(lambda: "0 active" in shell(here, sys.executable, "-m", "dvc", "queue", "status"))
    assert search(here, "run").count("finished already") == 2
    found = experiments(here)
    assert sorted(found) == ["full-lr1-seed0", "full-lr1-seed1", "full-lr30-seed0", "full-lr30-seed1"]
    assert search(here, "run").count("finished already") == 4
    assert experiments(here) == found

    search(here, "report", "-o", "reports/search")
    result = json.loads((here / "reports" / "search" / "report.json").read_text())
    check_against_the_experiments(here, found, result)


def check_against_the_experiments(here: Path, found: Mapping[str, str], result: Mapping[str, Any]) -> None:
    """Rates, seeds, choice and differences, each worked out here from the experiments' commits."""
    base = tiny_params()["methods"]
    reports = {}
    for name, commit in found.items():
        params = yaml.safe_load(shell(here, "git", "show", f"{commit}:params.yaml"))
        scale, seed = (float(part.strip("lrsed")) for part in name.split("-")[1:])
        assert (params["tune"]["seed"], params["tune"]["max_steps"]) == (seed, 2)
        for method in METHODS:
            rate = float(params["methods"][method]["learning_rate"])
            assert rate == pytest.approx(scale * base[method]["learning_rate"])
        text = shell(here, "git", "show", f"{commit}:reports/tradeoff/report.json")
        models = {m["label"]: m["results"] for m in json.loads(text)["models"]}
        for label, results in models.items():
            reports[scale, seed, label] = {t: results[t]["bits_per_byte"]["value"] for t in results}

    def mean(scale: float, label: str, task: str) -> float:
        return float(np.mean([reports[scale, seed, label][task] for seed in (0, 1)]))

    assert result["seeds"] == [0, 1]
    assert {row["method"] for row in result["methods"]} == set(METHODS)
    for row in result["methods"]:
        label = row["method"]
        assert row["scale"] == min((1, 30), key=lambda s: mean(s, label, "valid"))
        for key, task in (("difference", "heldout"), ("forgetting", "general")):
            expected = mean(row["scale"], label, task) - mean(1, "base", task)
            assert row[key]["value"] == pytest.approx(expected, abs=1e-9)
            assert row[key]["low"] <= row[key]["value"] <= row[key]["high"]
