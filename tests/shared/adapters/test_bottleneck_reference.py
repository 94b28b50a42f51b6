"""The forward pass against the `adapters` library and against hand-written layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import relu, silu
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from tuneutils.shared.adapters import BottleneckConfig

DATA = Path(__file__).parent / "data"
CLASSES = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "gpt2": (GPT2LMHeadModel, GPT2Config),
    "bert": (BertForMaskedLM, BertConfig),
}
# The library's place of an adapter, and ours, within a layer.
PLACES = {
    ("llama", "houlsby"): {"attention_adapters": "self_attn.", "output_adapters": "mlp."},
    ("llama", "pfeiffer"): {"output_adapters": ""},
    ("gpt2", "houlsby"): {"attention_adapters": "attn.", "output_adapters": "mlp."},
    ("gpt2", "pfeiffer"): {"output_adapters": ""},
    ("bert", "houlsby"): {"attention.output": "attention.output.dropout.", "output": "output.dropout."},
    ("bert", "pfeiffer"): {"output": "output.LayerNorm."},
    ("bert", "parallel"): {"output": "output."},
}


def our_key(key: str, name: str, places: dict[str, str]) -> str:
    layer, place, rest = None, None, None
    for candidate in sorted(places, key=len, reverse=True):
        left, found, right = key.partition(f".{candidate}.adapters.{name}.adapter_")
        if found:
            layer, place, rest = left, places[candidate], right
            break
    assert rest is not None, key
    part, *_, kind = rest.split(".")
    return f"base_model.model.{layer}.{place}bottleneck_{part}.{name}.{kind}"


@pytest.mark.parametrize(("model_type", "style"), PLACES)
def test_logits_equal_those_of_the_adapters_library(model_type: str, style: str) -> None:
    tensors = load_file(DATA / f"adapters_{model_type}.safetensors")
    model_class, config_class = CLASSES[model_type]
    options = json.loads((DATA / f"adapters_{model_type}.json").read_text())["model_config"]
    base = model_class(config_class(**options)).eval()
    weights = {k.removeprefix("base."): v for k, v in tensors.items() if k.startswith("base.")}
    missing, unexpected = base.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("lm_head" in key or "decoder" in key for key in missing)  # tied
    base.tie_weights()
    torch.testing.assert_close(
        base(tensors["input_ids"]).logits, tensors["logits.base"], atol=1e-5, rtol=1e-5
    )

    names = [f"{style}_a", f"{style}_b"]
    model = get_peft_model(
        base, BottleneckConfig(style=style, reduction_factor=4), adapter_name=names[0]
    ).eval()
    model.add_adapter(names[1], BottleneckConfig(style=style, reduction_factor=4))
    loaded = {
        our_key(key.removeprefix("adapter."), name, PLACES[model_type, style]): value
        for key, value in tensors.items()
        for name in names
        if key.startswith("adapter.") and f".{name}." in key
    }
    assert set(loaded) == {key for key, _ in model.named_parameters() if "bottleneck_" in key}
    assert not model.load_state_dict(loaded, strict=False).unexpected_keys

    single = model(tensors["input_ids"]).logits
    torch.testing.assert_close(single, tensors[f"logits.{names[0]}"], atol=1e-5, rtol=1e-5)
    assert (single - tensors["logits.base"]).abs().max() > 0.1  # the adapters do matter
    if style != "parallel":
        model.base_model.set_adapter(names)
        stacked = model(tensors["input_ids"]).logits
        torch.testing.assert_close(stacked, tensors[f"logits.{style}_stack"], atol=1e-5, rtol=1e-5)
        assert (stacked - single).abs().max() > 0.1


def bottleneck(x: torch.Tensor, layer: Any, f: Any, scaling: float, name: str = "default") -> torch.Tensor:
    down, up = layer.bottleneck_down[name], layer.bottleneck_up[name]
    return scaling * (f(x @ down.weight.T + down.bias) @ up.weight.T + up.bias)


def by_hand(
    model: Any, input_ids: torch.Tensor, style: str, scaling: float, names: list[str]
) -> torch.Tensor:
    """A Llama forward pass with the adapters written out, from the unwrapped sublayers."""
    llama = model.get_base_model().model
    x = llama.embed_tokens(input_ids)
    positions = torch.arange(input_ids.shape[1])[None]
    rope = llama.rotary_emb(x, positions)
    f = silu if style == "houlsby" else relu

    def bare(module: Any) -> Any:
        return getattr(module, "base_layer", module)

    with model.disable_adapter():
        for wrapped in llama.layers:
            layer = bare(wrapped)
            attention = bare(layer.self_attn)
            s, _ = attention(layer.input_layernorm(x), position_embeddings=rope, attention_mask=None)
            for name in names if style == "houlsby" else []:
                s = s + bottleneck(s, layer.self_attn, f, scaling, name)
            x = x + s
            u = layer.post_attention_layernorm(x)
            m = bare(layer.mlp)(u)
            for name in names if style == "houlsby" else []:
                m = m + bottleneck(m, layer.mlp, f, scaling, name)
            for name in names if style == "parallel" else []:
                m = m + bottleneck(u, layer.mlp, f, scaling, name)
            x = x + m
            for name in names if style == "pfeiffer" else []:
                x = x + bottleneck(x, wrapped, f, scaling, name)
    return model.get_base_model().lm_head(llama.norm(x))


@pytest.mark.parametrize(("style", "scaling"), [("houlsby", 1.0), ("pfeiffer", 0.5), ("parallel", 4.0)])
def test_logits_equal_a_hand_written_llama(
    adapted: Any, input_ids: torch.Tensor, style: str, scaling: float
) -> None:
    model = adapted(style, scaling=scaling)
    expected = by_hand(model, input_ids, style, scaling, ["default"])
    torch.testing.assert_close(model(input_ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("style", ["houlsby", "pfeiffer", "parallel"])
def test_a_stack_equals_the_composed_function_in_its_order(
    adapted: Any, input_ids: torch.Tensor, style: str
) -> None:
    model = adapted(style, names=("lang", "task"), scaling=1.0)
    logits = {}
    for order in (["lang", "task"], ["task", "lang"]):
        model.base_model.set_adapter(order)
        logits[order[0]] = model(input_ids).logits
        expected = by_hand(model, input_ids, style, 1.0, order)
        torch.testing.assert_close(logits[order[0]], expected, atol=1e-5, rtol=1e-5)
    difference = (logits["lang"] - logits["task"]).abs().max()
    assert difference < 1e-4 if style == "parallel" else difference > 1e-2
