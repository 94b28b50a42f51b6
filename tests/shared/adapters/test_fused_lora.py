"""Fused LoRA layers against PEFT's own, and against central differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tuneutils.shared.adapters.fused_lora import LoraLinear, fused, fused_lora


def lora_model(folder: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **(config | options))).train()


def loss_and_gradients(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    loss = model(input_ids=ids, labels=ids).loss
    trainable = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, trainable)
    return loss.detach().double(), torch.cat([g.double().flatten() for g in gradients])


def tokens(model: Any, batch: int = 3, length: int = 17) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_gradients_agree_with_central_differences() -> None:
    torch.manual_seed(0)
    x, a, b = (torch.randn(*s, dtype=torch.float64).requires_grad_() for s in ((2, 3, 5), (2, 5), (4, 2)))
    weight, bias = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *t: LoraLinear.apply(t[0], weight, bias, t[1], t[2], 1.5), (x, a, b)
    )


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "down_proj"]}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradients_equal_peft(tiny_model: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    model = lora_model(tiny_model, dtype, **options).to(dtype)
    ids = tokens(model)
    plain_loss, plain = loss_and_gradients(model, ids)
    with fused_lora(model) as count:
        assert count > 0
        loss, gradients = loss_and_gradients(model, ids)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-9  # the model's norms round float64 to float32
    assert abs(loss / plain_loss - 1) < tolerance
    assert relative(gradients, plain) < tolerance


def test_loss_and_gradients_with_all_parts_fused_equal_peft(tiny_model: Any) -> None:
    model = lora_model(tiny_model)
    ids = tokens(model)
    plain_loss, plain = loss_and_gradients(model, ids)
    with fused(model, torch.device("cpu")):
        loss, gradients = loss_and_gradients(model, ids)
    assert abs(loss / plain_loss - 1) < 1e-6
    assert relative(gradients, plain) < 5e-6


def test_bfloat16_gradients_are_as_near_to_float32_as_peft(tiny_model: Any) -> None:
    model = lora_model(tiny_model, torch.bfloat16)
    exact_model = lora_model(tiny_model).float()
    exact_model.load_state_dict(model.state_dict())
    ids = tokens(model)
    _, exact = loss_and_gradients(exact_model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        _, plain = loss_and_gradients(model, ids)
        with fused(model, torch.device("cpu")):
            _, gradients = loss_and_gradients(model, ids)
    assert relative(gradients, exact) < 1.2 * relative(plain, exact)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}])
def test_layers_that_do_more_than_plain_lora_are_left_alone(tiny_model: Any, options: dict[str, Any]) -> None:
    with fused_lora(lora_model(tiny_model, **options)) as count:
        assert count == 0


def test_disabling_merging_and_switching_adapters_still_work(tiny_model: Any) -> None:
    model = lora_model(tiny_model).eval()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    ids = tokens(model)

    def outputs() -> list[torch.Tensor]:
        made = [model(ids).logits]
        with model.disable_adapter():
            made.append(model(ids).logits)
        model.set_adapter("other")
        made.append(model(ids).logits)
        model.base_model.set_adapter(["default", "other"])
        made.append(model(ids).logits)
        model.set_adapter("default")
        model.merge_adapter()
        made.append(model(ids).logits)
        model.unmerge_adapter()
        return made

    with torch.no_grad():
        plain = outputs()
        with fused_lora(model) as count:
            assert count > 0
            for ours, theirs in zip(outputs(), plain, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_forwards_are_put_back_after_an_error(tiny_model: Any) -> None:
    model = lora_model(tiny_model)
    with pytest.raises(RuntimeError, match="stop"), fused(model, torch.device("cpu")):
        raise RuntimeError("stop")
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model: Any) -> None:
    model = lora_model(tiny_model)
    ids = tokens(model)
    _, plain = loss_and_gradients(model, ids)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with fused(model, torch.device("cpu")):
        _, gradients = loss_and_gradients(model, ids)
    assert relative(gradients, plain) < 5e-6


def test_a_base_that_learns_is_left_alone(tiny_model: Any) -> None:
    model = lora_model(tiny_model)
    model.requires_grad_(True)
    with fused_lora(model) as count:
        assert count == 0
