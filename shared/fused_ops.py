"""Parts of a frozen decoder layer with hand-written gradients, for training adapters on a CPU.

Autograd's own graph of these parts keeps several float32 copies of each activation and walks over memory
many times; on a CPU that, not the matrix products, is where a step's time goes. Each function here
computes what the model's own code computes, keeps its inputs only, and forms the gradient from them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
import torch.nn.functional as F  # isort: skip
from torch import Tensor, nn

#: Queries whose scores are formed at once in attention's backward pass.
QUERY_BLOCK = 128
#: Scores that are formed at once where several short sequences fit.
SCORES = 1 << 19


class RMSNorm(torch.autograd.Function):
    """``weight * x / sqrt(mean(x ** 2) + eps)`` over the last dimension.

    Normalised in float32 and rounded before the weight, as in Llama. Zhang & Sennrich 2019, equation 4.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return x.to(wide, copy=True).mul_(inverse).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        normed = x.to(inverse.dtype, copy=True).mul_(inverse)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad = (grad * weight).to(inverse.dtype)
        shared = torch.linalg.vecdot(grad, normed)[..., None].div_(-x.shape[-1])
        return grad.addcmul_(normed, shared).mul_(inverse).to(x.dtype), grad_weight, None


class SwiGLU(torch.autograd.Function):
    """``silu(gate) * up`` (Shazeer 2020, equation 5)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, F.silu(gate).mul_(grad)


class Rotary(torch.autograd.Function):
    """``x * cos + rotate_half(x) * sin`` (Su et al. 2021, equation 34, with the halves of Llama's layout)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        out = x * cos
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        half = grad.shape[-1] // 2
        out = grad * cos
        out[..., :half].addcmul_(grad[..., half:], sin[..., half:])
        out[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
        return out, None, None


class CausalAttention(torch.autograd.Function):
    """Causal softmax attention: torch's flash kernel forward, matrix products per block backward.

    The CPU flash kernel's own backward pass takes many times its forward; in bfloat16 the products below run
    at the machine's matrix rate. Shapes: q ``(B, H, T, D)``, k and v ``(B, K, T, D)`` with ``H`` a multiple
    of ``K``; a mask ``(B, 1, T, T)`` of booleans hides more than what is to come, but no token from itself.
    Dao et al. 2022 (FlashAttention), algorithm 4.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None
    ) -> Tensor:
        added = None
        if mask is not None:
            added = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask is None, attn_mask=added, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, logsumexp, mask)
        ctx.scale = scale
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, logsumexp, mask = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in (q, k, v)]
        delta = torch.linalg.vecdot(grad.to(logsumexp.dtype), out.to(logsumexp.dtype))
        rows = max(1, SCORES // (q.shape[1] * q.shape[2] * min(q.shape[2], QUERY_BLOCK)))
        for start in range(0, len(q), rows):
            part: Any = [t[start : start + rows] for t in (q, k, v, grad, logsumexp, delta)]
            seen = None if mask is None else mask[start : start + rows]
            into = [g[start : start + rows] for g in grads]
            _attention_backward(*part, scale=ctx.scale, mask=seen, out=into)
        return (*grads, None, None)


def _attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    logsumexp: Tensor,
    delta: Tensor,
    *,
    scale: float,
    mask: Tensor | None,
    out: list[Tensor],
) -> None:
    """Gradients of a few sequences, q ``(B, H, T, D)``, k and v ``(B, K, T, D)``, into ``out``.

    The heads that share a key head are rows of one product. The logsumexp and delta enter the products as
    extra columns: they are subtracted before the result is rounded to q's precision, not after.
    """
    (batch, heads, length, dim), groups = q.shape, k.shape[1]
    per_group = (batch * groups, heads // groups, length)
    scaled = _with_columns(q * scale, -logsumexp).view(*per_group, -1)
    grad = _with_columns(grad, -delta).view(*per_group, -1)
    width = scaled.shape[-1]
    k, v = (F.pad(t, (0, width - dim), value=1.0).flatten(0, 1) for t in (k, v))
    grad_k, grad_v = (torch.zeros(len(k), length, dim, dtype=logsumexp.dtype) for _ in range(2))
    grad_q = out[0].view(batch, groups, -1, length, dim)
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        q_block = scaled[:, :, start:end].reshape(len(k), -1, width)
        g_block = grad[:, :, start:end].reshape(len(k), -1, width)
        scores = torch.bmm(q_block, k[:, :end].mT)
        if mask is not None:
            hidden = ~mask[:, :, start:end, :end].expand(-1, heads, -1, -1).reshape_as(scores)
            scores.masked_fill_(hidden, -torch.inf)
        probs = scores.exp_().view(len(k), -1, end - start, end).tril_(start).view_as(scores)
        grad_scores = torch.bmm(g_block, v[:, :end].mT).mul_(probs)
        grad_v[:, :end] += torch.bmm(probs.mT, g_block[..., :dim])
        grad_k[:, :end] += torch.bmm(grad_scores.mT, q_block[..., :dim])
        block = torch.bmm(grad_scores, k[:, :end, :dim]).mul_(scale)
        grad_q[..., start:end, :] = block.view(batch, groups, -1, end - start, dim)
    out[1].copy_(grad_k.view_as(out[1]))
    out[2].copy_(grad_v.view_as(out[2]))


def _with_columns(x: Tensor, values: Tensor) -> Tensor:
    """``x`` ``(..., D)`` with ``values`` ``(...)`` as two more columns that sum to them."""
    high = values.to(x.dtype)
    low = (values - high.to(values.dtype)).to(x.dtype)
    return torch.cat([x, high[..., None], low[..., None]], dim=-1)


@contextmanager
def fused_ops(
    model: nn.Module, *, causal_masks: bool = False, learning_norms: bool = False
) -> Iterator[dict[str, int]]:
    """Run the norms, SwiGLU, rotary embedding and attention of ``model`` by the functions above.

    A module is replaced only where a probe shows that it computes the same function; anything else, and any
    call that a function does not cover, runs the model's own code. Attention and rotary embedding are
    replaced for the process, as Transformers looks them up there. Gives the number of replacements.

    Args:
        causal_masks: every boolean mask that attention is given meanwhile is one that
            :class:`CausalAttention` takes; otherwise calls with a mask run the model's own code.
        learning_norms: replace norms whose weight is trained, too.
    """
    norms = _replaceable(model, lambda layer: _is_norm(layer, learning_norms), _norm_forward)
    mlps = _replaceable(model, _is_swiglu, _swiglu_forward)
    with ExitStack() as undo:
        for layer, forward in [*norms, *mlps]:
            layer.forward = forward
            undo.callback(layer.__dict__.pop, "forward", None)
        rotary = [undo.enter_context(_rotary_in(name)) for name in _modeling_modules(model)]
        undo.enter_context(_attention(causal_masks))
        yield {"norms": len(norms), "mlps": len(mlps), "rotary": sum(rotary)}


def _replaceable(
    model: nn.Module, fits: Callable[[nn.Module], bool], make: Callable[[Any], Any]
) -> list[tuple[nn.Module, Any]]:
    """Modules with their new forward, of the classes whose first module gives the same with it."""
    same: dict[type, bool] = {}
    found = []
    for layer in model.modules():
        if not fits(layer) or "forward" in layer.__dict__:
            continue
        forward = make(layer)
        if type(layer) not in same:
            same[type(layer)] = _same_output(layer, forward)
        if same[type(layer)]:
            found.append((layer, forward))
    return found


def _same_output(layer: nn.Module, forward: Any) -> bool:
    width = getattr(layer, "hidden_size", None) or next(layer.parameters()).shape[-1]
    floating = (p.dtype for p in layer.parameters() if p.is_floating_point())  # 4-bit weights are bytes
    dtype = next(floating, torch.float32)
    probe = torch.randn(3, 4, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        outputs = [run(probe) for run in (forward, layer) if torch.manual_seed(0)]
    return _close(*outputs)


def _close(ours: Tensor, theirs: Tensor) -> bool:
    tolerance = 4 * torch.finfo(theirs.dtype).eps
    return ours.dtype == theirs.dtype and bool(
        (ours - theirs).double().norm() <= tolerance * theirs.double().norm()
    )


def _is_norm(layer: nn.Module, learning: bool) -> bool:
    parameters = list(layer.parameters())
    return (
        type(layer).__name__.endswith("RMSNorm")
        and [n for n, _ in layer.named_parameters()] == ["weight"]
        and isinstance(getattr(layer, "variance_epsilon", None), float)
        and (learning or not parameters[0].requires_grad)
    )


def _norm_forward(layer: Any) -> Any:
    def forward(hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != layer.weight.dtype:
            return type(layer).forward(layer, hidden_states)  # type: ignore[no-any-return]
        return RMSNorm.apply(hidden_states, layer.weight, layer.variance_epsilon)  # type: ignore[no-any-return, no-untyped-call]

    return forward


def _is_swiglu(layer: nn.Module) -> bool:
    names = {name for name, _ in layer.named_children()}
    return names == {"gate_proj", "up_proj", "down_proj", "act_fn"} and "SiLU" in type(layer.act_fn).__name__


def _swiglu_forward(layer: Any) -> Any:
    def forward(x: Tensor) -> Tensor:
        return layer.down_proj(SwiGLU.apply(layer.gate_proj(x), layer.up_proj(x)))  # type: ignore[no-any-return, no-untyped-call]

    return forward


def _modeling_modules(model: nn.Module) -> list[Any]:
    names = sorted({type(m).__module__ for m in model.modules()})
    return [sys.modules[n] for n in names if hasattr(sys.modules[n], "apply_rotary_pos_emb")]


@contextmanager
def _rotary_in(module: Any) -> Iterator[bool]:
    """``apply_rotary_pos_emb`` of a modeling module, where a probe finds it to be the plain one."""
    original = module.apply_rotary_pos_emb

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or cos.shape[-1] != q.shape[-1] or cos.dtype != q.dtype:
            return original(q, k, cos, sin, *args, **kwargs)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return Rotary.apply(q, cos, sin), Rotary.apply(k, cos, sin)  # type: ignore[no-untyped-call]

    q, k = torch.randn(2, 1, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    angles = torch.arange(12.0).view(1, 3, 4).repeat(1, 1, 2)
    given = (q, k, angles.cos(), angles.sin())
    try:
        same = all(_close(a, b) for a, b in zip(rotate(*given), original(*given), strict=True))
    except (TypeError, ValueError, RuntimeError):  # another signature: not the plain one
        same = False
    if same:
        module.apply_rotary_pos_emb = rotate
    try:
        yield same
    finally:
        module.apply_rotary_pos_emb = original


@contextmanager
def _attention(causal_masks: bool) -> Iterator[None]:
    """Transformers' ``sdpa`` attention with :class:`CausalAttention` in the calls that it covers."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        ours = attention_mask is None or (
            causal_masks and attention_mask.dtype == torch.bool and attention_mask.dim() == 4
        )
        special = not ours or dropout or kwargs.get("softcap") is not None
        special = special or kwargs.get("position_bias") is not None or kwargs.get("cache") is not None
        if special or not causal or not _covers(query, key, value):
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
            )
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return CausalAttention.apply(query, key, value, scale, attention_mask).transpose(1, 2), None  # type: ignore[no-untyped-call]

    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = before


def _covers(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the backward pass by products serves: it gains in bfloat16 alone."""
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.bfloat16
        and query.shape[2] == key.shape[2] == value.shape[2] > 1
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and query.shape[1] % key.shape[1] == 0
        and key.shape[1] == value.shape[1]
        and torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad or value.requires_grad)
    )
