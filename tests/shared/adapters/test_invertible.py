"""MAD-X's invertible adapters against their definition (Pfeiffer et al. 2020, section 2.2.2)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn.functional import relu
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from tuneutils.shared.adapters import AdapterError, BottleneckConfig
from tuneutils.shared.adapters.bottleneck.invertible import Coupling
from tuneutils.shared.logprobs_model import causal_nll


def random_coupling(width: int, size: int | None = None) -> Coupling:
    torch.manual_seed(3)
    coupling = Coupling(width, size).double()
    for parameter in coupling.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return coupling


@pytest.mark.parametrize("width", [8, 7])
def test_the_coupling_is_the_papers_formula(width: int) -> None:
    coupling = random_coupling(width)
    e = torch.randn(5, width, dtype=torch.float64)
    e1, e2 = e[:, : width // 2], e[:, width // 2 :]
    p = dict(coupling.named_parameters())
    o1 = relu(e2 @ p["f_down.weight"].T + p["f_down.bias"]) @ p["f_up.weight"].T + p["f_up.bias"] + e1
    o2 = relu(o1 @ p["g_down.weight"].T + p["g_down.bias"]) @ p["g_up.weight"].T + p["g_up.bias"] + e2
    torch.testing.assert_close(coupling(e), torch.cat([o1, o2], dim=1))
    assert p["f_down.weight"].shape[0] == width // 4  # D in R^(h/4 x h/2)


@pytest.mark.parametrize("width", [8, 7])
def test_the_inverse_gives_back_what_went_in(width: int) -> None:
    coupling = random_coupling(width)
    e = torch.randn(3, 5, width, dtype=torch.float64)
    torch.testing.assert_close(coupling.inverse(coupling(e)), e)
    torch.testing.assert_close(coupling(coupling.inverse(e)), e)


def test_volume_is_preserved() -> None:
    coupling = random_coupling(6)
    e = torch.randn(6, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(coupling, e)
    assert torch.linalg.det(jacobian).item() == pytest.approx(1.0, abs=1e-9)
    assert not torch.allclose(jacobian, torch.eye(6, dtype=torch.float64))


def test_it_starts_as_the_identity(base: LlamaForCausalLM, input_ids: torch.Tensor) -> None:
    expected = base(input_ids).logits
    model = get_peft_model(base, language_config())
    torch.testing.assert_close(model(input_ids).logits, expected)


def language_config(**options: object) -> BottleneckConfig:
    options = {
        "style": "pfeiffer",
        "reduction_factor": 4,
        "invertible": True,
        "task_type": "CAUSAL_LM",
    } | options
    return BottleneckConfig(**options)  # type: ignore[arg-type]


def randomise(model: torch.nn.Module, seed: int = 2) -> None:
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "bottleneck_" in name:
            torch.nn.init.normal_(parameter, std=0.3)


def test_it_acts_on_the_input_and_is_undone_before_the_output(
    base: LlamaForCausalLM, input_ids: torch.Tensor
) -> None:
    model = get_peft_model(base, language_config())
    randomise(model)
    coupling = model.base_model.model.model.embed_tokens.bottleneck_coupling["default"]
    got = model(input_ids).logits

    # The same by hand: the adapted layers between the embedding's image and its inverse.
    body = base.model
    embedded = coupling(torch.nn.functional.embedding(input_ids, base.lm_head.weight))
    body.embed_tokens.enable_adapters(False)
    hidden = body(inputs_embeds=embedded).last_hidden_state
    expected = coupling.inverse(hidden) @ base.lm_head.weight.T
    torch.testing.assert_close(got, expected)


def test_the_chunked_loss_sees_it(base: LlamaForCausalLM, input_ids: torch.Tensor) -> None:
    model = get_peft_model(base, language_config())
    randomise(model)
    logits = model(input_ids).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    torch.testing.assert_close(causal_nll(model, input_ids, None, input_ids), expected)


def test_disabled_and_unloaded_it_leaves_the_base(base: LlamaForCausalLM, input_ids: torch.Tensor) -> None:
    expected = base(input_ids).logits
    names = [name for name, _ in base.named_modules()]
    model = get_peft_model(base, language_config())
    randomise(model)
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids).logits, expected)
    bare = model.unload()
    torch.testing.assert_close(bare(input_ids).logits, expected)
    assert [name for name, _ in bare.named_modules()] == names
    assert not bare.model.norm._forward_hooks


def test_only_the_adapter_is_trained_and_all_of_it(base: LlamaForCausalLM, input_ids: torch.Tensor) -> None:
    model = get_peft_model(base, language_config())
    randomise(model)
    causal_nll(model, input_ids, None, input_ids).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == ("bottleneck_" in name), (
            name
        )


@pytest.mark.parametrize("name", ["default", "cy"])
def test_it_is_saved_and_loaded_under_any_name(
    base: LlamaForCausalLM, input_ids: torch.Tensor, tmp_path: Path, name: str
) -> None:
    model = get_peft_model(base, language_config(), adapter_name=name)
    randomise(model)
    expected = model(input_ids).logits
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    bare = model.unload()
    again = PeftModel.from_pretrained(
        bare, tmp_path / ("" if name == "default" else name), adapter_name="other"
    )
    torch.testing.assert_close(again(input_ids).logits, expected)


def test_a_task_adapter_stacks_on_top_and_languages_swap(
    base: LlamaForCausalLM, input_ids: torch.Tensor
) -> None:
    """Stacked, a task adapter reads what the language adapter of the moment wrote; one does not touch the other."""
    model = get_peft_model(base, language_config(), adapter_name="en")
    model.add_adapter("cy", language_config())
    model.add_adapter("task", language_config(invertible=False))
    randomise(model)
    layer = model.base_model.model.model.layers[0]
    seen = {}
    for language in ("en", "cy"):
        model.base_model.set_adapter([language, "task"])
        seen[language] = model(input_ids).logits
        hidden = torch.randn(2, 3, 32)
        h = hidden + layer.adapter_output(language, hidden)
        h = h + layer.adapter_output("task", h)
        torch.testing.assert_close(layer._adapt(layer, (), hidden), h)
        assert model.base_model.model.model.embed_tokens.working_adapters() == [language]
    assert not torch.allclose(seen["en"], seen["cy"])


def test_layers_to_transform_leave_the_embedding_adapted(base: LlamaForCausalLM) -> None:
    model = get_peft_model(base, language_config(layers_to_transform=[1]))
    adapted = {n.split(".bottleneck_")[0] for n, _ in model.named_parameters() if "bottleneck_" in n}
    assert adapted == {f"base_model.model.model.{n}" for n in ("embed_tokens", "layers.1")}


def test_gpt2_has_its_norm_elsewhere(input_ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=16)).eval()
    model = get_peft_model(base, language_config())
    randomise(model)
    assert len(base.transformer.ln_f._forward_hooks) == 1
    with model.disable_adapter():
        plain = model(input_ids).logits
    assert not torch.allclose(model(input_ids).logits, plain)


def test_a_model_without_a_last_norm_is_refused() -> None:
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(AdapterError, match="'bert' has no known last norm"):
        get_peft_model(BertForMaskedLM(config), language_config())


def test_a_size_of_none_is_refused() -> None:
    with pytest.raises(AdapterError, match="invertible_size is 0"):
        language_config(invertible_size=0)


def test_the_method_mad_x_is_this(adapted: Callable[..., PeftModel]) -> None:
    from types import SimpleNamespace

    from tuneutils.shared.methods import _method_options

    options = _method_options(
        SimpleNamespace(method="mad-x", reduction_factor=2, target_modules=(), lora_rank=1, lora_alpha=None),  # type: ignore[arg-type]
        None,
    )
    assert options == {"style": "pfeiffer", "reduction_factor": 2, "invertible": True}
