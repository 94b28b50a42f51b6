"""Training: what gets gradients, dtypes, checkpointing, and that the adapters learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model

from tuneutils.shared.adapters import BottleneckConfig

STYLES = ["houlsby", "pfeiffer", "parallel"]


def gradients(model: Any, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids, labels=input_ids).loss.backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_checkpointed_gradients_equal_plain_ones(
    adapted: Any, input_ids: Any, style: str, use_reentrant: bool
) -> None:
    model = adapted(style, scaling="learned").train()
    plain = gradients(model, input_ids)
    assert set(plain) == {key for key, _ in model.named_parameters() if "bottleneck_" in key}
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    layer = model.get_base_model().model.layers[0]
    assert layer.gradient_checkpointing
    checkpointed = gradients(model, input_ids)
    assert set(checkpointed) == set(plain)
    for key, gradient in plain.items():
        torch.testing.assert_close(checkpointed[key], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("style", STYLES)
def test_half_precision_base_with_fp32_adapters(
    base: Any, input_ids: Any, style: str, dtype: torch.dtype, autocast: bool
) -> None:
    base = base.to(dtype)
    model = get_peft_model(base, BottleneckConfig(style=style)).train()
    adapters = {key: p for key, p in model.named_parameters() if "bottleneck_" in key}
    assert {p.dtype for p in adapters.values()} == {torch.float32}
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        output = model(input_ids, labels=input_ids, output_hidden_states=True)
        with model.disable_adapter():
            expected = model(input_ids).logits
    assert torch.equal(output.logits, expected)
    assert {h.dtype for h in output.hidden_states[:-1]} == {dtype}
    output.loss.backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (key in adapters)
    # With the up-projection at zero, the gradient reaches it alone.
    assert all(p.grad.abs().sum() > 0 for key, p in adapters.items() if "bottleneck_up" in key)
    assert all(p.grad.dtype == torch.float32 for p in adapters.values())


@pytest.mark.parametrize("style", STYLES)
def test_a_4_bit_base_trains(input_ids: Any, tmp_path: Any, style: str) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    widths = {"hidden_size": 64, "intermediate_size": 128}  # multiples of the quantisation block
    config = LlamaConfig(**widths, vocab_size=64, num_hidden_layers=2, num_attention_heads=4)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
    assert type(quantised.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    with torch.no_grad():  # the kernels for inference and for training round differently
        expected = quantised.eval()(input_ids).logits
        model = get_peft_model(quantised, BottleneckConfig(style=style)).eval()
        assert torch.equal(model(input_ids).logits, expected)
    found = gradients(model.train(), input_ids)
    assert found
    assert all("bottleneck_" in key for key in found)


@pytest.mark.parametrize("style", STYLES)
def test_dropout_acts_in_training_only(base: Any, input_ids: Any, style: str) -> None:
    model = get_peft_model(base, BottleneckConfig(style=style, dropout=0.5, init_weights="bert"))
    model.train()
    assert not torch.equal(model(input_ids).logits, model(input_ids).logits)
    model.eval()
    assert torch.equal(model(input_ids).logits, model(input_ids).logits)


@pytest.mark.parametrize("style", STYLES)
def test_adapters_learn_a_batch_and_leave_the_base(base: Any, input_ids: Any, style: str) -> None:
    frozen = {key: value.clone() for key, value in base.state_dict().items()}
    torch.manual_seed(0)
    model = get_peft_model(base, BottleneckConfig(style=style, bottleneck_size=32)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    bare = model.unload().state_dict()
    assert all(torch.equal(bare[key], value) for key, value in frozen.items())
