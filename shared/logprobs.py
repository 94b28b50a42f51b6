"""Cross-entropy and log-probabilities of a language model that never hold batch x time x vocabulary.

The output projection and the softmax are done for a few hundred tokens at a time, and the gradient of
each chunk is formed while its logits are at hand (Liger Kernel, arXiv 2410.10989, section 3.2; Cut
Cross-Entropy, arXiv 2411.09009). Tokens whose label is ignored are dropped before the projection.

Shapes: ``H`` hidden size, ``V`` vocabulary size, ``(...)`` any leading shape, usually ``(B, T)``.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
Reduction = Literal["sum", "mean", "none"]


@dataclasses.dataclass(frozen=True)
class LogitTransform:
    """What follows the output projection: ``softcap * tanh(scale * x / softcap) / temperature``.

    Args:
        scale: factor of the projection's output (Cohere ``logit_scale``, 1 / Granite ``logits_scaling``).
        softcap: Gemma 2's ``final_logit_softcapping``; None for none.
        temperature: the divisor used in sampling.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")

    def __call__(self, logits: Tensor) -> Tensor:
        """Transformed logits, out of place and differentiable."""
        logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits / self.temperature

    def apply(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Transformed logits (in place where it can), and the tanh that the derivative needs."""
        tanh = None
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        if self.softcap is not None:
            tanh = logits.div_(self.softcap).tanh_()
            logits = tanh * self.softcap
        if self.temperature != 1.0:
            logits = logits.div_(self.temperature)
        return logits, tanh

    def backward(self, grad: Tensor, tanh: Tensor | None) -> Tensor:
        """Gradient of the projection's output from that of the transformed logits, in place."""
        if tanh is not None:
            grad = grad.addcmul_(grad * tanh, tanh, value=-1.0)
        factor = self.scale / self.temperature
        return grad if factor == 1.0 else grad.mul_(factor)


def default_chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """Tokens whose fp32 logits fill 32 MiB on CPU (about the caches of two cores) or 512 MiB on a GPU."""
    budget_bytes = (32 if device.type == "cpu" else 512) << 20
    return max(16, budget_bytes // (4 * vocab_size))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _chunk(
    raw_logits: Tensor,
    labels: Tensor,
    transform: LogitTransform,
    with_entropy: bool,
    grad_logprobs: Tensor | None = None,
    grad_entropy: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probabilities ``(n,)`` and entropies ``(n,)`` of ``(n, V)`` raw logits, and their gradient.

    The logits' memory is reused for the gradient ``(n, V)``, which is formed when ``grad_logprobs`` is given.
    """
    logits, tanh = transform.apply(raw_logits)
    logits = logits.sub_(logits.amax(-1, keepdim=True))
    target = logits.gather(-1, labels[:, None])
    keep_logits = with_entropy or grad_entropy is not None
    exp = logits.exp() if keep_logits else logits.exp_()
    total = exp.sum(-1, keepdim=True)
    log_total = total.log()
    logprobs = (target - log_total)[:, 0]
    entropy = None
    if keep_logits:
        entropy = log_total[:, 0] - torch.linalg.vecdot(exp, logits) / total[:, 0]
    if grad_logprobs is None:
        return logprobs, entropy, None
    g = grad_logprobs[:, None]
    if grad_entropy is None:  # d logp_y / dz_j = 1[j = y] - p_j
        grad = exp.mul_(-g / total)
    else:  # d entropy / dz_j = -p_j (log p_j + entropy)
        assert entropy is not None
        h = grad_entropy[:, None]
        grad = logits.add_(entropy[:, None] - log_total).mul_(h).add_(g).mul_(exp).div_(-total)
    grad = grad.scatter_add_(-1, labels[:, None], g)
    return logprobs, entropy, transform.backward(grad, tanh)


@dataclasses.dataclass(frozen=True)
class _Options:
    transform: LogitTransform
    chunk_tokens: int
    grad_enabled: bool
    with_entropy: bool = False


class HeadGradients:
    """Buffers of the gradients that are asked for, filled chunk by chunk."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]
    ) -> None:
        dtype = accumulation_dtype(weight.dtype)
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        self.weight = torch.zeros_like(weight, dtype=dtype) if needs[1] else None
        self.bias = torch.zeros_like(bias, dtype=dtype) if needs[2] and bias is not None else None

    def add(self, rows: slice, grad_logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
        if self.bias is not None:
            self.bias += grad_logits.sum(0)
        grad = grad_logits.to(weight.dtype)
        if self.hidden is not None:
            torch.mm(grad, weight, out=self.hidden[rows])
        if self.weight is not None:
            if self.weight.dtype == weight.dtype:
                self.weight.addmm_(grad.T, hidden)
            else:  # one rounding for each chunk's product, none for their sum
                self.weight += grad.T @ hidden

    def cast(self, weight: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        grad_weight = None if self.weight is None else self.weight.to(weight.dtype)
        grad_bias = None if self.bias is None else self.bias.to(weight.dtype)
        return self.hidden, grad_weight, grad_bias


def raw_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``hidden @ weight.T + bias`` in the precision in which the softmax is taken."""
    logits = F.linear(hidden, weight, bias)
    return logits.to(accumulation_dtype(logits.dtype))


def _backward_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    options: _Options,
    needs: tuple[bool, bool, bool],
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
) -> tuple[Tensor, HeadGradients]:
    """Log-probabilities ``(N,)`` and the gradients of ``sum(grad_logprobs * logprobs) + ...``."""
    gradients = HeadGradients(hidden, weight, bias, needs)
    logprobs = torch.empty_like(grad_logprobs)
    for start in range(0, len(labels), options.chunk_tokens):
        rows = slice(start, start + options.chunk_tokens)
        logits = raw_logits(hidden[rows], weight, bias)
        entropy_rows = None if grad_entropy is None else grad_entropy[rows]
        logprobs[rows], _, grad = _chunk(
            logits, labels[rows], options.transform, False, grad_logprobs[rows], entropy_rows
        )
        assert grad is not None
        gradients.add(rows, grad, hidden[rows], weight)
        del logits, grad  # else they live on beside the next chunk's
    return logprobs, gradients


def refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # within backward: create_graph=True
        raise RuntimeError(
            "the chunked loss is differentiable once; use F.cross_entropy with create_graph=True"
        )


class _NllSum(torch.autograd.Function):
    """Sum of negative log-likelihoods; the gradients are formed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: _Options
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.options = options
        ctx.gradients = None
        needs = tuple(ctx.needs_input_grad[:3])
        minus_one = hidden.new_full((len(labels),), -1.0, dtype=accumulation_dtype(hidden.dtype))
        if options.grad_enabled and any(needs):
            logprobs, ctx.gradients = _backward_chunks(
                hidden, weight, bias, labels, options, needs, minus_one, None
            )
        else:
            logprobs, _ = _forward_chunks(hidden, weight, bias, labels, options)
        return -logprobs.sum()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        hidden, weight, bias, labels = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # a second backward under retain_graph: the first took the buffers
            grad_logprobs = -grad_loss.to(accumulation_dtype(hidden.dtype)).expand(len(labels))
            _, gradients = _backward_chunks(
                hidden,
                weight,
                bias,
                labels,
                ctx.options,
                tuple(ctx.needs_input_grad[:3]),
                grad_logprobs,
                None,
            )
        else:
            for buffer in (gradients.hidden, gradients.weight, gradients.bias):
                if buffer is not None:
                    buffer.mul_(grad_loss)
        return (*gradients.cast(weight), None, None)


def _forward_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: _Options
) -> tuple[Tensor, Tensor | None]:
    dtype = accumulation_dtype(hidden.dtype)
    logprobs = hidden.new_empty(len(labels), dtype=dtype)
    entropy = torch.empty_like(logprobs) if options.with_entropy else None
    for start in range(0, len(labels), options.chunk_tokens):
        rows = slice(start, start + options.chunk_tokens)
        logits = raw_logits(hidden[rows], weight, bias)
        logprobs[rows], chunk_entropy, _ = _chunk(
            logits, labels[rows], options.transform, options.with_entropy
        )
        del logits
        if entropy is not None and chunk_entropy is not None:
            entropy[rows] = chunk_entropy
    return logprobs, entropy


class _TokenLogprobs(torch.autograd.Function):
    """Per-token log-probabilities (and entropies); the logits are formed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return _forward_chunks(hidden, weight, bias, labels, options)

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        hidden, weight, bias, labels = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = hidden.new_zeros(len(labels), dtype=accumulation_dtype(hidden.dtype))
        needs = tuple(ctx.needs_input_grad[:3])
        _, gradients = _backward_chunks(
            hidden, weight, bias, labels, ctx.options, needs, grad_logprobs, grad_entropy
        )
        return (*gradients.cast(weight), None, None)


def autocast_inputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The dtype that ``F.linear`` would compute in: autocast's, else the weight's."""
    device_type = hidden.device.type
    dtype = weight.dtype
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _check_shapes(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != weight.shape[-1] or weight.dim() != 2:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} does not go with weight {tuple(weight.shape)} "
            f"and labels {tuple(labels.shape)}"
        )


def kept_rows(hidden: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``(N, H)`` and labels ``(N,)`` that count, and their positions ``(N,)`` in the flat order."""
    flat = labels.reshape(-1)
    kept = (flat != ignore_index).nonzero()[:, 0]
    rows = hidden.reshape(-1, hidden.shape[-1])
    if len(kept) == len(flat):
        return rows, flat, kept
    return rows.index_select(0, kept), flat.index_select(0, kept), kept


def _options(
    hidden: Tensor, weight: Tensor, transform: LogitTransform, chunk_tokens: int | None, with_entropy: bool
) -> _Options:
    chunk = default_chunk_tokens(weight.shape[0], hidden.device) if chunk_tokens is None else chunk_tokens
    return _Options(transform, max(1, chunk), torch.is_grad_enabled(), with_entropy)


def scatter_rows(values: Tensor, kept: Tensor, shape: torch.Size) -> Tensor:
    """``values`` at the flat positions ``kept`` of zeros of ``shape``."""
    return values.new_zeros(shape.numel()).index_copy(0, kept, values).reshape(shape)


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: Reduction = "mean",
    num_items: int | Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> Tensor:
    """``F.cross_entropy(transform(hidden @ weight.T + bias), labels)`` in bounded memory.

    Differentiable once, in ``hidden``, ``weight`` and ``bias``; a second derivative raises ``RuntimeError``.
    The softmax is in fp32 for half-precision inputs. Without any label the loss is 0, with zero gradients.

    Args:
        hidden: ``(..., H)``; ``labels[i]`` is the target of ``hidden[i]`` (already shifted).
        weight: ``(V, H)``.
        labels: ``(...)``, int64.
        bias: ``(V,)``.
        reduction: ``"none"`` gives ``(...)`` negative log-likelihoods, 0 where ignored.
        num_items: what ``"mean"`` divides by; by default the number of labels that are not ignored.
        chunk_tokens: tokens projected at once; by default those that fill a fixed byte budget.

    Raises:
        ValueError: on shapes that do not go together.
    """
    if reduction == "none":
        return -token_logprobs(
            hidden,
            weight,
            labels,
            bias=bias,
            ignore_index=ignore_index,
            logit_softcap=logit_softcap,
            logit_scale=logit_scale,
            temperature=temperature,
            chunk_tokens=chunk_tokens,
        )
    _check_shapes(hidden, weight, labels)
    rows, targets, _ = kept_rows(hidden, labels, ignore_index)
    rows, weight, bias = autocast_inputs(rows, weight, bias)
    transform = LogitTransform(logit_scale, logit_softcap, temperature)
    options = _options(hidden, weight, transform, chunk_tokens, False)
    with torch.autocast(hidden.device.type, enabled=False):
        total: Tensor = _NllSum.apply(rows, weight, bias, targets, options)  # type: ignore[no-untyped-call]
    if reduction == "sum":
        return total
    return total / (max(len(targets), 1) if num_items is None else num_items)


class ProjectionOptions(TypedDict, total=False):
    """Keyword arguments of :func:`token_logprobs`, as in :func:`chunked_cross_entropy`."""

    bias: Tensor | None
    ignore_index: int
    logit_softcap: float | None
    logit_scale: float
    temperature: float
    chunk_tokens: int | None


@overload
def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    with_entropy: Literal[False] = ...,
    **options: Unpack[ProjectionOptions],
) -> Tensor: ...
@overload
def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    with_entropy: Literal[True],
    **options: Unpack[ProjectionOptions],
) -> tuple[Tensor, Tensor]: ...
def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    with_entropy: bool = False,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each label, ``(...)``, 0 where ignored; with the entropy (nats) there if asked.

    Both are differentiable once. Arguments as in :func:`chunked_cross_entropy`.
    """
    _check_shapes(hidden, weight, labels)
    rows, targets, kept = kept_rows(hidden, labels, ignore_index)
    rows, weight, bias = autocast_inputs(rows, weight, bias)
    transform = LogitTransform(logit_scale, logit_softcap, temperature)
    options = _options(hidden, weight, transform, chunk_tokens, with_entropy)
    with torch.autocast(hidden.device.type, enabled=False):
        logprobs, entropy = _TokenLogprobs.apply(rows, weight, bias, targets, options)  # type: ignore[no-untyped-call]
    logprobs = scatter_rows(logprobs, kept, labels.shape)
    return (logprobs, scatter_rows(entropy, kept, labels.shape)) if with_entropy else logprobs
