"""The chunked loss against plain cross-entropy, finite differences and whole models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tuneutils.shared.logprobs import chunked_cross_entropy, token_logprobs

N, H, V = 37, 16, 53
TRANSFORMS = [
    {},
    {"logit_scale": 0.25},
    {"logit_softcap": 3.0},
    {"logit_softcap": 2.0, "logit_scale": 1.5, "temperature": 0.7},
]


def problem(dtype=torch.float32, ignored=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[torch.rand(N, generator=generator) < ignored] = -100
    return hidden, weight, bias, labels


def plain_logits(hidden, weight, bias, logit_scale=1.0, logit_softcap=None, temperature=1.0):
    logits = F.linear(hidden, weight, bias).to(torch.promote_types(hidden.dtype, torch.float32)) * logit_scale
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return logits / temperature


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def grads(loss, inputs):
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
def test_loss_and_gradients_equal_plain_cross_entropy(transform, reduction, chunk_tokens):
    *inputs, labels = problem()
    plain = F.cross_entropy(plain_logits(*inputs, **transform), labels, reduction=reduction)
    hidden, weight, bias = inputs
    chunked = chunked_cross_entropy(
        hidden, weight, labels, bias=bias, reduction=reduction, chunk_tokens=chunk_tokens, **transform
    )
    assert relative(chunked, plain) < 1e-6
    for ours, theirs in zip(grads(3 * chunked, inputs), grads(3 * plain, inputs), strict=True):
        assert relative(ours, theirs) < 1e-6


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_per_token_losses_can_be_weighted(transform):
    hidden, weight, bias, labels = problem()
    weights = torch.rand(N)
    plain = F.cross_entropy(plain_logits(hidden, weight, bias, **transform), labels, reduction="none")
    ours = chunked_cross_entropy(
        hidden, weight, labels, bias=bias, reduction="none", chunk_tokens=7, **transform
    )
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    inputs = (hidden, weight, bias)
    for a, b in zip(grads((ours * weights).sum(), inputs), grads((plain * weights).sum(), inputs)):
        assert relative(a, b) < 1e-6


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_logprobs_and_entropy_equal_log_softmax(transform):
    hidden, weight, bias, labels = problem()
    kept = labels != -100
    log_softmax = plain_logits(hidden, weight, bias, **transform).log_softmax(-1)
    plain = log_softmax[kept].gather(-1, labels[kept, None])[:, 0]
    plain_entropy = -(log_softmax.exp() * log_softmax).sum(-1)[kept]
    ours, entropy = token_logprobs(
        hidden, weight, labels, bias=bias, with_entropy=True, chunk_tokens=7, **transform
    )
    torch.testing.assert_close(ours[kept], plain)
    torch.testing.assert_close(entropy[kept], plain_entropy)
    assert not ours[~kept].any()
    assert not entropy[~kept].any()
    inputs = (hidden, weight, bias)
    a, b = torch.rand(2, N)
    ours_grads = grads((ours * a + entropy * b).sum(), inputs)
    plain_grads = grads((plain * a[kept] + plain_entropy * b[kept]).sum(), inputs)
    for x, y in zip(ours_grads, plain_grads, strict=True):
        assert relative(x, y) < 2e-6


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradcheck_in_double_precision(transform):
    hidden, weight, bias, labels = problem(torch.float64)

    def nll(h, w, b):
        return chunked_cross_entropy(h, w, labels, bias=b, reduction="mean", chunk_tokens=8, **transform)

    def logprobs(h, w, b):
        return token_logprobs(h, w, labels, bias=b, with_entropy=True, chunk_tokens=8, **transform)

    assert torch.autograd.gradcheck(nll, (hidden, weight, bias), nondet_tol=1e-12)
    assert torch.autograd.gradcheck(logprobs, (hidden, weight, bias))


def test_second_derivative_raises():
    hidden, weight, _, labels = problem()
    loss = chunked_cross_entropy(hidden, weight, labels)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_no_label_gives_zero_loss_and_zero_gradients(reduction):
    hidden, weight, bias, labels = problem()
    loss = chunked_cross_entropy(
        hidden, weight, torch.full_like(labels, -100), bias=bias, reduction=reduction
    ).sum()
    assert loss.item() == 0.0
    for grad in grads(loss, (hidden, weight, bias)):
        assert grad.shape
        assert not grad.any()


def test_frozen_weight_gets_no_gradient_buffer():
    hidden, weight, _, labels = problem()
    loss = chunked_cross_entropy(hidden, weight.detach(), labels)
    assert loss.grad_fn.next_functions[0][0].gradients.weight is None
    loss.backward()
    assert hidden.grad is not None


def test_no_grad_mode_and_frozen_inputs():
    hidden, weight, _, labels = problem()
    plain = F.cross_entropy(plain_logits(hidden, weight, None), labels)
    with torch.no_grad():
        assert relative(chunked_cross_entropy(hidden, weight, labels), plain) < 1e-6
    assert not chunked_cross_entropy(hidden.detach(), weight.detach(), labels).requires_grad


def test_num_items_makes_accumulation_equal_the_full_batch():
    hidden, weight, _, labels = problem()
    count = int((labels != -100).sum())
    full = chunked_cross_entropy(hidden, weight, labels)
    parts = sum(
        chunked_cross_entropy(hidden[rows], weight, labels[rows], num_items=count)
        for rows in (slice(0, 30), slice(30, N))
    )
    torch.testing.assert_close(parts, full)


def test_half_precision_keeps_the_softmax_in_fp32():
    hidden, weight, bias, labels = problem(torch.bfloat16)
    plain = F.cross_entropy(F.linear(hidden, weight, bias).float(), labels)
    ours = chunked_cross_entropy(hidden, weight, labels, bias=bias, chunk_tokens=4)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain)
    inputs = (hidden, weight, bias)
    for a, b in zip(grads(ours, inputs), grads(plain, inputs), strict=True):
        assert a.dtype == torch.bfloat16
        assert relative(a.float(), b.float()) < 1e-2


def test_autocast_computes_in_the_dtype_of_linear():
    hidden, weight, bias, labels = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = F.cross_entropy(F.linear(hidden, weight, bias).float(), labels)
        ours = chunked_cross_entropy(hidden, weight, labels, bias=bias)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(grads(ours, (hidden, weight)), grads(plain, (hidden, weight)), strict=True):
        assert a.dtype == torch.float32
        assert relative(a, b) < 1e-2


def test_second_backward_under_retain_graph_equals_the_first():
    hidden, weight, _, labels = problem()
    loss = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=3)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(2 * loss, (hidden, weight))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b)


def test_large_logits_stay_finite():
    hidden, weight, _, labels = problem()
    loss = chunked_cross_entropy(hidden * 1e4, weight, labels)
    plain = F.cross_entropy(F.linear(hidden * 1e4, weight), labels)
    assert relative(loss, plain) < 1e-6
    assert torch.isfinite(torch.autograd.grad(loss, hidden)[0]).all()


def test_shapes_that_do_not_go_together_are_named():
    hidden, weight, _, labels = problem()
    with pytest.raises(ValueError, match=r"\(37, 16\)"):
        chunked_cross_entropy(hidden, weight, labels[:-1])
