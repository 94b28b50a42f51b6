"""LoRA linear layers as one autograd function: the same numbers with fewer passes over memory.

PEFT's layer makes a float32 copy of its input, a product, a scaled copy and a sum, and autograd keeps several
of them. Here ``y = x W' + b + s (x A') B'`` is three products, the last of which adds into ``y``; only ``x``
and ``x A'`` are kept, and ``x`` is shared by the layers that read it. A and B stay in their own precision
and get their gradients in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads
from tuneutils.shared.fused_ops import fused_ops

import torch  # isort: skip
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn


class LoraLinear(torch.autograd.Function):
    """``x W' + b + s (x A') B'``: frozen ``W`` ``(out, in)`` and ``b``, A ``(r, in)``, B ``(out, r)``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        a_low, b_low = a.to(weight.dtype), b.to(weight.dtype)
        down = rows @ a_low.t()
        out = torch.nn.functional.linear(rows, weight, bias).addmm_(down, b_low.t(), alpha=scaling)
        ctx.save_for_backward(rows, weight, a_low, b_low, down)
        ctx.scaling, ctx.x_shape, ctx.x_dtype, ctx.dtypes = scaling, x.shape, x.dtype, (a.dtype, b.dtype)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, down = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_down = (grad @ b).mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_down, a).view(ctx.x_shape).to(ctx.x_dtype)
        grad_a = (grad_down.t() @ rows).to(ctx.dtypes[0])
        grad_b = (grad.t() @ down).to(ctx.dtypes[1]).mul_(ctx.scaling)
        return grad_x, None, None, grad_a, grad_b, None


def lora_linear(layer: PeftLinear, x: Tensor) -> Tensor | None:
    """The layer's output, or None where it does more than plain LoRA just now (disabled, merged, several)."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(active) != 1:
        return None
    name = active[0]
    base = layer.base_layer
    dtype = base.weight.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    elif x.dtype != dtype:
        return None
    bias = None if base.bias is None else base.bias.to(dtype)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    out: Tensor = LoraLinear.apply(x, base.weight.to(dtype), bias, a, b, layer.scaling[name])  # type: ignore[no-untyped-call]
    return out


def is_plain(layer: Any) -> bool:
    """Whether the layer is plain LoRA over a frozen ``nn.Linear``: no DoRA, dropout or bias of its own."""
    if type(layer) is not PeftLinear or type(layer.base_layer) is not nn.Linear or layer.fan_in_fan_out:
        return False
    base = layer.base_layer
    hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks)
    frozen = not any(p.requires_grad for p in base.parameters())
    dropped = any(not isinstance(d, nn.Identity) for d in layer.lora_dropout.values())
    biased = any(b.bias is not None for b in layer.lora_B.values())
    return frozen and not (
        any(hooks) or "forward" in base.__dict__ or dropped or biased or layer.lora_variant
    )


@contextmanager
def fused_lora(model: nn.Module) -> Iterator[int]:
    """Run the plain LoRA layers of a PEFT model by :class:`LoraLinear`; gives their number.

    ``disable_adapter``, merging and switching adapters work as before meanwhile; other layers are left alone.
    """
    layers = [m for m in model.modules() if is_plain(m) and "forward" not in m.__dict__]
    for layer in layers:
        layer.forward = _forward(layer)
    try:
        yield len(layers)
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: Any) -> Any:
    original = layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = None if args or kwargs else lora_linear(layer, x)
        made: Tensor = original(x, *args, **kwargs) if out is None else out
        return made

    return forward


@contextmanager
def fused(
    model: nn.Module, where: torch.device, *, causal_masks: bool = False, learning_norms: bool = False
) -> Iterator[None]:
    """All that makes a training step on a CPU faster without changing what it computes; elsewhere nothing.

    Args:
        causal_masks, learning_norms: see ``fused_ops``.
    """
    if where.type != "cpu":
        yield
        return
    with fused_lora(model), fused_ops(model, causal_masks=causal_masks, learning_norms=learning_norms):
        yield
