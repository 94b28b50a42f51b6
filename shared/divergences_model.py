"""Teacher and student as whole models: the distillation loss of a batch, and how far two models are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
import torch.nn.functional as F  # isort: skip
from torch import Tensor, nn  # isort: skip
from torch.utils.checkpoint import checkpoint  # isort: skip

from tuneutils.shared.divergences import (
    HeadTeacher,
    Objective,
    Teacher,
    chunked_divergence,
    divergence,
    kl_and_agreement,
)
from tuneutils.shared.logprobs import (
    IGNORE_INDEX,
    LogitTransform,
    accumulation_dtype,
    default_chunk_tokens,
    kept_rows,
)
from tuneutils.shared.logprobs_model import plain_linear, run_head
from tuneutils.shared.supervise import Encoded

#: Bins of the expected calibration error (Guo et al. 2017, arXiv 1706.04599, section 2).
CALIBRATION_BINS = 15
BATCH_TOKENS = 4096


@torch.no_grad()
def teacher_rows(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor
) -> HeadTeacher:
    """What a model makes of the labelled tokens: its hidden states ``(N, H)`` and head.

    Arguments as of ``logprobs_model.causal_nll``; ``N`` tokens count, in the flat order.
    """

    def compute(hidden: Tensor, targets: Tensor, head: nn.Module, transform: LogitTransform) -> Any:
        rows, _, _ = kept_rows(hidden, targets, IGNORE_INDEX)
        return HeadTeacher(rows, head, transform)

    return cast(HeadTeacher, run_head(model, input_ids, attention_mask, labels, None, compute))


def distillation_loss(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    teacher: Teacher,
    objective: Objective,
    *,
    chunk_tokens: int | None = None,
) -> Tensor:
    """The objective summed over the labelled tokens of a student's batch; differentiable once.

    Other arguments as of ``logprobs_model.causal_nll``. A head that is more than a linear layer (fake
    quantized, adapted) is called chunk by chunk, and again in the backward pass.

    Args:
        teacher: of the tokens that count, such as :func:`teacher_rows` gives for the same batch.
    """

    def compute(hidden: Tensor, targets: Tensor, head: nn.Module, transform: LogitTransform) -> Tensor:
        linear = plain_linear(head)
        if linear is None:
            return _checkpointed(hidden, head, targets, transform, teacher, objective, chunk_tokens)
        return chunked_divergence(
            hidden,
            linear.weight,
            targets,
            teacher,
            objective,
            bias=linear.bias,
            logit_softcap=transform.softcap,
            logit_scale=transform.scale,
            chunk_tokens=chunk_tokens,
        )

    return cast(Tensor, run_head(model, input_ids, attention_mask, labels, None, compute))


def _checkpointed(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    transform: LogitTransform,
    teacher: Teacher,
    objective: Objective,
    chunk_tokens: int | None,
) -> Tensor:
    def chunk(rows: Tensor, labels: Tensor, piece: slice) -> Tensor:
        raw = head(rows)
        logits = transform(raw.to(accumulation_dtype(raw.dtype)))
        values = divergence(logits, teacher.chunk(piece), objective)
        if objective.ce_weight:
            values = values + objective.ce_weight * F.cross_entropy(logits, labels, reduction="none")
        return values.sum()

    rows, labels, _ = kept_rows(hidden, targets, IGNORE_INDEX)
    if len(labels) != len(teacher):
        raise ValueError(f"{len(labels)} tokens count, the teacher has {len(teacher)}")
    size = chunk_tokens or max(16, default_chunk_tokens(1 << 17, hidden.device) // 4)
    total = hidden.sum() * 0.0
    for start in range(0, len(labels), size):
        piece = slice(start, start + size)
        total = total + checkpoint(chunk, rows[piece], labels[piece], piece, use_reentrant=False)
    return total


@dataclass(frozen=True)
class Comparison:
    """One model on one sequence, beside a reference; sums over the sequence's labelled tokens.

    Attributes:
        kl: KL(reference ‖ model), in nats.
        agree: tokens whose likeliest prediction is the reference's.
        correct: tokens whose likeliest prediction is the label.
        nll: negative log-likelihood of the labels, in nats.
        bins: ``(CALIBRATION_BINS, 3)`` by confidence of the likeliest prediction: tokens, summed
            confidence, how many were right.
    """

    tokens: int
    kl: float
    agree: int
    correct: int
    nll: float
    bins: NDArray[np.float64]


def compare_models(
    reference: nn.Module,
    models: Sequence[nn.Module],
    sequences: Sequence[Encoded],
    *,
    pad_id: int,
    batch_tokens: int = BATCH_TOKENS,
    chunk_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[list[Comparison]]:
    """The reference and each model on each sequence: ``[reference, *models][i]`` is ``result[i]``.

    The models must share the reference's vocabulary; no two logits of the whole batch are ever held.

    Args:
        pad_id: any token; padding is on the right and not scored.
        batch_tokens: padded tokens of one forward pass.
    """
    found: list[list[Comparison | None]] = [[None] * len(sequences) for _ in (reference, *models)]
    for batch in _batches(sequences, batch_tokens):
        ids, labels = _padded([sequences[i] for i in batch], pad_id, next(reference.parameters()).device)
        for made, results in zip(
            _compare_batch([reference, *models], ids, labels, chunk_tokens), found, strict=True
        ):
            for i, comparison in zip(batch, made, strict=True):
                results[i] = comparison
        if progress is not None:
            progress(len(batch))
    return [[c for c in results if c is not None] for results in found]


def _batches(sequences: Sequence[Encoded], batch_tokens: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), i)):
        if batch and len(sequences[batch[0]]) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _padded(batch: Sequence[Encoded], pad_id: int, where: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(len(s) for s in batch)
    ids = torch.full((len(batch), longest), pad_id)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row, sequence in enumerate(batch):
        ids[row, : len(sequence)] = torch.tensor(sequence.input_ids)
        labels[row, : len(sequence)] = torch.tensor(sequence.labels)
    labels[:, 0] = IGNORE_INDEX
    return ids.to(where), labels.to(where)


@torch.inference_mode()
def _compare_batch(
    models: Sequence[nn.Module], ids: Tensor, labels: Tensor, chunk_tokens: int | None
) -> list[list[Comparison]]:
    counts = (labels != IGNORE_INDEX).sum(1).tolist()
    targets = labels[labels != IGNORE_INDEX]
    teachers = [teacher_rows(model, ids, None, labels) for model in models]
    columns: list[list[Tensor]] = [[] for _ in models]
    size = chunk_tokens or default_chunk_tokens(_width(teachers[0]), ids.device)
    for start in range(0, len(targets), size):
        rows = slice(start, start + size)
        reference = teachers[0].chunk(rows)
        for column, teacher in zip(columns, teachers, strict=True):
            logits = reference if teacher is teachers[0] else teacher.chunk(rows)
            column.append(_token_columns(logits, reference, targets[rows]))
    return [_by_sequence(torch.cat(column).double().cpu(), counts) for column in columns]


def _width(teacher: HeadTeacher) -> int:
    return int(getattr(teacher.head, "out_features", 1 << 17))


def _token_columns(logits: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    """``(n, 5)``: KL, agreement, right, negative log-likelihood, confidence."""
    kl, agree = kl_and_agreement(logits, reference)
    log_softmax = logits.log_softmax(-1)
    confidence, likeliest = log_softmax.max(-1)
    nll = -log_softmax.gather(-1, labels[:, None])[:, 0]
    return torch.stack([kl, agree.to(kl), (likeliest == labels).to(kl), nll, confidence.exp()], 1)


def _by_sequence(columns: Tensor, counts: Sequence[int]) -> list[Comparison]:
    made = []
    for part in torch.split(columns, list(counts)):
        kl, agree, correct, nll, _ = part.sum(0).tolist()
        made.append(Comparison(len(part), kl, int(agree), int(correct), nll, _bins(part.numpy())))
    return made


def _bins(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    confidence, correct = columns[:, 4], columns[:, 2]
    index = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    sums = np.zeros((CALIBRATION_BINS, 3))
    np.add.at(sums, index, np.stack([np.ones_like(confidence), confidence, correct], 1))
    return sums
