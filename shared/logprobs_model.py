"""Chunked losses and log-probabilities of a whole model: plain, or under PEFT, DDP or FSDP.

For the length of one call the causal model's ``forward`` is replaced on the instance. Inside it the output
projection passes its input through, so that the model computes hidden states with all that its wrappers
add (adapters, virtual tokens, autocast, gathered shards); the chunked loss is then computed there, while
the weights are in place, and is what ``forward`` returns. Both replacements are undone on any exception.
Not thread-safe: nothing else may run the same model meanwhile.

Every method is scored on the same tokens: each from those before it in its row, so the first token
of a row, or of a document packed into one, never, also where prompt learning puts virtual tokens before it
(PEFT's own loss would score it there).
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.logprobs import (
    IGNORE_INDEX,
    LogitTransform,
    ProjectionOptions,
    Reduction,
    accumulation_dtype,
    chunked_cross_entropy,
    default_chunk_tokens,
    kept_rows,
    scatter_rows,
    token_logprobs,
)

Result = Tensor | tuple[Tensor, Tensor]
Compute = Callable[[Tensor, Tensor, nn.Module, LogitTransform], Result]

# Values passed through in place of logits; what the model makes of them shows its scale and soft cap.
_PROBE = (1.0, 7.0, 1e30)
_transforms: weakref.WeakKeyDictionary[nn.Module, LogitTransform] = weakref.WeakKeyDictionary()


def causal_nll(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    position_ids: Tensor | None = None,
    *,
    reduction: Reduction = "mean",
    num_items: int | Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Next-token negative log-likelihood of ``labels``, in bounded memory.

    Args:
        model: a causal language model of transformers, or a PEFT model, DDP or FSDP around one.
        input_ids: ``(B, T)``.
        attention_mask: ``(B, T)``, padding on either side; 4-D with ``position_ids``; None for ones.
        labels: ``(B, T)``, not shifted: ``labels[:, t]`` is the token at ``t``, -100 where not scored.
        position_ids: ``(B, T)``, 0 where a packed document starts; by default counted from the mask.
        reduction: ``"none"`` gives ``(B, T)``: the loss of the token at ``t``, 0 where not scored.
        num_items: what ``"mean"`` divides by, e.g. the labels of a whole accumulation window.

    Raises:
        ToolError: for a model whose logits are computed in a way that cannot be reproduced in chunks.
    """

    def compute(hidden: Tensor, targets: Tensor, head: nn.Module, transform: LogitTransform) -> Tensor:
        linear = plain_linear(head)
        if linear is None or reduction == "none":
            logprobs, _ = _head_logprobs(hidden, head, targets, transform, False, chunk_tokens)
            if reduction == "none":
                return -_pad_first(logprobs)
            count = (targets != IGNORE_INDEX).sum().clamp(min=1) if num_items is None else num_items
            return -logprobs.sum() / (count if reduction == "mean" else 1)
        loss: Tensor = chunked_cross_entropy(
            hidden,
            linear.weight,
            targets,
            bias=linear.bias,
            reduction=reduction,
            num_items=num_items,
            logit_softcap=transform.softcap,
            logit_scale=transform.scale,
            chunk_tokens=chunk_tokens,
        )
        return loss

    result = run_head(model, input_ids, attention_mask, labels, position_ids, compute)
    assert isinstance(result, Tensor)
    return result


@overload
def sequence_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    completion_mask: Tensor,
    temperature: float = ...,
    *,
    with_entropy: Literal[False] = ...,
    position_ids: Tensor | None = ...,
    chunk_tokens: int | None = ...,
) -> Tensor: ...
@overload
def sequence_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    completion_mask: Tensor,
    temperature: float = ...,
    *,
    with_entropy: Literal[True],
    position_ids: Tensor | None = ...,
    chunk_tokens: int | None = ...,
) -> tuple[Tensor, Tensor]: ...
def sequence_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    completion_mask: Tensor,
    temperature: float = 1.0,
    *,
    with_entropy: bool = False,
    position_ids: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Result:
    """Log-probability ``(B, T)`` of each token of the completion, 0 elsewhere; differentiable once.

    Args:
        completion_mask: ``(B, T)``, nonzero at the tokens that are scored; a row's first token never is.
        temperature: the divisor of the logits, as in sampling.
        with_entropy: also give the entropy ``(B, T)``, in nats, of each token's distribution.

    Other arguments and errors as in :func:`causal_nll`.
    """
    labels = input_ids.masked_fill(~completion_mask.bool(), IGNORE_INDEX)

    def compute(hidden: Tensor, targets: Tensor, head: nn.Module, transform: LogitTransform) -> Result:
        transform = LogitTransform(transform.scale, transform.softcap, temperature)
        logprobs, entropy = _head_logprobs(hidden, head, targets, transform, with_entropy, chunk_tokens)
        if entropy is None:
            return _pad_first(logprobs)
        return _pad_first(logprobs), _pad_first(entropy)

    return run_head(model, input_ids, attention_mask, labels, position_ids, compute)


@torch.no_grad()
def separable_head(model: nn.Module) -> LogitTransform | None:
    """What follows the output projection, where that reads just what ``get_decoder()`` gives, else None.

    Decoder and :func:`hidden_logprobs` then give what :func:`sequence_logprobs` does, also in several
    threads at once. Not for prompt learning, whose tokens come in before the decoder.
    """
    base: Any = unwrap(model)
    if not hasattr(base, "get_decoder"):
        return None
    given: list[Tensor] = []
    read: list[Tensor] = []

    def compute(hidden: Tensor, _targets: Tensor, _head: nn.Module, _transform: LogitTransform) -> Result:
        read.append(hidden)
        return hidden.new_zeros(())

    probe = torch.zeros((1, 3), dtype=torch.long, device=base.get_input_embeddings().weight.device)
    handle = base.get_decoder().register_forward_hook(lambda _m, _args, output: given.append(output[0]))
    try:
        run_head(model, probe, None, probe, None, compute)
    finally:
        handle.remove()
    same = len(given) == 1 and given[0].shape[1] == 3 and torch.equal(given[0][:, :-1], read[0])
    return _transforms[base] if same else None


def hidden_logprobs(
    model: nn.Module,
    hidden: Tensor,
    input_ids: Tensor,
    completion_mask: Tensor,
    transform: LogitTransform,
    *,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """:func:`sequence_logprobs` from the decoder's output ``(B, T, H)``, and entropies if asked.

    Args:
        transform: that of :func:`separable_head`, with the temperature.
    """
    labels = input_ids.masked_fill(~completion_mask.bool(), IGNORE_INDEX)[:, 1:]
    head = _output_head(unwrap(model))
    logprobs, entropy = _head_logprobs(hidden[:, :-1], head, labels, transform, with_entropy, None)
    return _pad_first(logprobs), None if entropy is None else _pad_first(entropy)


def unwrap(model: nn.Module) -> nn.Module:
    """The causal language model inside PEFT, DDP, FSDP, DeepSpeed and ``torch.compile`` wrappers."""
    while True:
        if hasattr(type(model), "get_base_model"):
            model = model.get_base_model()  # type: ignore[operator]
            continue
        children = (model._modules.get(name) for name in ("module", "_fsdp_wrapped_module", "_orig_mod"))
        inner = next((child for child in children if child is not None), None)
        if inner is None:
            return model
        model = inner


def run_head(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    position_ids: Tensor | None,
    compute: Compute,
) -> Result:
    """``compute`` on the hidden states ``(B, T - 1, H)`` that predict tokens 1 to T - 1, and on those.

    It also gets the output projection and what the model makes of its output. Other arguments and errors as
    in :func:`causal_nll`.
    """
    base = unwrap(model)
    head = _output_head(base)
    takes_positions = accepts(base, "position_ids")
    inner = base.forward
    length = input_ids.shape[1]
    targets = labels[:, 1:]
    if attention_mask is not None and attention_mask.dim() == 2:  # a pad predicts nothing
        targets = targets.masked_fill(attention_mask[:, :-1] == 0, IGNORE_INDEX)
    if position_ids is not None:  # nor does a packed row's previous document
        targets = targets.masked_fill(position_ids[:, 1:] == 0, IGNORE_INDEX)

    def forward(*args: Any, **kwargs: Any) -> Result:
        if takes_positions:
            kwargs["position_ids"] = input_positions(kwargs, position_ids)
        transform = _transforms.get(base)
        with _passthrough(head, probe=transform is None) as captured:
            output = inner(*args, **kwargs)
        if torch.is_grad_enabled() and getattr(output, "aux_loss", None) is not None:
            raise ToolError(
                f"{type(base).__name__} returns a router loss that the chunked loss would drop; "
                "set output_router_logits=False in its config",
                code=ExitCode.USAGE,
            )
        if transform is None:
            transform = _transforms[base] = _measured_transform(output, type(base).__name__)
        ((hidden, autocast),) = captured
        with autocast:
            return compute(hidden[:, -length:-1], targets.to(hidden.device), head, transform)

    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    with replaced_forward(base, forward, root=model):
        result: Result = model(**inputs)
    return result


def accepts(base: nn.Module, argument: str) -> bool:
    """Whether the model's class names ``argument`` in its forward."""
    return argument in inspect.signature(type(base).forward).parameters


def _output_head(base: nn.Module) -> nn.Module:
    get = getattr(base, "get_output_embeddings", None)
    head = None if get is None else get()
    if head is None:
        raise ToolError(
            f"{type(base).__name__} has no output projection; load it as a causal language model",
            code=ExitCode.USAGE,
        )
    assert isinstance(head, nn.Module)
    return head


def input_positions(kwargs: dict[str, Any], given: Tensor | None) -> Tensor | None:
    """Positions of the inputs that reach the causal model, virtual tokens included.

    PEFT drops the positions that it is given under prompt tuning, so they are counted here from the mask,
    which it has extended by then.
    """
    reached: Tensor | None = kwargs.get("position_ids")
    if given is not None:
        if reached is None:
            raise ToolError(
                "position_ids cannot be used with virtual tokens (prompt or p-tuning); train without packing",
                code=ExitCode.USAGE,
            )
        return reached
    mask = kwargs.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return reached
    inputs = kwargs.get("input_ids")
    length = (kwargs["inputs_embeds"] if inputs is None else inputs).shape[1]
    positions: Tensor = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
    return positions


@contextmanager
def replaced_forward(
    module: nn.Module, forward: Callable[..., Any], root: nn.Module | None = None
) -> Iterator[None]:
    """``module.forward`` on the instance, put back as it was, an accelerate hook's included.

    Wrappers inside ``root`` that hold the bound method as their own forward get the new one too: PEFT's
    LLaMA-Adapter does, and so does ``disable_adapter`` under prompt learning.
    """
    holders = {module}
    for other in root.modules() if root is not None else ():
        if getattr(other.__dict__.get("forward"), "__self__", None) is module:
            holders.add(other)
    before = {holder: holder.__dict__.get("forward") for holder in holders}
    for holder in holders:
        holder.forward = forward
    try:
        yield
    finally:
        for holder, own in before.items():
            if own is None:
                del holder.__dict__["forward"]
            else:
                holder.forward = own


@contextmanager
def _passthrough(head: nn.Module, *, probe: bool) -> Iterator[list[tuple[Tensor, torch.autocast]]]:
    """Capture the head's input and the autocast state there; give a few numbers a token instead of logits."""
    captured: list[tuple[Tensor, torch.autocast]] = []

    def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        device = hidden.device.type
        autocast = torch.autocast(
            device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device)
        )
        captured.append((hidden, autocast))
        values = torch.tensor(_PROBE if probe else _PROBE[:1], dtype=torch.float32, device=hidden.device)
        return values.expand(*hidden.shape[:-1], len(values)).contiguous()

    with replaced_forward(head, forward):
        yield captured


def _measured_transform(output: Any, name: str) -> LogitTransform:
    """Scale and soft cap from what the model made of ``_PROBE``.

    Reading them from the config would need to know each family's field, and whether it multiplies or divides,
    before or after the projection.
    """
    logits = output[0] if isinstance(output, tuple) else output.logits
    one, seven, limit = logits.reshape(-1, logits.shape[-1])[0].double().tolist()
    softcap = None if limit > 1e20 else limit
    scale = one if softcap is None else softcap * float(torch.atanh(torch.tensor(one / softcap).double()))
    if abs(scale - 1.0) < 1e-5:  # the rounding of tanh in fp32
        scale = 1.0
    transform = LogitTransform(scale, softcap)
    expected = float(transform(torch.tensor(seven).new_tensor(7.0, dtype=torch.float64)))
    if not abs(expected - seven) <= 1e-4 * abs(seven):
        raise ToolError(
            f"the logits of {name} get more than a scale and a soft cap, which chunks cannot follow",
            code=ExitCode.USAGE,
        )
    return transform


def plain_linear(head: nn.Module) -> nn.Linear | None:
    """The linear layer that ``head`` amounts to now, or None where it does more (adapter, 4-bit, hooked)."""
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        if _is_bypassed(head):
            return None
        wrapper: Any = head
        active: list[str] = [] if wrapper.disable_adapters else wrapper.active_adapters
        head = wrapper.modules_to_save[active[0]] if active else wrapper.original_module
    if type(head) is not nn.Linear or _is_bypassed(head) or type(head.weight) is not nn.Parameter:
        return None
    return head


def _is_bypassed(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return any(hooks) or "forward" in module.__dict__


def _head_logprobs(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    transform: LogitTransform,
    with_entropy: bool,
    chunk_tokens: int | None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities and entropies ``(B, T - 1)``, 0 where ignored, through any kind of head."""
    linear = plain_linear(head)
    if linear is None:
        return _checkpointed_logprobs(hidden, head, targets, transform, with_entropy, chunk_tokens)
    options: ProjectionOptions = {
        "bias": linear.bias,
        "logit_softcap": transform.softcap,
        "logit_scale": transform.scale,
        "temperature": transform.temperature,
        "chunk_tokens": chunk_tokens,
    }
    if with_entropy:
        return token_logprobs(hidden, linear.weight, targets, with_entropy=True, **options)
    return token_logprobs(hidden, linear.weight, targets, **options), None


def _checkpointed_logprobs(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    transform: LogitTransform,
    with_entropy: bool,
    chunk_tokens: int | None,
) -> tuple[Tensor, Tensor | None]:
    """The same by calling ``head`` on each chunk, and again in the backward pass."""

    def chunk(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        raw = head(rows)
        log_softmax = transform(raw.to(accumulation_dtype(raw.dtype))).log_softmax(-1)
        logprobs = log_softmax.gather(-1, labels[:, None].to(raw.device))[:, 0]
        entropy = -(log_softmax.exp() * log_softmax).sum(-1) if with_entropy else logprobs.detach()
        return logprobs, entropy

    rows, labels, kept = kept_rows(hidden, targets, IGNORE_INDEX)
    if chunk_tokens is None:  # a few logits-sized tensors live at once here
        vocab_size = getattr(head, "out_features", None) or 1 << 17
        chunk_tokens = max(16, default_chunk_tokens(vocab_size, hidden.device) // 4)
    starts = range(0, max(len(labels), 1), chunk_tokens)
    slices = [slice(start, start + chunk_tokens) for start in starts]
    parts = [checkpoint(chunk, rows[piece], labels[piece], use_reentrant=False) for piece in slices]
    logprobs = torch.cat([part[0] for part in parts]).to(hidden.device)
    entropy = torch.cat([part[1] for part in parts]).to(hidden.device)
    logprobs = scatter_rows(logprobs, kept, targets.shape)
    return logprobs, scatter_rows(entropy, kept, targets.shape) if with_entropy else None


def _pad_first(values: Tensor) -> Tensor:
    """``(B, T - 1)`` about tokens 1 to T - 1 as ``(B, T)`` about all."""
    return torch.cat([values.new_zeros(values.shape[0], 1), values], dim=1)
