"""Divergences between a teacher's and a student's next-token distributions, in bounded memory.

As in ``logprobs``, a few hundred tokens are projected to the vocabulary at a time, and the student's gradient
is formed while both distributions are at hand. All divergences here have a gradient of one form,
``q_j (g_j - sum_i q_i g_i)`` in the student's logits, with ``q`` its probabilities.

The teacher is a row of logits for each token, or its ``k`` likeliest tokens with the mass of all others
(:class:`TopK`). Then both distributions are compared on ``k + 1`` outcomes, "any other token" being one: a
lower bound of the divergence (merging outcomes never raises an f-divergence; Csiszár and Shields 2004,
lemma 4.1) that is exact at ``k = V``. Renormalising the ``k`` tokens instead would teach the student that the
others are impossible.

Shapes: ``N`` tokens, ``V`` vocabulary size, ``H`` hidden size.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, Protocol

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
import torch.nn.functional as F  # isort: skip
from torch import Tensor, nn  # isort: skip

from tuneutils.shared.logprobs import (
    IGNORE_INDEX,
    HeadGradients,
    LogitTransform,
    accumulation_dtype,
    autocast_inputs,
    default_chunk_tokens,
    kept_rows,
    raw_logits,
    refuse_second_derivative,
)

Kind = Literal["forward-kl", "reverse-kl", "jsd", "uld"]
KINDS: tuple[Kind, ...] = ("forward-kl", "reverse-kl", "jsd", "uld")


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a student is taught, token by token: ``divergence + ce_weight * (-log q(label))``.

    Of the teacher's ``p`` and the student's ``q``, ``forward-kl`` is KL(p ‖ q) and ``reverse-kl`` KL(q ‖ p).
    ``jsd`` is ``beta KL(p ‖ m) + (1 - beta) KL(q ‖ m)`` with ``m = beta p + (1 - beta) q`` (Agarwal et al.
    2024, arXiv 2306.13649, equation 1): divided by ``beta`` it tends to the forward KL at 0, divided by
    ``1 - beta`` to the reverse at 1; at exactly 0 and 1 it is taken to be those. ``uld`` is the sum of
    ``|p_(i) - q_(i)|`` over probabilities sorted by size (Boizard et al. 2024, arXiv 2402.12030, equation
    5), for which the vocabularies need not agree.

    Args:
        temperature: divides the logits of both inside the divergence, which is multiplied by its square, so
            that gradients keep their size (Hinton et al. 2015, arXiv 1503.02531, section 2.1); ``uld`` is
            not multiplied, as in its paper.
        ce_weight: weight of the labels' cross-entropy, at temperature 1.
    """

    kind: Kind = "forward-kl"
    beta: float = 0.5
    temperature: float = 1.0
    ce_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, is {self.kind!r}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be from 0 to 1, is {self.beta}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, is {self.temperature}")

    @property
    def bare(self) -> Kind:
        """The kind that is computed: a ``jsd`` of beta 0 or 1 is a KL."""
        if self.kind == "jsd" and self.beta in (0.0, 1.0):
            return "reverse-kl" if self.beta else "forward-kl"
        return self.kind


@dataclasses.dataclass(frozen=True)
class TopK:
    """A teacher's likeliest tokens at one temperature.

    Attributes:
        ids: ``(N, k)`` tokens, the likeliest first.
        logprobs: ``(N, k)`` their log-probabilities.
        tail: ``(N,)`` log of all other tokens' probability; -inf for none.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def chunk(self, rows: slice) -> TopK:
        return TopK(self.ids[rows], self.logprobs[rows], self.tail[rows])


class Teacher(Protocol):
    """A row of logits ``(n, V)`` at temperature 1, or a :class:`TopK`, for any slice of its ``N`` tokens."""

    def __len__(self) -> int: ...
    def chunk(self, rows: slice) -> Tensor | TopK: ...


@dataclasses.dataclass(frozen=True)
class LogitsTeacher:
    """A teacher whose logits ``(N, V)`` are held whole."""

    logits: Tensor

    def __len__(self) -> int:
        return len(self.logits)

    def chunk(self, rows: slice) -> Tensor:
        return self.logits[rows]


@dataclasses.dataclass(frozen=True)
class HeadTeacher:
    """A teacher's hidden states ``(N, H)``, projected by its own head when their turn comes."""

    hidden: Tensor
    head: nn.Module
    transform: LogitTransform = LogitTransform()  # noqa: RUF009 - frozen

    def __len__(self) -> int:
        return len(self.hidden)

    def chunk(self, rows: slice) -> Tensor:
        with torch.no_grad():
            raw = self.head(self.hidden[rows])
            return self.transform.apply(raw.to(accumulation_dtype(raw.dtype)))[0]


@torch.no_grad()
def top_k(logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The ``k`` likeliest tokens of each row of ``logits`` ``(N, V)``, softened by ``temperature``."""
    logits = logits.to(accumulation_dtype(logits.dtype)) / temperature
    values, ids = logits.topk(min(k, logits.shape[-1]))
    total = logits.logsumexp(-1, keepdim=True)
    rest = logits.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return TopK(ids, values - total, (rest - total)[:, 0])


def divergence(logits: Tensor, teacher: Tensor | TopK, objective: Objective | None = None) -> Tensor:
    """The divergence ``(...)`` of each row of student logits ``(..., V)``; differentiable once in those.

    Args:
        teacher: logits ``(..., V)``, or of ``N`` rows in the flat order; no gradient flows to them.
    """
    objective = objective or Objective()
    rows = logits.reshape(-1, logits.shape[-1])
    if isinstance(teacher, Tensor):
        teacher = teacher.reshape(-1, teacher.shape[-1])
    values: Tensor = _Divergence.apply(rows, teacher, objective)  # type: ignore[no-untyped-call]
    return values.reshape(logits.shape[:-1])


def chunked_divergence(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: Teacher,
    objective: Objective,
    *,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_tokens: int | None = None,
) -> Tensor:
    """The objective summed over labelled tokens, of a student's hidden states and head.

    Differentiable once, in ``hidden``, ``weight`` and ``bias``. The softmax is in float32 or wider.

    Args:
        hidden: ``(..., H)``; ``labels[i]`` is the token after ``hidden[i]``.
        labels: ``(...)``; where it is ``ignore_index`` the token does not count.
        teacher: of the ``N`` tokens that count, in the flat order.
        chunk_tokens: tokens projected at once; by default those that fill a fixed byte budget.

    Raises:
        ValueError: the teacher has rows for another number of tokens.
    """
    rows, targets, _ = kept_rows(hidden, labels, ignore_index)
    if len(targets) != len(teacher):
        raise ValueError(f"{len(targets)} tokens count, the teacher has {len(teacher)}")
    rows, weight, bias = autocast_inputs(rows, weight, bias)
    transform = LogitTransform(logit_scale, logit_softcap)
    chunk = default_chunk_tokens(weight.shape[0], hidden.device) if chunk_tokens is None else chunk_tokens
    options = _Options(objective, transform, max(1, chunk), torch.is_grad_enabled())
    with torch.autocast(hidden.device.type, enabled=False):
        total: Tensor = _DivergenceSum.apply(rows, weight, bias, targets, teacher, options)  # type: ignore[no-untyped-call]
    return total


@torch.no_grad()
def kl_and_agreement(logits: Tensor, reference: Tensor | TopK) -> tuple[Tensor, Tensor]:
    """KL(reference ‖ model) in nats and whether the likeliest token is the same, both ``(N,)``.

    Args:
        logits: ``(N, V)`` of the model that is judged.
        reference: logits ``(N, V)``, or a :class:`TopK` at temperature 1 (then the KL is a lower bound).
    """
    logits = logits.to(accumulation_dtype(logits.dtype))
    top = reference.ids[:, 0] if isinstance(reference, TopK) else reference.argmax(-1)
    values, _ = _evaluate(logits, reference, Objective(), False)
    return values, logits.argmax(-1) == top


@dataclasses.dataclass(frozen=True)
class _Options:
    objective: Objective
    transform: LogitTransform
    chunk_tokens: int
    grad_enabled: bool


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor | TopK, objective: Objective) -> Tensor:
        wide = logits.to(accumulation_dtype(logits.dtype))
        values, grad = _evaluate(wide, teacher, objective, ctx.needs_input_grad[0])
        if grad is not None:
            ctx.save_for_backward(grad.to(logits.dtype))
        return values

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        (grad,) = ctx.saved_tensors
        return grad * grad_values[:, None].to(grad.dtype), None, None


class _DivergenceSum(torch.autograd.Function):
    """Sum of the objective over tokens; the gradients are formed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        teacher: Teacher,
        options: _Options,
    ) -> Tensor:
        needs = tuple(ctx.needs_input_grad[:3])
        wants = options.grad_enabled and any(needs)
        gradients = HeadGradients(hidden, weight, bias, needs) if wants else None
        total = hidden.new_zeros((), dtype=accumulation_dtype(hidden.dtype))
        for start in range(0, len(labels), options.chunk_tokens):
            rows = slice(start, start + options.chunk_tokens)
            logits, tanh = options.transform.apply(raw_logits(hidden[rows], weight, bias))
            values, grad = _with_labels(logits, labels[rows], teacher.chunk(rows), options.objective, wants)
            total += values.sum()
            if gradients is not None:
                assert grad is not None
                gradients.add(rows, options.transform.backward(grad, tanh), hidden[rows], weight)
            del logits, grad, tanh  # else they live on beside the next chunk's
        ctx.gradients, ctx.weight_dtype = gradients, weight
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the chunked divergence can be differentiated once; compute it again")
        for buffer in (gradients.hidden, gradients.weight, gradients.bias):
            if buffer is not None:
                buffer.mul_(grad_total)
        return (*gradients.cast(ctx.weight_dtype), None, None, None)


def _with_labels(
    logits: Tensor, labels: Tensor, teacher: Tensor | TopK, objective: Objective, wants: bool
) -> tuple[Tensor, Tensor | None]:
    values, grad = _evaluate(logits, teacher, objective, wants)
    if objective.ce_weight:
        log_q = F.log_softmax(logits, -1)
        values = values - objective.ce_weight * log_q.gather(-1, labels[:, None])[:, 0]
        if grad is not None:
            grad.add_(log_q.exp_(), alpha=objective.ce_weight)
            grad.scatter_add_(-1, labels[:, None], grad.new_full((len(labels), 1), -objective.ce_weight))
    return values, grad


def _evaluate(
    logits: Tensor, teacher: Tensor | TopK, objective: Objective, wants: bool
) -> tuple[Tensor, Tensor | None]:
    """Divergences ``(n,)``, times T², and their gradient ``(n, V)`` in ``logits``, which are kept."""
    temperature = objective.temperature
    softened = logits / temperature if temperature != 1.0 else logits
    if isinstance(teacher, Tensor) and temperature != 1.0:
        teacher = teacher / temperature
    if objective.bare == "uld":
        values, grad = _sorted_distance(softened, teacher, wants)
        scale = 1.0
    else:
        if isinstance(teacher, Tensor) and teacher.shape != logits.shape:
            raise ValueError(f"teacher logits {tuple(teacher.shape)}, student logits {tuple(logits.shape)}")
        log_q = F.log_softmax(softened, -1)
        if isinstance(teacher, TopK) and objective.bare == "forward-kl":
            values, grad = _forward_kl_top_k(log_q, teacher, wants)
        else:
            log_p = _filled(log_q, teacher) if isinstance(teacher, TopK) else _log_softmax(teacher, log_q)
            values, grad = _F_DIVERGENCES[objective.bare](log_q, log_p, objective.beta, wants)
        scale = temperature * temperature
    if scale != 1.0:
        values = values * scale
    if grad is not None and scale != temperature:
        grad.mul_(scale / temperature)
    return values, grad


def _log_softmax(logits: Tensor, like: Tensor) -> Tensor:
    return F.log_softmax(logits.to(like.dtype), -1)


def _forward_kl(log_q: Tensor, log_p: Tensor, _: float, wants: bool) -> tuple[Tensor, Tensor | None]:
    p = log_p.exp()
    values = torch.linalg.vecdot(p, log_p.sub_(log_q))
    return values, log_q.exp_().sub_(p) if wants else None


def _reverse_kl(log_q: Tensor, log_p: Tensor, _: float, wants: bool) -> tuple[Tensor, Tensor | None]:
    ratio = torch.sub(log_q, log_p, out=log_p)
    q = log_q.exp_()
    values = torch.linalg.vecdot(q, ratio)
    return values, ratio.sub_(values[:, None]).mul_(q) if wants else None


def _jsd(log_q: Tensor, log_p: Tensor, beta: float, wants: bool) -> tuple[Tensor, Tensor | None]:
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    p, q = log_p.exp(), log_q.exp()
    of_p = torch.linalg.vecdot(p, log_p.sub_(log_m))
    ratio = log_q.sub_(log_m)
    of_q = torch.linalg.vecdot(q, ratio)
    grad = ratio.sub_(of_q[:, None]).mul_(q).mul_(1 - beta) if wants else None
    return beta * of_p + (1 - beta) * of_q, grad


_F_DIVERGENCES = {"forward-kl": _forward_kl, "reverse-kl": _reverse_kl, "jsd": _jsd}


def _forward_kl_top_k(log_q: Tensor, teacher: TopK, wants: bool) -> tuple[Tensor, Tensor | None]:
    """The KL on ``k + 1`` outcomes. The tail's part of the gradient is q_j (1 - p_tail / q_tail)."""
    of_k = log_q.gather(-1, teacher.ids)
    log_p = teacher.logprobs.to(log_q.dtype)
    q = log_q.exp_()
    q_tail = q.scatter_(-1, teacher.ids, 0.0).sum(-1).clamp_(min=torch.finfo(q.dtype).tiny)
    log_p_tail = teacher.tail.to(q.dtype)
    p, p_tail = log_p.exp(), log_p_tail.exp()
    of_tail = torch.where(p_tail > 0, p_tail * (log_p_tail - q_tail.log()), 0.0)
    values = torch.linalg.vecdot(p, log_p - of_k) + of_tail
    if not wants:
        return values, None
    factor = 1 - p_tail / q_tail
    return values, q.mul_(factor[:, None]).scatter_(-1, teacher.ids, of_k.exp() - p)


def _filled(log_q: Tensor, teacher: TopK) -> Tensor:
    """The teacher's log-probabilities ``(n, V)``, its tail spread as the student spreads its own.

    Each token of the tail then has one ratio p / q, that of the tails, so that any f-divergence, and its
    gradient, are those of the ``k + 1`` outcomes.
    """
    log_q_tail = log_q.scatter(-1, teacher.ids, -math.inf).logsumexp(-1)
    ratio = teacher.tail.to(log_q.dtype) - log_q_tail  # no tail at all on both sides: nan, and overwritten
    filled = log_q + ratio.nan_to_num(nan=0.0, neginf=-1e4)[:, None]
    return filled.scatter_(-1, teacher.ids, teacher.logprobs.to(log_q.dtype))


def _sorted_distance(logits: Tensor, teacher: Tensor | TopK, wants: bool) -> tuple[Tensor, Tensor | None]:
    """Sum of |p_(i) - q_(i)|, the shorter vocabulary filled up with zeros; a tail counts as one more pair."""
    q = logits.softmax(-1)
    if isinstance(teacher, TopK):
        p, tail = teacher.logprobs.to(q.dtype).exp(), teacher.tail.to(q.dtype).exp()
    else:
        p, tail = teacher.to(q.dtype).softmax(-1).sort(-1, descending=True).values, None
    size = min(p.shape[-1], q.shape[-1])
    top, ids = q.topk(size) if isinstance(teacher, TopK) else q.sort(-1, descending=True)
    difference = top[:, :size] - p[:, :size]
    values = difference.abs().sum(-1)
    if tail is not None:
        rest = 1 - top.sum(-1) - tail
        values = values + rest.abs()
        sign = torch.sign(rest)[:, None].expand_as(q).contiguous()
    else:
        values = values + p[:, size:].sum(-1) + top[:, size:].sum(-1)
        sign = torch.ones_like(q)
    if not wants:
        return values, None
    sign.scatter_(-1, ids[:, :size], difference.sign_())
    mean = torch.linalg.vecdot(q, sign)
    return values, sign.sub_(mean[:, None]).mul_(q)
