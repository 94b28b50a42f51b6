"""The walk gives each layer what the whole model would, for architectures of every shape, from memory or files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tuneutils.shared.errors import ToolError
from tuneutils.shared.layerwise import decoder_of, layer_parts, open_decoder, walk
from tuneutils.shared.models import resolve
from tuneutils.shared.weights import Weights

# Names that the families use for the same sizes; each config takes those it knows.
SIZES = {
    "vocab_size": 100, "hidden_size": 32, "n_embd": 32, "d_model": 32, "n_layer": 2, "n_layers": 2,
    "num_hidden_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "intermediate_size": 64,
    "num_key_value_heads": 2, "rotary_dim": 4, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
    "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4,
}  # fmt: skip
FAMILIES = ("llama", "qwen2", "gemma3_text", "opt", "gpt_neox", "bloom", "mpt", "gptj")


def small(family: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family)
    for name, value in SIZES.items():
        if hasattr(config, name) and not (
            family != "gemma3_text" and name in ("layer_types", "sliding_window")
        ):
            setattr(config, name, value)
    if family == "opt":
        config.word_embed_proj_dim, config.ffn_dim = 32, 64
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 90, (5, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_sees_what_the_whole_model_gives_it(family: str, ids: torch.Tensor) -> None:
    model = small(family)
    with torch.no_grad():
        expected = model.base_model(ids, output_hidden_states=True).hidden_states
    seen = []
    for step in walk(decoder_of(model), ids, batch_tokens=16):
        torch.testing.assert_close(step.inputs, expected[step.index], atol=1e-5, rtol=1e-5)
        seen.append(step.name)
    assert len(seen) == 2
    with torch.no_grad():
        again = model.base_model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(again[-1], expected[-1])


def test_changes_reach_the_next_layer(ids: torch.Tensor) -> None:
    model = small("llama")
    steps = walk(decoder_of(model), ids)
    first = next(steps)
    before = first.outputs().clone()
    first.layer.mlp.down_proj.weight.data.zero_()
    first.changed()
    second = next(steps)
    with torch.no_grad():
        expected = model.base_model(ids, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(second.inputs, expected)
    assert not torch.allclose(second.inputs, before)


def test_groups_share_an_input_and_come_in_order(ids: torch.Tensor) -> None:
    step = next(walk(decoder_of(small("llama")), ids, batch_tokens=16))
    attention, mlp = "self_attn.", "mlp."
    shared: dict[str, list[torch.Tensor]] = {}
    groups = step.observe_all(lambda name, inputs: shared.setdefault(name, []).append(inputs.clone()))
    for name, parts in shared.items():
        alone: list[torch.Tensor] = []
        step.observe([name], lambda _, inputs: alone.append(inputs.clone()))  # noqa: B023
        assert torch.equal(torch.cat(parts), torch.cat(alone))
    assert list(shared) == [names[0] for names in groups]
    assert groups == [
        [f"{attention}{n}_proj" for n in "qkv"],
        [f"{attention}o_proj"],
        [f"{mlp}gate_proj", f"{mlp}up_proj"],
        [f"{mlp}down_proj"],
    ]


def test_observed_inputs_are_all_of_them(ids: torch.Tensor) -> None:
    model = small("llama")
    step = next(walk(decoder_of(model), ids, batch_tokens=16))
    seen: list[torch.Tensor] = []
    step.observe(["mlp.gate_proj"], lambda _, inputs: seen.append(inputs.clone()))
    whole: list[torch.Tensor] = []
    handle = model.model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda _, a: whole.append(a[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    torch.testing.assert_close(torch.cat(seen), whole[0].flatten(0, 1))


def test_from_files_one_layer_at_a_time(tiny_model: Path, ids: torch.Tensor) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    with torch.no_grad():
        expected = model.base_model(ids, output_hidden_states=True).hidden_states
    decoder = open_decoder(Weights(resolve(str(tiny_model))), dtype=torch.float32)

    def loaded() -> list[int]:
        return [i for i, layer in enumerate(decoder.layers) if any(not p.is_meta for p in layer.parameters())]

    assert loaded() == []
    for step in walk(decoder, ids):
        assert loaded() == [step.index]
        torch.testing.assert_close(step.inputs, expected[step.index])
    assert loaded() == []


def test_missing_parts_are_named() -> None:
    model = small("llama")
    del model.model.layers[0].mlp.gate_proj, model.model.layers[0].input_layernorm
    with pytest.raises(ToolError, match=r"LlamaDecoderLayer has no input_layernorm, mlp\.gate_proj"):
        layer_parts(model.model.layers[0])
    assert set(layer_parts(model.model.layers[1])) >= {"q", "o", "down", "mlp_norm"}


def test_a_model_without_linear_layers_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ToolError, match=r"m: GPT2LMHeadModel lacks linear modules in each of transformer\.h"):
        decoder_of(model, "m")


def damaged(tiny_model: Path, to: Path, change: Any) -> Weights:
    shutil.copytree(tiny_model, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return Weights(resolve(str(to)))


def test_weights_that_are_missing_or_not_finite(tiny_model: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][0, 0] = float("nan")

    missing = damaged(tiny_model, tmp_path / "a", lambda tensors: tensors.pop(name))
    with pytest.raises(
        ToolError, match=f"1 weights of a LlamaForCausalLM are not in its files, such as {name}"
    ):
        open_decoder(missing, dtype=torch.float32)
    spoilt = damaged(tiny_model, tmp_path / "b", spoil)
    with pytest.raises(ToolError, match=f"{name} has 1 values that are NaN"):
        list(walk(open_decoder(spoilt, dtype=torch.float32), ids))


def test_files_without_the_base_models_prefix(tiny_model: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.removeprefix("model.")] = tensors.pop(key)

    weights = damaged(tiny_model, tmp_path / "short", shorten)
    assert len(list(walk(open_decoder(weights, dtype=torch.float32), ids))) == 2


def test_quantized_adapters_and_gguf_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "q"))
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        text.replace("{", '{"quantization_config": {"quant_method": "gptq"},', 1)
    )
    with pytest.raises(ToolError, match=r"already quantized \(gptq\)"):
        Weights(resolve(str(folder)))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ToolError, match="import it first"):
        Weights(resolve(str(tmp_path / "m.gguf")))
