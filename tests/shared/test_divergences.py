"""Divergences against closed forms, torch's kl_div with autograd, and TRL's own losses."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from tuneutils.shared.divergences import (
    KINDS,
    HeadTeacher,
    LogitsTeacher,
    Objective,
    TopK,
    chunked_divergence,
    divergence,
    kl_and_agreement,
    top_k,
)
from tuneutils.shared.logprobs import IGNORE_INDEX

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, nn

V, H, N = 37, 8, 11


def logits(seed: int, vocabulary: int = V, scale: float = 2.0, rows: int = N) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)


def torch_divergence(student: Tensor, teacher: Tensor, objective: Objective) -> Tensor:
    """By F.kl_div, which autograd differentiates."""
    t = objective.temperature
    log_q, log_p = F.log_softmax(student / t, -1), F.log_softmax(teacher / t, -1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(b, a, reduction="none", log_target=True).sum(-1)

    if objective.bare == "forward-kl":
        return t * t * kl(log_p, log_q)
    if objective.bare == "reverse-kl":
        return t * t * kl(log_q, log_p)
    if objective.bare == "uld":
        pairs = (x.softmax(-1).sort(-1, descending=True).values for x in (student / t, teacher / t))
        return torch.sub(*pairs).abs().sum(-1)
    m = (objective.beta * log_p.exp() + (1 - objective.beta) * log_q.exp()).log()
    return t * t * (objective.beta * kl(log_p, m) + (1 - objective.beta) * kl(log_q, m))


def with_gradient(student: Tensor, compute) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    leaf = student.detach().clone().requires_grad_()
    values = compute(leaf)
    weights = torch.linspace(1, 2, values.numel(), dtype=values.dtype).view_as(values)
    (grad,) = torch.autograd.grad((values * weights).sum(), leaf)
    return values.detach(), grad


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("kind", "beta"), [*((k, 0.3) for k in KINDS), ("jsd", 0.0), ("jsd", 1.0)])
def test_values_and_gradients_are_torchs(kind: str, beta: float, temperature: float) -> None:
    objective = Objective(kind, beta, temperature)  # type: ignore[arg-type]
    ours = with_gradient(logits(1), lambda x: divergence(x, logits(2), objective))
    theirs = with_gradient(logits(1), lambda x: torch_divergence(x, logits(2), objective))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_jsd_is_trls(beta: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    student, teacher = logits(1), logits(2)
    expected = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, reduction="sum")
    torch.testing.assert_close(divergence(student, teacher, Objective("jsd", beta)).sum(), expected)


def test_jsd_over_beta_tends_to_the_kls() -> None:
    student, teacher = logits(1), logits(2)
    forward, reverse = (divergence(student, teacher, Objective(k)) for k in ("forward-kl", "reverse-kl"))
    near = 1e-6
    torch.testing.assert_close(
        divergence(student, teacher, Objective("jsd", near)) / near, forward, rtol=1e-3, atol=0
    )
    torch.testing.assert_close(
        divergence(student, teacher, Objective("jsd", 1 - near)) / near, reverse, rtol=1e-3, atol=0
    )


def test_jsd_of_a_half_is_symmetric_and_bounded() -> None:
    objective = Objective("jsd", 0.5)
    one, other = divergence(logits(1), logits(2), objective), divergence(logits(2), logits(1), objective)
    torch.testing.assert_close(one, other)
    far = divergence(torch.tensor([[80.0, 0.0]]), torch.tensor([[0.0, 80.0]]), objective)
    torch.testing.assert_close(far, torch.tensor([math.log(2)]))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost_between_equals(kind: str) -> None:
    values, grad = with_gradient(logits(1), lambda x: divergence(x, logits(1), Objective(kind)))  # type: ignore[arg-type]
    assert values.abs().max() < 1e-15
    assert grad.abs().max() < 1e-15


def test_gradient_at_high_temperature_is_that_of_the_logits_squared_error() -> None:
    """Hinton et al. 2015, equation 4: for centred logits, (z - v) / V."""
    student, teacher = (x - x.mean(-1, keepdim=True) for x in (logits(1, V, 1.0), logits(2, V, 1.0)))
    cosines, sizes = [], []
    expected = (student - teacher) / V
    for temperature in (1.0, 4.0, 16.0, 64.0):
        leaf = student.clone().requires_grad_()
        divergence(leaf, teacher, Objective("forward-kl", temperature=temperature)).sum().backward()
        assert leaf.grad is not None
        cosines.append(F.cosine_similarity(leaf.grad.flatten(), expected.flatten(), dim=0).item())
        sizes.append((leaf.grad.norm() / expected.norm()).item())
    assert all(a < b for a, b in pairwise(cosines))
    assert cosines[-1] > 0.9999
    assert abs(sizes[-1] - 1) < 0.02


def test_uld_does_not_see_the_order_of_either_vocabulary() -> None:
    student, teacher = logits(1), logits(2)
    generator = torch.Generator().manual_seed(0)
    mixed = (x[:, torch.randperm(V, generator=generator)] for x in (student, teacher))
    objective = Objective("uld")
    torch.testing.assert_close(divergence(*mixed, objective), divergence(student, teacher, objective))


@pytest.mark.parametrize("other", [V - 9, V + 9])
def test_uld_fills_the_shorter_vocabulary_with_zeros(other: int) -> None:
    student, teacher = logits(1), logits(2, other)
    padded = [F.pad(x, (0, V + 9 - x.shape[1]), value=-math.inf) for x in (student, teacher)]
    values, grad = with_gradient(student, lambda x: divergence(x, teacher, Objective("uld")))
    expected, whole = with_gradient(padded[0], lambda x: torch_divergence(x, padded[1], Objective("uld")))
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(grad, whole[:, :V])


def coarse(student: Tensor, teacher: Tensor, k: int, objective: Objective) -> Tensor:
    """The divergence on the k likeliest tokens and "any other", by brute force."""
    t = objective.temperature
    ids = teacher.topk(k).indices
    outcomes = []
    for x in (student, teacher):
        probs = (x / t).softmax(-1)
        kept = probs.gather(-1, ids)
        outcomes.append(t * torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1).log())
    return torch_divergence(outcomes[0], outcomes[1], objective)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["forward-kl", "reverse-kl", "jsd"])
def test_top_k_compares_k_tokens_and_the_rest(kind: str, temperature: float) -> None:
    objective = Objective(kind, 0.3, temperature)  # type: ignore[arg-type]
    cached = top_k(logits(2), 5, temperature)
    ours = with_gradient(logits(1), lambda x: divergence(x, cached, objective))
    theirs = with_gradient(logits(1), lambda x: coarse(x, logits(2), 5, objective))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["forward-kl", "reverse-kl", "jsd"])
def test_top_k_bounds_the_divergence_from_below_and_grows_to_it(kind: str) -> None:
    objective = Objective(kind, 0.3)  # type: ignore[arg-type]
    whole = divergence(logits(1), logits(2), objective)
    bounds = [divergence(logits(1), top_k(logits(2), k), objective) for k in (1, 4, 16, V)]
    assert all(bool((a <= b + 1e-12).all()) for a, b in pairwise(bounds))
    torch.testing.assert_close(bounds[-1], whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_of_the_whole_vocabulary_is_the_teacher(kind: str) -> None:
    objective = Objective(kind, 0.3, 2.0)  # type: ignore[arg-type]
    cached = top_k(logits(2), V, 2.0)
    assert bool((cached.tail == -math.inf).all())
    ours = with_gradient(logits(1), lambda x: divergence(x, cached, objective))
    theirs = with_gradient(logits(1), lambda x: divergence(x, logits(2), objective))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_top_k_holds_all_of_the_probability() -> None:
    cached = top_k(logits(2), 5, 3.0)
    torch.testing.assert_close(
        cached.logprobs.exp().sum(-1) + cached.tail.exp(), torch.ones(N, dtype=torch.float64)
    )
    assert torch.equal(cached.ids[:, 0], logits(2).argmax(-1))


@pytest.mark.parametrize("source", ["logits", "head", "top-k"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_chunks_are_the_whole(kind: str, source: str, softcap: float | None) -> None:
    """Loss and gradients of hidden states, weight and bias, with labels left out, against autograd."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = random(2, N, H), random(V, H), random(V)
    labels = torch.randint(V, (2, N), generator=generator)
    labels[0, ::3] = IGNORE_INDEX
    kept = labels != IGNORE_INDEX
    head = nn.Linear(H + 1, V).double()
    teacher_hidden = random(int(kept.sum()), H + 1)
    teacher_logits = head(teacher_hidden).detach()
    objective = Objective(kind, 0.3, 2.0, ce_weight=0.4)  # type: ignore[arg-type]
    teacher = {
        "logits": LogitsTeacher(teacher_logits),
        "head": HeadTeacher(teacher_hidden, head),
        "top-k": top_k(teacher_logits, V, 2.0),
    }[source]
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    ours = chunked_divergence(
        leaves[0], leaves[1], labels, teacher, objective, bias=leaves[2], logit_softcap=softcap,
        logit_scale=0.7, chunk_tokens=4,
    )  # fmt: skip
    theirs_leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    whole = 0.7 * (theirs_leaves[0] @ theirs_leaves[1].T + theirs_leaves[2])
    whole = whole if softcap is None else softcap * torch.tanh(whole / softcap)
    theirs = torch_divergence(whole[kept], teacher_logits, objective).sum()
    theirs = theirs + 0.4 * F.cross_entropy(whole[kept], labels[kept], reduction="sum")
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, theirs_leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_chunked_is_trls_chunked_loss() -> None:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    generator = torch.Generator().manual_seed(5)
    student, teacher = (torch.randn(2, N, H, generator=generator) for _ in range(2))
    heads = [nn.Linear(H, V, bias=False) for _ in range(2)]
    mask = torch.rand(2, N, generator=generator) > 0.3
    labels = torch.where(mask, 1, IGNORE_INDEX)
    for beta in (0.0, 0.4, 1.0):
        expected, _, count = _chunked_divergence_loss(
            student, teacher, heads[0].weight, heads[1].weight, mask, beta, temperature=2.0
        )
        ours = chunked_divergence(
            student,
            heads[0].weight,
            labels,
            HeadTeacher(teacher[mask], heads[1]),
            Objective("jsd", beta, 2.0),
        )
        torch.testing.assert_close(ours / 4 / count, expected, rtol=1e-4, atol=1e-6)  # TRL has no T²


def test_half_precision_is_softened_in_float32() -> None:
    hidden, weight = logits(1, H, 1.0).bfloat16(), logits(2, H, 1.0, V).bfloat16()
    teacher = LogitsTeacher(logits(3).float())
    labels = torch.zeros(N, dtype=torch.long)
    low = chunked_divergence(hidden, weight, labels, teacher, Objective())
    high = torch_divergence((hidden @ weight.T).double(), logits(3), Objective()).sum()
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), high, rtol=1e-5, atol=0)


def test_without_labels_the_loss_is_zero_and_has_a_gradient() -> None:
    hidden = logits(1, H).requires_grad_()
    labels = torch.full((N,), IGNORE_INDEX)
    loss = chunked_divergence(hidden, logits(2, H, rows=V), labels, LogitsTeacher(logits(3)[:0]), Objective())
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_rows_that_do_not_go_together_are_refused() -> None:
    labels = torch.zeros(N, dtype=torch.long)
    with pytest.raises(ValueError, match="11 tokens count, the teacher has 4"):
        chunked_divergence(
            logits(1, H), logits(2, H, rows=V), labels, LogitsTeacher(logits(3)[:4]), Objective()
        )
    with pytest.raises(ValueError, match="teacher logits"):
        divergence(logits(1), logits(2, V + 1))


@pytest.mark.parametrize(
    "bad",
    [{"kind": "kl"}, {"beta": 1.1}, {"beta": math.nan}, {"temperature": 0.0}, {"temperature": math.nan}],
)
def test_objectives_that_make_no_sense_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Objective(**bad)  # type: ignore[arg-type]


def test_agreement_and_kl_of_known_distributions() -> None:
    reference = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]).log()
    model = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]]).log()
    kl, same = kl_and_agreement(model, reference)
    torch.testing.assert_close(
        kl, torch.tensor([0.25 * math.log(2), 0.4 * math.log(2) + 0.6 * math.log(0.75)])
    )
    assert same.tolist() == [False, True]
    bound, same_again = kl_and_agreement(model, top_k(reference, 1))
    assert bool((bound <= kl).all())
    assert torch.equal(same, same_again)


def test_a_tail_that_the_student_has_lost_does_not_break_the_gradient() -> None:
    student = torch.tensor([[200.0, 0.0, 0.0]])
    cached = TopK(torch.tensor([[0]]), torch.tensor([[-0.1]]), torch.tensor([math.log(1 - math.exp(-0.1))]))
    for kind in ("forward-kl", "reverse-kl", "jsd"):
        values, grad = with_gradient(student, lambda x, k=kind: divergence(x, cached, Objective(k)))
        assert bool(values.isfinite().all()), kind
        assert bool(grad.isfinite().all()), kind
        assert values.item() > 0.01, kind
