"""Hand-written gradients against central differences, the model's own code, and exact attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama

from tuneutils.shared.fused_ops import CausalAttention, RMSNorm, Rotary, SwiGLU, fused_ops
from tuneutils.shared.logprobs_model import causal_nll


def doubles(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def test_norm_gradient_agrees_with_central_differences() -> None:
    (x,) = doubles((3, 8))
    weight = torch.randn(8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: RMSNorm.apply(t, weight, 1e-5), (x,))
    torch.testing.assert_close(RMSNorm.apply(x, weight, 1e-5), F.rms_norm(x, (8,), weight, 1e-5))


def test_swiglu_gradient_agrees_with_central_differences() -> None:
    assert torch.autograd.gradcheck(SwiGLU.apply, doubles((3, 8), (3, 8)))


def test_rotary_gradient_agrees_with_central_differences() -> None:
    (x,) = doubles((2, 3, 4, 8))
    cos, sin = torch.randn(2, 2, 1, 4, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: Rotary.apply(t, cos, sin), (x,))


@pytest.mark.parametrize("bits", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [2, 37, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_gradient_equals_autograd_through_the_formula(
    bits: torch.dtype, length: int, masked: bool
) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 6, length, 8, dtype=bits).requires_grad_()
    k, v = (torch.randn(2, 2, length, 8, dtype=bits).requires_grad_() for _ in range(2))
    wide_k, wide_v = (t.repeat_interleave(3, 1) for t in (k, v))
    seen = torch.ones(2, 1, length, length).tril().bool()
    mask = None
    if masked:
        mask = seen = seen & ((torch.rand(2, 1, length, length) < 0.6) | torch.eye(length).bool())
    scores = (q @ wide_k.mT * 0.3).masked_fill(~seen, -torch.inf)
    exact = scores.softmax(-1) @ wide_v
    grad = torch.randn_like(exact)
    ours = CausalAttention.apply(q, k, v, 0.3, mask)
    tolerance = 1e-5 if bits == torch.float32 else 1e-12
    torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(exact, (q, k, v), grad), strict=True
    ):
        assert (a - b).norm() < tolerance * b.norm()


def test_bfloat16_attention_gradient_is_as_near_as_the_flash_kernel() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 200, 64) * s for s in (3.0, 3.0, 1.0))
    grad = torch.randn(2, 4, 200, 64)

    def gradients(attend: Any, dtype: torch.dtype) -> torch.Tensor:
        given = [t.bfloat16().to(dtype).requires_grad_() for t in (q, k, v)]
        made = torch.autograd.grad(attend(*given), given, grad.bfloat16().to(dtype))
        return torch.cat([g.double().flatten() for g in made])

    def flash(*given: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*given, is_causal=True)

    exact = gradients(flash, torch.float64)
    theirs = (gradients(flash, torch.bfloat16) - exact).norm() / exact.norm()
    ours = gradients(lambda *t: CausalAttention.apply(*t, 0.125), torch.bfloat16)
    assert (ours - exact).norm() / exact.norm() < 1.5 * theirs < 0.02


def test_extreme_scores_give_finite_gradients() -> None:
    q, k = ((torch.randn(1, 1, 40, 64) * 100).bfloat16().requires_grad_() for _ in range(2))
    v = torch.randn(1, 1, 40, 64).bfloat16().requires_grad_()
    made = torch.autograd.grad(CausalAttention.apply(q, k, v, 0.125).sum(), (q, k, v))
    assert all(g.isfinite().all() for g in made)


def test_a_frozen_llama_is_replaced_and_put_back(tiny_model: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).requires_grad_(False)
    rotary = modeling_llama.apply_rotary_pos_emb
    ids = torch.arange(20).view(2, 10)
    plain = model(ids).logits
    with fused_ops(model) as counts:
        assert counts == {"norms": 5, "mlps": 2, "rotary": 1}
        torch.testing.assert_close(model(ids).logits, plain)
    assert modeling_llama.apply_rotary_pos_emb is rotary
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_norm_of_another_formula_is_left_alone() -> None:
    norm = GemmaRMSNorm(8).requires_grad_(False)  # multiplies by 1 + weight
    norm.variance_epsilon = norm.eps
    with fused_ops(torch.nn.Sequential(norm)) as counts:
        assert counts["norms"] == 0


def test_norms_that_learn_are_left_alone(tiny_model: Any) -> None:
    with fused_ops(AutoModelForCausalLM.from_pretrained(tiny_model)) as counts:
        assert counts["norms"] == 0


def test_right_padding_needs_no_mask(tiny_model: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.arange(2, 26).view(2, 12)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[0, 7:], labels[0, 7:] = 0, -100
    losses = [causal_nll(model, ids, given, labels) for given in (mask, None)]
    made = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    for without, with_mask in zip(made[1], made[0], strict=True):
        assert (without - with_mask).norm() <= 1e-6 * with_mask.norm()
