"""Batched generation with a KV cache that drops finished rows and takes waiting prompts into their place.

A row's tokens depend on its prompt, the seed and its index alone, not on the batch it is in (up to the
rounding of batched matrix products). The model's own ``generation_config`` is never read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.logprobs_model import (
    accepts,
    input_positions,
    replaced_forward,
    unwrap,
)

FinishReason = Literal["stop", "length", "interrupted"]
OnToken = Callable[[int, int], object]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Filters apply in the order temperature, top-k, top-p, min-p, as in transformers.

    Args:
        max_new_tokens: a completion's most tokens, the stop token included.
        temperature: divisor of the logits; 0 is greedy.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens with at least this probability; 1 keeps all.
        min_p: keep tokens with at least this share of the likeliest one's probability; 0 keeps all.
        stop_token_ids: any of these ends a completion.
        seed: with a row's index, the seed of that row's draws.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_token_ids: Sequence[int] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "seed": (self.seed >= 0, "0 or more"),
        }
        for name, (valid, want) in checks.items():
            if not valid:
                raise ToolError(f"{name}={getattr(self, name)!r}: must be {want}", code=ExitCode.USAGE)


@dataclasses.dataclass(frozen=True)
class Completion:
    """A generated continuation.

    Attributes:
        token_ids: the new tokens, the stop token included.
        finish_reason: ``"stop"`` at a stop token, ``"length"`` at the limit or the model's context,
            ``"interrupted"`` by ``on_token``.
        logprobs: of each token under the full softmax at the temperature, before any filter (greedy: at 1).
    """

    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[float] | None = None


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    batch_size: int = 8,
    pad_token_id: int = 0,
    on_token: OnToken | None = None,
    return_logprobs: bool = False,
    row_ids: Sequence[int] | None = None,
) -> list[Completion]:
    """Complete each prompt; results are in the prompts' order.

    Args:
        model: a causal language model, or a PEFT model (prompt learning too) around one. It is put in
            evaluation mode meanwhile.
        prompts: token ids.
        batch_size: rows in the KV cache at once.
        pad_token_id: any token; pads are masked.
        on_token: called with a prompt's index and each of its new tokens as they come, after each forward
            pass once for every row in the batch's order. A true result takes the token back and ends the row.
        row_ids: what seeds each row's draws instead of its index, for a share of a larger batch.

    Raises:
        ToolError: on an empty prompt, or one that fills the model's context.
    """
    base = unwrap(model)
    rows = _rows(model, base, prompts, sampling, row_ids)
    waiting = sorted(rows, key=lambda row: (len(row.prompt), -row.index))  # the longest is taken first
    engine = _Engine(model, base, sampling, pad_token_id, on_token, return_logprobs)
    batch: _Batch | None = None
    with torch.no_grad(), _evaluating(model):
        while waiting or batch is not None:
            free = batch_size - (len(batch.rows) if batch is not None else 0)
            # In a large batch a few at a time: each prefill also reads the weights and copies the cache.
            if waiting and (batch is None or (8 * free >= batch_size and batch.can_be_joined())):
                group = [waiting.pop() for _ in range(min(free, len(waiting)))]
                batch = _joined(batch, engine.prefill(group))
            if batch is not None:
                batch = engine.decode(batch)
    return [row.completion(return_logprobs) for row in rows]


@dataclasses.dataclass
class _Row:
    index: int
    prompt: Sequence[int]
    limit: int
    uniforms: np.ndarray[Any, np.dtype[np.float64]]
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    stopped: bool = False
    interrupted: bool = False

    def completion(self, with_logprobs: bool) -> Completion:
        reason: FinishReason = "interrupted" if self.interrupted else "stop" if self.stopped else "length"
        return Completion(self.token_ids, reason, self.logprobs if with_logprobs else None)


def _rows(
    model: nn.Module,
    base: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    row_ids: Sequence[int] | None,
) -> list[_Row]:
    virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
    context = (getattr(base.config, "max_position_embeddings", None) or 1 << 40) - virtual
    rows = []
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise ToolError(
                f"prompt {index} has {len(prompt)} tokens; the model's context takes 1 to {context - 1}"
            )
        limit = min(sampling.max_new_tokens, context - len(prompt))
        row_id = index if row_ids is None else row_ids[index]
        uniforms = np.random.default_rng((sampling.seed, row_id)).random(limit)
        rows.append(_Row(index, prompt, limit, uniforms))
    return rows


@dataclasses.dataclass
class _Batch:
    """Rows being completed: their last tokens are not in the cache yet.

    Attributes:
        mask: ``(B, S)`` over the cache, virtual tokens included.
    """

    rows: list[_Row]
    cache: Cache
    mask: Tensor

    def can_be_joined(self) -> bool:
        """Whether the cache is plain key and value tensors, which can be padded."""
        return all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def layers(self) -> list[DynamicLayer]:
        return [layer for layer in self.cache.layers if isinstance(layer, DynamicLayer)]

    def keep(self, indices: list[int]) -> None:
        """Drop the other rows, and the columns that are then padding in all."""
        index = torch.tensor(indices, device=self.mask.device)
        self.rows = [self.rows[i] for i in indices]
        self.mask = self.mask[index]
        self.cache.batch_select_indices(index)
        padding = int(self.mask.argmax(1).min())
        if padding and self.can_be_joined():
            self.mask = self.mask[:, padding:]
            for layer in self.layers():
                assert layer.keys is not None
                assert layer.values is not None
                layer.keys, layer.values = layer.keys[:, :, padding:], layer.values[:, :, padding:]


def _joined(first: _Batch | None, second: _Batch | None) -> _Batch | None:
    """One batch of both, the shorter cache padded on the left."""
    if first is None or second is None:
        return first or second
    length = max(first.mask.shape[1], second.mask.shape[1])

    def padded(tensor: Tensor | None, dim: int) -> Tensor:
        assert tensor is not None
        shape = list(tensor.shape)
        shape[dim] = length - shape[dim]
        return torch.cat([tensor.new_zeros(shape), tensor], dim) if shape[dim] else tensor

    for layer, other in zip(first.layers(), second.layers(), strict=True):
        layer.keys = torch.cat([padded(layer.keys, 2), padded(other.keys, 2)])
        layer.values = torch.cat([padded(layer.values, 2), padded(other.values, 2)])
    mask = torch.cat([padded(first.mask, 1), padded(second.mask, 1)])
    return _Batch(first.rows + second.rows, first.cache, mask)


class _Engine:
    """The model's forward passes, and what is done with their logits."""

    def __init__(
        self,
        model: nn.Module,
        base: nn.Module,
        sampling: Sampling,
        pad_token_id: int,
        on_token: OnToken | None,
        with_logprobs: bool,
    ) -> None:
        self.model = self.decoder = model
        self.base = base
        self.sampling = sampling
        self.pad_token_id = pad_token_id
        self.on_token = on_token
        self.with_logprobs = with_logprobs
        self.stop = frozenset(sampling.stop_token_ids)
        self.device = base.get_input_embeddings().weight.device  # type: ignore[operator]
        self.takes_positions = accepts(base, "position_ids")
        # An index, not a count: the slice of a count is not contiguous, and a batched product of it would
        # copy the output projection for each row.
        last = torch.tensor([-1], device=self.device)
        self.last_logits = {"logits_to_keep": last} if accepts(base, "logits_to_keep") else {}

    def prefill(self, rows: list[_Row]) -> _Batch | None:
        """Run the prompts and draw each one's first token; None where that finishes all."""
        length = max(len(row.prompt) for row in rows)
        ids = torch.tensor(
            [[self.pad_token_id] * (length - len(row.prompt)) + list(row.prompt) for row in rows],
            device=self.device,
        )
        lengths = torch.tensor([len(row.prompt) for row in rows], device=self.device)
        mask = (torch.arange(length, device=self.device) >= length - lengths[:, None]).long()
        inner = self.base.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.takes_positions:  # set here, since prompt learning adds tokens on the way
                kwargs["position_ids"] = input_positions(kwargs, None)
            return inner(*args, **kwargs)

        with replaced_forward(self.base, forward, root=self.model):
            output = self.model(input_ids=ids, attention_mask=mask, use_cache=True, **self.last_logits)
        virtual = output.past_key_values.get_seq_length() - length
        if virtual:  # they are in the cache now, and PEFT would add them again
            self.decoder = self.base
        mask = torch.cat([mask.new_ones(len(rows), virtual), mask], dim=1)
        return self._draw(_Batch(rows, output.past_key_values, mask), output.logits[:, -1])

    def decode(self, batch: _Batch) -> _Batch | None:
        """Run the last tokens and draw the next; None when all rows have finished."""
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.rows), 1)], dim=1)
        inputs: dict[str, Any] = {"attention_mask": batch.mask, "past_key_values": batch.cache}
        if self.takes_positions:
            inputs["position_ids"] = batch.mask.sum(1, keepdim=True) - 1
        ids = torch.tensor([row.token_ids[-1:] for row in batch.rows], device=self.device)
        output = self.decoder(input_ids=ids, use_cache=True, **inputs)
        batch.cache = output.past_key_values
        return self._draw(batch, output.logits[:, -1])

    def _draw(self, batch: _Batch, logits: Tensor) -> _Batch | None:
        """Give each row its next token; the batch of the rows that go on."""
        steps = [(row, len(row.token_ids)) for row in batch.rows]
        uniforms = torch.tensor([row.uniforms[step] for row, step in steps], device=logits.device)
        tokens = draw(logits, uniforms, self.sampling)
        if self.with_logprobs:
            log_softmax = (logits.float() / (self.sampling.temperature or 1.0)).log_softmax(-1)
            for row, value in zip(batch.rows, log_softmax.gather(1, tokens[:, None]).tolist(), strict=True):
                row.logprobs.extend(value)
        going_on = []
        for position, (row, token) in enumerate(zip(batch.rows, tokens.tolist(), strict=True)):
            row.token_ids.append(token)
            row.stopped = token in self.stop
            if self.on_token is not None and self.on_token(row.index, token):
                row.interrupted = True
                row.token_ids.pop()
                del row.logprobs[len(row.token_ids) :]
                continue
            if not row.stopped and len(row.token_ids) < row.limit:
                going_on.append(position)
        if not going_on:
            return None
        if len(going_on) < len(batch.rows):
            batch.keep(going_on)
        return batch


def draw(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """Tokens ``(B,)`` from logits ``(B, V)`` by inverting each row's distribution at ``uniforms`` ``(B,)``.

    ``uniforms`` is fp64 in [0, 1); greedy sampling does not use it.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        return logits.argmax(-1)
    cumulative = warp(logits, sampling).double().softmax(-1).cumsum(-1)
    total = cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, uniforms[:, None] * total, right=True)
    likely_last = (cumulative < total).sum(-1, keepdim=True)  # where rounding reaches the total
    return torch.minimum(tokens, likely_last)[:, 0]


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits ``(B, V)`` over the temperature, -inf where top-k, top-p or min-p drops a token."""
    scores = logits / sampling.temperature
    if sampling.top_k:
        least = scores.topk(min(sampling.top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p < 1:
        ascending, order = scores.sort(-1)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        dropped[:, -1] = False
        scores = scores.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)
    if sampling.min_p > 0:
        probabilities = scores.softmax(-1)
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        scores = scores.masked_fill(probabilities < least, -torch.inf)
    return scores


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, each module put back as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
