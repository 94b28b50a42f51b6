"""Several adapters into one: formulas against brute force, PEFT and the papers' definitions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils import merge_utils
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tuneutils.tools.adapter_merge import combine
from tuneutils.tools.adapter_merge.adapter import Factors

LINEAR = ["q_proj", "down_proj"]
WEIGHTS = ("--weight", "0.7", "--weight", "-0.4")


def random_factors(seed: int, rank: int, out: int = 24, inner: int = 40) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(rank, inner, generator=generator), torch.randn(out, rank, generator=generator))


def parts(*weights: float) -> list[combine.Weighted]:
    return [combine.Weighted(w, random_factors(i, 3 + i), i) for i, w in enumerate(weights)]


def brute_force(given: list[combine.Weighted]) -> torch.Tensor:
    return sum(p.weight * p.factors.b.double() @ p.factors.a.double() for p in given)  # type: ignore[return-value]


def delta(folder: str, base: Path, module: str) -> torch.Tensor:
    """ΔW of a module as PEFT itself computes it."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    return model.get_submodule(f"base_model.model.{module}").get_delta_weight("default").double()


def run(click_cli: Callable[..., Any], *args: str) -> dict[str, Any]:
    done = click_cli("adapter-merge", *args)
    assert done.code == 0, done.stderr
    return json.loads(Path(args[args.index("-o") + 1], "artifact.json").read_text())


@pytest.fixture
def two(bases, adapt) -> list[str]:
    """Different ranks, scalings and modules; the second is rsLoRA."""
    first = LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR)
    second = LoraConfig(r=6, lora_alpha=12, target_modules=["q_proj", "v_proj"], use_rslora=True)
    return [adapt(bases["sharded"], first, "first"), adapt(bases["sharded"], second, "second", seed=1)]


@pytest.mark.parametrize("method", ["cat", "linear"])
def test_exact_methods_hold_the_weighted_sum(method, two, bases, click_cli) -> None:
    manifest = run(click_cli, *two, "-o", "both", "--method", method, *WEIGHTS)
    assert manifest["kind"] == "adapter"
    assert manifest["metrics"]["relative_error"]["max"] < 1e-6
    assert manifest["metrics"]["logits"]["mean_kl"] < 1e-8
    base = bases["sharded"]
    for module, present in (
        ("self_attn.q_proj", (1, 1)),
        ("mlp.down_proj", (1, 0)),
        ("self_attn.v_proj", (0, 1)),
    ):
        name = f"model.layers.1.{module}"
        truth = sum(w * delta(f, base, name) for f, w, p in zip(two, (0.7, -0.4), present) if p)
        made = delta("both", base, name)
        assert float((made - truth).norm() / truth.norm()) < 1e-6
    assert len(manifest["relative_errors"]) == 6
    assert manifest["metrics"]["rank"] == 10


def test_linear_drops_rank_that_is_not_there(bases, adapt, click_cli) -> None:
    adapter = adapt(bases["llama"], LoraConfig(r=4, target_modules=LINEAR))
    assert run(click_cli, adapter, adapter, "-o", "twice", "--method", "cat")["metrics"]["rank"] == 8
    assert run(click_cli, adapter, adapter, "-o", "lean", "--method", "linear")["metrics"]["rank"] == 4
    name = "model.layers.0.self_attn.q_proj"
    truth = 2 * delta(adapter, bases["llama"], name)
    torch.testing.assert_close(delta("lean", bases["llama"], name), truth, atol=1e-6, rtol=0)


def test_pefts_linear_is_wrong_by_a_whole_sum(bases, adapt, click_cli) -> None:
    """add_weighted_adapter('linear') multiplies summed factors; for random ones the error is about 1."""
    config = LoraConfig(r=8, lora_alpha=8, target_modules=LINEAR)
    one, two = (adapt(bases["llama"], config, f"a{i}", seed=i, std=1.0) for i in range(2))
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(bases["llama"]), one, adapter_name="one"
    )
    model.load_adapter(two, adapter_name="two")
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", combination_type="linear")
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    truth = layer.get_delta_weight("one") + layer.get_delta_weight("two")
    theirs = float((layer.get_delta_weight("sum") - truth).norm() / truth.norm())
    assert 0.8 < theirs < 1.2
    run(click_cli, one, two, "-o", "sum", "--method", "linear")
    ours = delta("sum", bases["llama"], "model.layers.0.mlp.down_proj")
    assert float((ours - truth.double()).norm() / truth.norm()) < 1e-6


def test_svd_is_the_best_truncation(two, bases, click_cli) -> None:
    manifest = run(click_cli, *two, "-o", "both", "--method", "svd", "--rank", "3")
    name = "model.layers.0.self_attn.q_proj"
    truth = sum(delta(f, bases["sharded"], name) for f in two)
    u, s, vh = torch.linalg.svd(truth)
    best = u[:, :3] * s[:3] @ vh[:3]
    torch.testing.assert_close(delta("both", bases["sharded"], name), best, atol=1e-6, rtol=0)
    expected = float(s[3:].norm() / s.norm())
    assert manifest["relative_errors"][name] == pytest.approx(expected, rel=5e-3)
    assert manifest["metrics"]["rank"] == 3


@pytest.mark.parametrize("method", ["cat", "linear", "svd"])
def test_error_from_small_factors_equals_brute_force(method) -> None:
    given = parts(0.7, -1.3, 2.0)
    truth = combine.weighted_sum(given)
    made = {"cat": truth, "linear": combine.truncate(truth, None), "svd": combine.truncate(truth, 4)}[method]
    dense = brute_force(given)
    expected = float((made.b.double() @ made.a.double() - dense).norm() / dense.norm())
    assert combine.relative_error(made, truth) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_trim_by_hand() -> None:
    given = torch.tensor([[1.0, -5.0, 2.0], [0.5, -3.0, 4.0]])
    assert combine.trim(given, 0.5).tolist() == [[0.0, -5.0, 0.0], [0.0, -3.0, 4.0]]


def test_elect_and_mean_by_hand() -> None:
    """Columns: agreement; the heavier sign wins; the lone value; absent values count in no mean."""
    given = torch.tensor([[[2.0, 5.0, 0.0, 3.0]], [[4.0, -1.0, 0.0, 0.0]], [[6.0, -2.0, -7.0, 1.0]]])
    assert combine.elect_and_mean(given).tolist() == [[4.0, 5.0, -7.0, 2.0]]


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_ties_equals_pefts_for_equal_weights(weight) -> None:
    given = parts(weight, weight, weight)
    deltas = [p.factors.b @ p.factors.a for p in given]
    theirs = merge_utils.ties(deltas, torch.full((3,), weight), 0.3)
    ours = combine.combine_dense(given, "ties", 0.3, 0, "m")
    torch.testing.assert_close(ours, theirs)


def test_dare_expects_the_delta() -> None:
    """E[mask/p] = 1: the mean over seeds tends to the weighted sum with standard error |δ|·√((1−p)/p/n)."""
    given, density, n = parts(1.0, -0.5), 0.4, 2000
    mean = sum(combine.combine_dense(given, "dare-linear", density, seed, "m") for seed in range(n)) / n
    deltas = [p.weight * p.factors.b @ p.factors.a for p in given]
    error = torch.stack(deltas).square().sum(0).sqrt() * ((1 - density) / density / n) ** 0.5
    z = (mean - sum(deltas)) / error
    assert float(z.square().mean()) == pytest.approx(1.0, abs=0.15)
    assert float(z.abs().max()) < 5.5


def test_dare_depends_on_seed_and_place_alone() -> None:
    given = parts(1.0, 1.0)
    one = combine.combine_dense(given, "dare-ties", 0.5, 7, "m")
    assert torch.equal(one, combine.combine_dense(given, "dare-ties", 0.5, 7, "m"))
    for seed, module in ((8, "m"), (7, "n")):
        assert not torch.equal(one, combine.combine_dense(given, "dare-ties", 0.5, seed, module))


@pytest.mark.parametrize("base", ["sharded", "gpt2"])
def test_ties_into_adapter_and_into_base(base, bases, adapt, click_cli) -> None:
    conv = base == "gpt2"
    module = "transformer.h.0.attn.c_attn" if conv else "model.layers.0.self_attn.q_proj"
    config = LoraConfig(r=4, target_modules=[module], fan_in_fan_out=conv)
    one, two = (adapt(bases[base], config, f"a{i}", seed=i) for i in range(2))
    options = ("--method", "ties", "--density", "0.4")
    given = [delta(f, bases[base], module).float() for f in (one, two)]
    expected = merge_utils.ties(given, torch.ones(2), 0.4)
    full = run(click_cli, one, two, "-o", "low", *options, "--rank", "32")
    made = delta("low", bases[base], module).float()
    torch.testing.assert_close(made, expected, atol=1e-6, rtol=0)
    dense = run(click_cli, one, two, "-o", "dense", *options, "--into", "base")
    before = AutoModelForCausalLM.from_pretrained(bases[base]).get_submodule(module).weight
    after = AutoModelForCausalLM.from_pretrained("dense").get_submodule(module).weight
    torch.testing.assert_close(after - before, expected, atol=1e-6, rtol=0)
    truth = given[0] + given[1]
    error = float((expected - truth).norm() / truth.norm())
    for manifest in (full, dense):
        assert manifest["relative_errors"][module] == pytest.approx(error, rel=5e-3)


def test_embedding_factors_add_up(bases, adapt, click_cli) -> None:
    config = LoraConfig(r=3, target_modules=["embed_tokens", "lm_head"])
    one, two = (adapt(bases["llama"], config, f"a{i}", seed=i) for i in range(2))
    for method in ("linear", "dare-linear"):
        run(click_cli, one, two, "-o", method, "--method", method, *WEIGHTS)
    truth = sum(w * delta(f, bases["llama"], "model.embed_tokens") for f, w in zip((one, two), (0.7, -0.4)))
    made = delta("linear", bases["llama"], "model.embed_tokens")
    assert float((made - truth).norm() / truth.norm()) < 1e-6


def test_several_into_base(two, bases, click_cli) -> None:
    run(click_cli, *two, "-o", "model", "--into", "base", *WEIGHTS)
    name = "model.layers.1.self_attn.q_proj"
    truth = 0.7 * delta(two[0], bases["sharded"], name) - 0.4 * delta(two[1], bases["sharded"], name)
    before = AutoModelForCausalLM.from_pretrained(bases["sharded"]).get_submodule(name).weight
    after = AutoModelForCausalLM.from_pretrained("model").get_submodule(name).weight
    torch.testing.assert_close((after - before).double(), truth, atol=1e-6, rtol=0)


def test_one_adapter_scaled_or_made_smaller(bases, adapt, click_cli) -> None:
    adapter = adapt(bases["llama"], LoraConfig(r=8, target_modules=LINEAR))
    small = run(click_cli, adapter, "-o", "small", "--into", "adapter", "--method", "svd", "--rank", "2")
    assert small["metrics"]["rank"] == 2
    run(click_cli, adapter, "-o", "half", "--weight", "0.5")
    name = "model.layers.0.self_attn.q_proj"
    before = AutoModelForCausalLM.from_pretrained(bases["llama"]).get_submodule(name).weight
    after = AutoModelForCausalLM.from_pretrained("half").get_submodule(name).weight
    expected = (0.5 * delta(adapter, bases["llama"], name)).float()
    torch.testing.assert_close(after - before, expected, atol=1e-6, rtol=0)


def test_table_and_bytes(two, click_cli) -> None:
    done = click_cli("adapter-merge", *two, "-o", "both")
    assert "model.layers.0.self_attn.q_proj" in done.stderr
    assert "over 6 layers" in done.stderr
    first = {p.name: p.read_bytes() for p in Path("both").iterdir()}
    assert click_cli("adapter-merge", *two, "-o", "both", "--force").code == 0
    assert {p.name: p.read_bytes() for p in Path("both").iterdir()} == first
    assert load_file("both/adapter_model.safetensors")
