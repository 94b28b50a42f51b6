"""One adapter into its base, against PEFT's own merge and forward pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, TrainableTokensConfig, VeraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

IDS = torch.arange(4, 68).reshape(2, 32)
LINEAR = ["q_proj", "v_proj", "down_proj"]
GPT2 = ["c_attn", "c_proj", "c_fc"]

STREAMED: dict[str, tuple[str, Any]] = {
    "lora": ("llama", LoraConfig(target_modules=LINEAR, r=4, lora_alpha=16)),
    "sharded": ("sharded", LoraConfig(target_modules="all-linear", r=4)),
    "rslora": ("llama", LoraConfig(target_modules=LINEAR, r=4, use_rslora=True)),
    "patterns": (
        "llama",
        LoraConfig(
            target_modules=LINEAR,
            rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 5},
            alpha_pattern={"v_proj": 32, "model.layers.0.self_attn.q_proj": 3},
        ),
    ),
    "layers": ("llama", LoraConfig(target_modules=LINEAR, layers_to_transform=[1])),
    "dora": ("sharded", LoraConfig(target_modules=LINEAR, use_dora=True)),
    "dora-rslora": ("llama", LoraConfig(target_modules=LINEAR, use_dora=True, use_rslora=True)),
    "modules-to-save": ("llama", LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "head": ("llama", LoraConfig(target_modules=["q_proj", "lm_head"])),
    "embedding": ("llama", LoraConfig(target_modules=["embed_tokens", "q_proj"])),
    "embedding-dora": ("llama", LoraConfig(target_modules=["embed_tokens"], use_dora=True)),
    "tokens": ("llama", LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 9])),
    "only-tokens": ("llama", TrainableTokensConfig(token_indices=[5, 9])),
    "ia3": (
        "llama",
        IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "gpt2": ("gpt2", LoraConfig(target_modules=GPT2, fan_in_fan_out=True)),
    "gpt2-dora": ("gpt2", LoraConfig(target_modules=GPT2, fan_in_fan_out=True, use_dora=True)),
    "gpt2-bias-all": ("gpt2", LoraConfig(target_modules=GPT2, fan_in_fan_out=True, bias="all")),
    "gpt2-bias-lora": ("gpt2", LoraConfig(target_modules=GPT2, fan_in_fan_out=True, bias="lora_only")),
    "gpt2-lora-bias": ("gpt2", LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, lora_bias=True)),
    "gpt2-ia3": (
        "gpt2",
        IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
    ),
}
TIED: dict[str, Any] = {
    "embedding": LoraConfig(target_modules=["embed_tokens"]),
    "embedding-and-head": LoraConfig(target_modules=["embed_tokens", "lm_head"]),
    "head": LoraConfig(target_modules=["lm_head"]),
    "saved-embedding": LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "saved-head": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "both-tied": LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True),
    "saved-tied": LoraConfig(
        target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "tokens": LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 9]),
    "only-tokens": TrainableTokensConfig(token_indices=[5, 9]),
}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


def peft_logits(base: Path, adapter: str) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))


def merge(click_cli: Callable[..., Any], *args: str) -> Any:
    done = click_cli("adapter-merge", *args)
    assert done.code == 0, done.stderr
    return json.loads(Path(args[args.index("-o") + 1], "artifact.json").read_text())


@pytest.mark.parametrize("case", STREAMED)
def test_equals_peft_merge_and_unload(case, bases, adapt, click_cli) -> None:
    name, config = STREAMED[case]
    adapter = adapt(bases[name], config)
    manifest = merge(click_cli, adapter, "-o", "merged")
    assert manifest["kind"] == "model"
    assert not manifest["metrics"]["in_memory"]

    base = AutoModelForCausalLM.from_pretrained(bases[name])
    before = {k: v.clone() for k, v in base.state_dict().items()}
    theirs = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    ours = AutoModelForCausalLM.from_pretrained("merged").state_dict()
    assert ours.keys() == theirs.keys()
    assert max(float((ours[k] - theirs[k]).abs().max()) for k in ours) < 1e-6
    assert max(float((ours[k] - before[k]).abs().max()) for k in ours) > 1e-3
    assert {p.name for p in Path("merged").glob("*.safetensors")} == {
        p.name for p in bases[name].glob("*.safetensors")
    }


@pytest.mark.parametrize("case", TIED)
def test_tied_embeddings_act_as_the_unmerged_model(case, bases, adapt, click_cli) -> None:
    adapter = adapt(bases["tied"], TIED[case])
    merge(click_cli, adapter, "-o", "merged")
    model = AutoModelForCausalLM.from_pretrained("merged")
    torch.testing.assert_close(logits(model), peft_logits(bases["tied"], adapter), atol=1e-5, rtol=0)
    stays = case in ("both-tied", "saved-tied", "tokens", "only-tokens")
    assert model.config.tie_word_embeddings is stays
    assert ("lm_head.weight" in load_file("merged/model.safetensors")) is not stays


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_an_initialisation_that_changed_the_base(method, bases, adapt, click_cli) -> None:
    config = LoraConfig(target_modules=LINEAR, r=4, init_lora_weights=method)
    adapter = adapt(bases["llama"], config, std=0.02)
    done = click_cli("adapter-merge", adapter, "-o", "merged")
    assert "whole model in memory" in done.stderr
    model = AutoModelForCausalLM.from_pretrained("merged")
    torch.testing.assert_close(logits(model), peft_logits(bases["llama"], adapter), atol=1e-5, rtol=0)


def test_pissa_saved_as_plain_lora(bases, workdir, click_cli, randomise) -> None:
    """The way lora-tune saves it: the trained model's own logits are the reference."""
    from peft import get_peft_model

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(bases["llama"]),
        LoraConfig(target_modules=LINEAR, r=4, init_lora_weights="pissa"),
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained("initial")
    randomise(model, 0, 0.02)
    trained = logits(model)
    model.save_pretrained("adapter", path_initial_model_for_weight_conversion="initial")
    assert not merge(click_cli, "adapter", "-o", "merged")["metrics"]["in_memory"]
    after = logits(AutoModelForCausalLM.from_pretrained("merged"))
    torch.testing.assert_close(after, trained, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "config", [LoHaConfig(target_modules=LINEAR, r=4), VeraConfig(target_modules=["q_proj"], r=4)]
)
def test_other_methods_go_through_peft(config, bases, adapt, click_cli) -> None:
    adapter = adapt(bases["llama"], config, std=0.3)
    manifest = merge(click_cli, adapter, "-o", "merged")
    assert manifest["metrics"]["in_memory"]
    model = AutoModelForCausalLM.from_pretrained("merged")
    torch.testing.assert_close(logits(model), peft_logits(bases["llama"], adapter), atol=1e-5, rtol=0)


def test_bfloat16_base_is_rounded_once(bases, adapt, click_cli, workdir) -> None:
    model = AutoModelForCausalLM.from_pretrained(bases["llama"], dtype=torch.bfloat16)
    model.save_pretrained("bf16")
    AutoTokenizer.from_pretrained(bases["llama"]).save_pretrained("bf16")
    adapter = adapt(Path("bf16"), LoraConfig(target_modules=LINEAR, r=4, lora_alpha=16), std=0.2)
    metrics = merge(click_cli, adapter, "-o", "merged")["metrics"]
    assert 0 < metrics["logits"]["mean_kl"] < 1e-3 < metrics["logits"]["effect_kl"]
    base, merged = load_file("bf16/model.safetensors"), load_file("merged/model.safetensors")
    lora = load_file(f"{adapter}/adapter_model.safetensors")
    stem = "model.layers.0.self_attn.q_proj"
    a, b = (lora[f"base_model.model.{stem}.lora_{x}.weight"].double() for x in "AB")
    exact = base[f"{stem}.weight"].double() + 4 * (b @ a)
    error = (merged[f"{stem}.weight"].double() - exact).abs()
    half_ulp = torch.exp2(torch.floor(torch.log2(exact.abs())) - 8)
    assert bool((error <= half_ulp * 1.001).all())


def test_stored_precision(bases, adapt, click_cli) -> None:
    adapter = adapt(bases["sharded"], LoraConfig(target_modules=LINEAR), std=0.2)
    merge(click_cli, adapter, "-o", "merged", "--dtype-stored", "bfloat16")
    assert {v.dtype for p in Path("merged").glob("*.safetensors") for v in load_file(p).values()} == {
        torch.bfloat16
    }
    model = AutoModelForCausalLM.from_pretrained("merged", dtype="auto")
    assert model.dtype == torch.bfloat16
    index = json.loads(Path("merged/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 2 for p in model.parameters())


def test_slices_smaller_than_a_tensor(bases, adapt, click_cli, monkeypatch) -> None:
    from tuneutils.tools.adapter_merge import tensorfile

    monkeypatch.setattr(tensorfile, "SLICE_ELEMENTS", 100)
    config = LoraConfig(
        target_modules=["embed_tokens", "q_proj", "down_proj"], use_dora=True, trainable_token_indices=None
    )
    adapter = adapt(bases["llama"], config)
    merge(click_cli, adapter, "-o", "merged")
    model = AutoModelForCausalLM.from_pretrained("merged")
    torch.testing.assert_close(logits(model), peft_logits(bases["llama"], adapter), atol=1e-5, rtol=0)


def test_files_without_the_base_models_prefix(bases, adapt, click_cli, workdir) -> None:
    """As the Hub's gpt2 has them: ``h.0.attn.c_attn.weight`` rather than ``transformer.h.0…``."""
    Path("short").mkdir()
    tensors = {}
    for path in bases["gpt2"].glob("*.safetensors"):
        tensors.update({k.removeprefix("transformer."): v for k, v in load_file(path).items()})
    save_file(tensors, "short/model.safetensors", metadata={"format": "pt"})
    for path in bases["gpt2"].glob("*.json"):
        if "index" not in path.name:
            Path("short", path.name).write_bytes(path.read_bytes())
    adapter = adapt(Path("short"), LoraConfig(target_modules=GPT2, fan_in_fan_out=True))
    manifest = merge(click_cli, adapter, "-o", "merged")
    assert not manifest["metrics"]["in_memory"]
    assert load_file("merged/model.safetensors").keys() == tensors.keys()


def test_manifest_names_inputs_and_licence(bases, adapt, click_cli, workdir) -> None:
    import shutil

    from tuneutils.shared.artifact import describe_input

    shutil.copytree(bases["llama"], "base")
    digest = describe_input("model", "base").sha256
    Path("base/artifact.json").write_text(
        json.dumps({"schema": 1, "kind": "model", "licence": "Apache-2.0", "inputs": [], "files": {}})
    )
    adapter = adapt(Path("base"), LoraConfig(target_modules=LINEAR))
    manifest = merge(click_cli, adapter, "-o", "merged")
    assert manifest["licence"] == "Apache-2.0"
    assert [(i["role"], i["path"]) for i in manifest["inputs"]] == [("model", "base"), ("adapter", "adapter")]
    assert manifest["inputs"][0]["sha256"] != digest
    again = click_cli("adapter-merge", adapter, "-o", "merged")
    assert again.code == 0
    assert "up to date" in again.stderr


def test_pefts_merge_of_a_tied_embedding_changes_both_sides(bases, adapt) -> None:
    """Why tied embeddings are untied here: PEFT's merged model is not the adapted one."""
    adapter = adapt(bases["tied"], TIED["embedding"], std=0.3)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["tied"]), adapter)
    before = logits(model)
    assert float((logits(model.merge_and_unload()) - before).abs().max()) > 1e-3
