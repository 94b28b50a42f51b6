"""Float32 weights held as bfloat16, in which the model computes, and the 16 bits that this leaves over.

Autocast keeps float32 weights and casts each of them again for every forward pass. Here the cast is what the
model holds, so that both parts together take the room of the float32 weight alone, and its gradient is
added up in float32 (Micikevicius et al. 2018, Mixed Precision Training, section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from torch import Tensor, nn

#: Elements that the optimizer works on at once, so that they stay in the caches.
BLOCK = 1 << 18
_LOW = "_low_bits"


def split(wide: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as the nearest bfloat16 and an int16 remainder; :func:`join` is its exact inverse."""
    bits = wide.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16  # half a step up at ties, so that the remainder fits
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join(high: Tensor, low: Tensor) -> Tensor:
    """The float32 tensor that :func:`split` took."""
    return ((high.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)


def narrow(parameters: Iterable[nn.Parameter]) -> None:
    """Turn trainable float32 parameters into bfloat16 ones with a remainder, in place."""
    for parameter in parameters:
        if parameter.dtype == torch.float32 and parameter.requires_grad:
            parameter.data, low = split(parameter.data)
            setattr(parameter, _LOW, low)
            parameter.grad_dtype = torch.float32


def is_narrow(parameter: Tensor) -> bool:
    return hasattr(parameter, _LOW)


def widen(parameters: Iterable[nn.Parameter]) -> None:
    """The reverse of :func:`narrow`."""
    for parameter in parameters:
        if is_narrow(parameter):
            parameter.grad = None
            parameter.data = exact(parameter)
            delattr(parameter, _LOW)


def exact(parameter: Tensor) -> Tensor:
    """A parameter's value in full."""
    if not is_narrow(parameter):
        return parameter.detach()
    return join(parameter.detach(), getattr(parameter, _LOW))


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter to a value in full."""
    if not is_narrow(parameter):
        parameter.copy_(value.to(parameter))
        return
    high, low = split(value.to(parameter.device, torch.float32))
    parameter.copy_(high)
    getattr(parameter, _LOW).copy_(low)


class SplitAdam(torch.optim.Adam):
    """Adam whose first moment is bfloat16, on parameters of :func:`narrow` and others alike.

    The first moment forgets a tenth of itself at each step, so that its rounding (2^-9) is below what the
    gradient's own brings; the second, which changes by a thousandth, stays float32.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        state["step"] += 1
        (beta1, beta2), step = group["betas"], float(state["step"])
        rate = group["lr"] / (1 - beta1**step)
        second = (1 - beta2**step) ** -0.5
        names = [parameter.detach(), parameter.grad, state["exp_avg"], state["exp_avg_sq"]]
        low = getattr(parameter, _LOW, None)
        flat: list[Tensor] = [t.view(-1) for t in names if t is not None]
        for start in range(0, parameter.numel(), BLOCK):
            weight, grad, first, square = (t[start : start + BLOCK] for t in flat)
            grad = grad.float()
            mean = first.float().lerp_(grad, 1 - beta1)
            first.copy_(mean)
            square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            change = mean.div_(square.sqrt().mul_(second).add_(group["eps"])).mul_(-rate)
            if low is None:
                weight.add_(change)
                continue
            rest = low.view(-1)[start : start + BLOCK]
            high, left = split(join(weight, rest).add_(change))
            weight.copy_(high)
            rest.copy_(left)
