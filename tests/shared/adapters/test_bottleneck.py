"""Bottleneck adapters behave as PEFT's own methods do."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from tuneutils.shared.adapters import AdapterError, BottleneckConfig, BottleneckModel
from tuneutils.shared.adapters.registry import register_method

STYLES = ["houlsby", "pfeiffer", "parallel"]
HIDDEN, LAYERS = 32, 2
SMALL = {"vocab_size": 64, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
ARCHITECTURES = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=HIDDEN, n_layer=LAYERS, n_head=4)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=48)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8)
    ),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=HIDDEN)),
    "opt_post_norm": lambda: OPTForCausalLM(
        OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=HIDDEN, do_layer_norm_before=False)
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**SMALL, intermediate_size=48)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SMALL, intermediate_size=48)),
}


def parameters_of(size: int) -> int:
    """Closed form for one adapter: two matrices and two biases."""
    return 2 * HIDDEN * size + size + HIDDEN


@pytest.mark.parametrize("init_weights", ["zero-up", "mam_adapter"])
@pytest.mark.parametrize("style", STYLES)
def test_zero_up_starts_bit_equal_to_the_base(
    base: Any, input_ids: Any, style: str, init_weights: str
) -> None:
    expected = base(input_ids).logits
    model = get_peft_model(base, BottleneckConfig(style=style, init_weights=init_weights)).eval()
    assert torch.equal(model(input_ids).logits, expected)


@pytest.mark.parametrize(("init_weights", "std"), [("bert", 0.02), ("houlsby", 0.0088)])
def test_initial_weights_have_the_published_spread(base: Any, init_weights: str, std: float) -> None:
    # A normal of std 0.01 cut at two std has std 0.01 * 0.8796.
    model = get_peft_model(base, BottleneckConfig(init_weights=init_weights, bottleneck_size=512))
    for key, parameter in model.named_parameters():
        if "bottleneck_" in key and key.endswith("weight"):
            assert parameter.std().item() == pytest.approx(std, rel=0.03)
        elif "bottleneck_" in key:
            assert torch.count_nonzero(parameter) == 0


@pytest.mark.parametrize(
    ("options", "size"), [({}, 2), ({"reduction_factor": 4}, 8), ({"bottleneck_size": 5}, 5)]
)
@pytest.mark.parametrize(("style", "placements"), [("houlsby", 2), ("pfeiffer", 1), ("parallel", 1)])
def test_trainable_parameters_follow_the_closed_form(
    base: Any, style: str, placements: int, options: dict[str, int], size: int
) -> None:
    model = get_peft_model(base, BottleneckConfig(style=style, **options))
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == placements * LAYERS * parameters_of(size)


def test_parameters_are_counted_without_weights(base: Any) -> None:
    with torch.device("meta"):
        model = get_peft_model(type(base)(base.config), BottleneckConfig(style="pfeiffer"))
    assert model.get_nb_trainable_parameters()[0] == LAYERS * parameters_of(2)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_layers_to_transform_limits_the_layers(base: Any) -> None:
    model = get_peft_model(base, BottleneckConfig(style="pfeiffer", layers_to_transform=1))
    assert model.base_model.targeted_module_names == ["model.layers.1"]
    with pytest.raises(AdapterError, match="layers_to_transform has 2, but the model's layers are 0 to 1"):
        get_peft_model(model.unload(), BottleneckConfig(layers_to_transform=[0, 2]))


def test_target_modules_can_be_given(base: Any) -> None:
    config = BottleneckConfig(target_modules=["mlp"], layers_to_transform=[0])
    model = get_peft_model(base, config)
    assert model.base_model.targeted_module_names == ["model.layers.0.mlp"]


@pytest.mark.parametrize("options", [{}, {"scaling": "learned"}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("style", STYLES)
def test_saved_adapter_loads_bit_equal(
    adapted: Any, input_ids: Any, tmp_path: Path, style: str, options: dict[str, Any]
) -> None:
    model = adapted(style, **options)
    expected = model(input_ids).logits
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors", ".md"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["style"]) == ("BOTTLENECK", style)
    for low_cpu_mem_usage in (False, True):
        fresh = copy.deepcopy(model).unload()
        loaded = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(loaded(input_ids).logits, expected)
        assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("style", STYLES)
def test_saved_keys_name_the_wrapped_module_and_no_adapter(adapted: Any, tmp_path: Path, style: str) -> None:
    adapted(style, names=("first",)).save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "first" / "adapter_model.safetensors"))
    places = {"houlsby": [".self_attn", ".mlp"], "pfeiffer": [""], "parallel": [".mlp"]}[style]
    assert keys == {
        f"base_model.model.model.layers.{layer}{place}.bottleneck_{part}.{kind}"
        for layer in range(LAYERS)
        for place in places
        for part in ("down", "up")
        for kind in ("weight", "bias")
    }


def test_a_fresh_process_loads_the_adapter(adapted: Any, input_ids: Any, tmp_path: Path) -> None:
    model = adapted("pfeiffer")
    expected = model(input_ids).logits
    model.save_pretrained(tmp_path / "adapter")
    copy.deepcopy(model).unload().save_pretrained(tmp_path / "base")
    script = (
        "import sys, torch, tuneutils.shared.adapters\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/base')\n"
        "model = PeftModel.from_pretrained(base, sys.argv[1] + '/adapter').eval()\n"
        "print(model(torch.tensor(eval(sys.argv[2]))).logits.double().sum().item().hex())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(input_ids.tolist())],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split()[-1] == expected.double().sum().item().hex()


@pytest.mark.parametrize("style", STYLES)
def test_disabled_and_unloaded_model_is_the_base(base: Any, adapted: Any, input_ids: Any, style: str) -> None:
    keys, expected = list(base.state_dict()), base(input_ids).logits
    model = adapted(style)
    assert not torch.equal(model(input_ids).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(input_ids).logits, expected)
    assert not torch.equal(model(input_ids).logits, expected)
    twin = copy.deepcopy(model)
    bare = model.unload()
    assert torch.equal(bare(input_ids).logits, expected)
    assert list(bare.state_dict()) == keys
    assert not any(module._forward_hooks for module in bare.modules())
    assert not torch.equal(twin(input_ids).logits, expected)  # a copy has adapters of its own
    assert torch.equal(twin.unload()(input_ids).logits, expected)


def test_an_adapter_of_another_width_is_refused(adapted: Any, tmp_path: Path) -> None:
    adapted("pfeiffer").save_pretrained(tmp_path)
    other = ARCHITECTURES["qwen3"]()
    wider = type(other)(Qwen3Config(**SMALL | {"hidden_size": 48}, intermediate_size=48, head_dim=8))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(wider, tmp_path)


def test_merging_is_refused(adapted: Any, input_ids: Any) -> None:
    model = adapted("houlsby")
    expected = model(input_ids).logits
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(AdapterError, match=r"cannot be merged.*unload\(\)"):
            merge()
    assert torch.equal(model(input_ids).logits, expected)


@pytest.mark.parametrize("style", STYLES)
def test_named_adapters_switch_and_delete(base: Any, adapted: Any, input_ids: Any, style: str) -> None:
    expected = base(input_ids).logits
    model = adapted(style, names=("first", "second"))
    first = model(input_ids).logits
    model.set_adapter("second")
    second = model(input_ids).logits
    assert not torch.allclose(first, second, atol=1e-3)
    trainable = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".second." in key for key in trainable)
    model.delete_adapter("second")
    assert torch.equal(model(input_ids).logits, first)
    assert not any(".second." in key for key in model.state_dict())
    assert torch.equal(model.unload()(input_ids).logits, expected)


def test_a_frozen_adapter_in_a_stack_gets_no_gradient(adapted: Any, input_ids: Any) -> None:
    model = adapted("pfeiffer", names=("lang", "task"))
    model.base_model.set_adapter(["lang", "task"])
    model.set_requires_grad("lang", False)
    model(input_ids, labels=input_ids).loss.backward()
    with_gradient = {key for key, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {key for key, _ in model.named_parameters() if ".task." in key}


def test_adapters_of_two_styles_are_refused(adapted: Any, input_ids: Any) -> None:
    model = adapted("houlsby")
    expected = model(input_ids).logits
    with pytest.raises(
        AdapterError, match="adapters of style 'houlsby'; one of style 'pfeiffer' cannot join"
    ):
        model.add_adapter("second", BottleneckConfig(style="pfeiffer"))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(input_ids).logits, expected)


@pytest.mark.parametrize("style", STYLES)
def test_cached_generation_equals_recomputation(adapted: Any, input_ids: Any, style: str) -> None:
    model = adapted(style)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(input_ids=input_ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(input_ids=input_ids, use_cache=False, **options))
    assert cached.shape == (2, 21)


@pytest.mark.parametrize("style", STYLES)
def test_recorded_hidden_states_are_the_adapted_ones(adapted: Any, input_ids: Any, style: str) -> None:
    model = adapted(style)
    layer = model.get_base_model().model.layers[1]
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    output = model(input_ids, output_hidden_states=True, output_attentions=True)
    handle.remove()
    assert torch.equal(output.hidden_states[1], seen[0])  # what layer 0 gave is what layer 1 got
    assert len(output.hidden_states) == LAYERS + 1


@pytest.mark.parametrize("style", STYLES)
def test_the_forward_pass_traces_into_one_graph(adapted: Any, input_ids: Any, style: str) -> None:
    model = adapted(style)
    expected = model(input_ids, use_cache=False).logits
    traced = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(input_ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("style", STYLES)
def test_wrapped_modules_keep_their_attributes(adapted: Any, style: str) -> None:
    layer = adapted(style).get_base_model().model.layers[1]
    assert layer.self_attn.layer_idx == 1
    assert layer.self_attn.scaling == 8**-0.5
    assert layer.mlp.gate_proj.out_features == 48
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = layer.mlp.no_such_name


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_default_modules_by_architecture(name: str, style: str, input_ids: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = ARCHITECTURES[name]().eval()
    config = BottleneckConfig(style=style, bottleneck_size=4)
    if name.startswith("opt") and style == "parallel":
        with pytest.raises(AdapterError, match="needs the MLP as one module"):
            get_peft_model(base, config)
        return
    expected = base(input_ids).logits
    model = get_peft_model(base, config).eval()
    placements = 2 if style == "houlsby" else 1
    assert model.get_nb_trainable_parameters()[0] == placements * LAYERS * parameters_of(4)
    assert torch.equal(model(input_ids).logits, expected)
    for key, parameter in model.named_parameters():
        if "bottleneck_" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    changed = model(input_ids).logits
    assert (changed - expected).abs().max() > 1e-3
    model.train()
    model(input_ids, labels=input_ids).loss.backward()
    assert all((p.grad is not None) == ("bottleneck_" in key) for key, p in model.named_parameters())
    model.eval().save_pretrained(tmp_path)
    bare = model.unload()
    assert torch.equal(bare(input_ids).logits, expected)
    assert torch.equal(PeftModel.from_pretrained(bare, tmp_path).eval()(input_ids).logits, changed)


def test_an_unknown_architecture_asks_for_target_modules(input_ids: Any) -> None:
    base = MambaForCausalLM(
        MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    ).eval()
    with pytest.raises(AdapterError, match=r"architecture 'mamba'; give target_modules \(known: bert, "):
        get_peft_model(base, BottleneckConfig())
    expected = base(input_ids).logits
    model = get_peft_model(base, BottleneckConfig(target_modules=["mixer"])).eval()
    assert len(model.base_model.targeted_module_names) == 2
    # Not bit for bit: the reference scan's products round by where its tensors lie in memory.
    torch.testing.assert_close(model(input_ids).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "houlsbi"}, r"style is 'houlsbi'; give one of houlsby.*did you mean 'houlsby'"),
        ({"init_weights": "zero"}, "init_weights is 'zero'"),
        ({"non_linearity": "gelo"}, "non_linearity is 'gelo'"),
        ({"scaling": "learnt"}, "scaling is 'learnt'; give a number or 'learned'"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"reduction_factor": 0}, "reduction_factor is 0"),
        ({"bottleneck_size": 0}, "bottleneck_size is 0"),
    ],
)
def test_a_wrong_value_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        BottleneckConfig(**options)


def test_registration_is_done_once() -> None:
    member = register_method("bottleneck", BottleneckConfig, BottleneckModel)
    assert member is PeftType("BOTTLENECK") is PeftType.BOTTLENECK
    assert [str(name) for name in PeftType.__members__].count("BOTTLENECK") == 1
    assert PEFT_TYPE_TO_TUNER_MAPPING["BOTTLENECK"] is BottleneckModel
    assert copy.deepcopy(member) is member


def test_transformers_loads_the_adapter_by_its_folder(adapted: Any, input_ids: Any, tmp_path: Path) -> None:
    model = adapted("houlsby")
    expected = model(input_ids).logits
    copy.deepcopy(model).unload().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert AutoConfig.from_pretrained(tmp_path / "base").model_type == "llama"
    assert torch.equal(loaded(input_ids).logits, expected)
