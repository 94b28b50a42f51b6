"""Whole models: the loss and the comparison against logits that the models give themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tuneutils.shared.divergences import Objective, top_k
from tuneutils.shared.divergences_model import (
    CALIBRATION_BINS,
    compare_models,
    distillation_loss,
    teacher_rows,
)
from tuneutils.shared.supervise import IGNORE, Encoded

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()


@pytest.fixture
def student(tiny_model: Path) -> Any:
    return load(tiny_model)


@pytest.fixture
def teacher(other_tiny_model: Path) -> Any:
    return load(other_tiny_model)


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(4, 380, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :5] = IGNORE
    labels[2, 9:] = IGNORE
    return ids, labels


def kl_of(model: Any, teacher: Any, ids: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    kept = labels[:, 1:] != IGNORE
    log_q, log_p = (
        F.log_softmax(m(input_ids=ids).logits[:, :-1][kept] / temperature, -1) for m in (model, teacher)
    )
    return temperature**2 * F.kl_div(log_q, log_p.detach(), reduction="sum", log_target=True)


@pytest.mark.parametrize("head", ["plain", "hooked"])
def test_loss_and_gradients_are_those_of_whole_logits(student: Any, teacher: Any, head: str) -> None:
    ids, labels = batch()
    objective = Objective(temperature=2.0, ce_weight=0.5)
    if head == "hooked":  # a head that is called, not multiplied by
        student.lm_head.register_forward_hook(lambda module, args, out: out)
    rows = teacher_rows(teacher, ids, None, labels)
    distillation_loss(student, ids, None, labels, rows, objective, chunk_tokens=5).backward()
    ours = {n: p.grad.clone() for n, p in student.named_parameters()}
    student.zero_grad()
    loss = kl_of(student, teacher, ids, labels, 2.0)
    logits = student(input_ids=ids).logits[:, :-1].flatten(0, 1)
    loss = loss + 0.5 * F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    loss.backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-5, atol=1e-6)


def test_a_cached_teacher_gives_the_same_loss(student: Any, teacher: Any) -> None:
    ids, labels = batch()
    rows = teacher_rows(teacher, ids, None, labels)
    cached = top_k(rows.chunk(slice(None)), 384)
    live = distillation_loss(student, ids, None, labels, rows, Objective())
    torch.testing.assert_close(distillation_loss(student, ids, None, labels, cached, Objective()), live)


def test_no_gradient_reaches_the_teacher(student: Any, teacher: Any) -> None:
    ids, labels = batch()
    rows = teacher_rows(teacher, ids, None, labels)
    distillation_loss(student, ids, None, labels, rows, Objective()).backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_comparison_by_sequence_matches_whole_logits(student: Any, teacher: Any) -> None:
    ids, labels = batch()
    sequences = [Encoded(i.tolist(), list(t)) for i, t in zip(ids, labels.tolist(), strict=True)]
    sequences[1] = Encoded(sequences[1].input_ids[:7], sequences[1].labels[:7])
    of_teacher, of_student = compare_models(
        teacher, [student], sequences, pad_id=1, batch_tokens=24, chunk_tokens=4
    )
    for sequence, base, ours in zip(sequences, of_teacher, of_student, strict=True):
        one, target = torch.tensor([sequence.input_ids]), torch.tensor([sequence.labels])
        kept = target[:, 1:] != IGNORE
        expected = kl_of(student, teacher, one, target)
        assert ours.kl == pytest.approx(expected.item(), rel=1e-9)
        top_t, top_s = (m(input_ids=one).logits[:, :-1].argmax(-1)[kept] for m in (teacher, student))
        assert ours.agree == int((top_t == top_s).sum())
        assert ours.correct == int((top_s == target[:, 1:][kept]).sum())
        assert ours.tokens == base.tokens == int(kept.sum())
        assert base.kl == 0
        assert base.agree == base.tokens
        confidence = student(input_ids=one).logits[:, :-1].softmax(-1).amax(-1)[kept]
        assert ours.bins[:, 0].sum() == ours.tokens
        assert ours.bins[:, 1].sum() == pytest.approx(confidence.sum().item())
        assert ours.bins[:, 2].sum() == ours.correct
        counts = torch.histc(confidence, CALIBRATION_BINS, 0, 1)
        assert ours.bins[:, 0].tolist() == counts.tolist()


def test_the_head_is_put_back(student: Any, teacher: Any) -> None:
    ids, labels = batch()
    teacher_rows(teacher, ids, None, labels)
    assert "forward" not in teacher.__dict__
    assert isinstance(teacher.lm_head, nn.Linear)
    assert teacher(input_ids=ids).logits.shape == (3, 12, 384)
