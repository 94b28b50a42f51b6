"""Linear layers whose weights are rounded in every forward pass, to what ``quantize`` would store.

The rounding is :func:`quantizers.fake_quantize` written with fewer passes over memory (a test compares the
two bit by bit); only its gradient is new. Either each group's scale follows its range, and the gradient
passes straight through (Bengio et al. 2013, arXiv 1308.3432), or the scales are parameters of their own
(LSQ, Esser et al. 2020, arXiv 1902.08153).
"""

from __future__ import annotations

import math
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuneutils.shared.quantizers import Grid, Scales, fake_quantize_rows, fit, grouped, to_codes


def rounded(blocks: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Weights ``(rows, groups, group_size)`` on the grid, with scales and zeros ``(rows, groups, 1)``."""
    codes = blocks.div(scale).add_(zero).round_().clamp_(grid.low, grid.high)
    return codes.sub_(zero).mul_(scale)


class RoundByRange(torch.autograd.Function):
    """``(rows, columns)`` rounded by scales that span each group; its gradient is that of the identity."""

    @staticmethod
    def forward(_ctx: Any, weight: Tensor, grid: Grid, stored: torch.dtype) -> Tensor:
        scales = fit(weight, grid)
        blocks = rounded(grouped(weight, grid), scales.scale[..., None], scales.zero[..., None], grid)
        return blocks.flatten(1).to(stored)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.float(), None, None


class RoundByScale(torch.autograd.Function):
    """The same by given scales, which get a gradient too.

    LSQ, section 2.1, equation 3 (with a fixed zero point as in LSQ+, Bhalgat et al. 2020, arXiv 2004.09576);
    section 2.2: the scale's gradient is divided by ``sqrt(N Qp)``, ``N`` the weights that share it and ``Qp``
    the grid's largest level; section 2.3: none passes to a weight that is clipped.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid, stored: torch.dtype
    ) -> Tensor:
        stepped = usable(scale)
        ctx.save_for_backward(weight, stepped, zero)
        ctx.grid = grid
        return rounded(grouped(weight, grid), stepped[..., None], zero[..., None], grid).flatten(1).to(stored)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, zero = ctx.saved_tensors
        grid: Grid = ctx.grid
        gradient = grouped(grad.float(), grid)
        place = grouped(weight, grid).div(scale[..., None]).add_(zero[..., None])
        inside = (place >= grid.low) & (place <= grid.high)
        codes = place.round().clamp_(grid.low, grid.high)
        slope = torch.where(inside, codes - place, codes - zero[..., None])
        levels = grid.high if grid.symmetric else grid.high - grid.low
        grad_scale = (slope * gradient).sum(-1) / math.sqrt(gradient.shape[-1] * levels)
        return (gradient * inside).flatten(1), grad_scale, None, None, None


def usable(scale: Tensor) -> Tensor:
    """Scales as they are stored: bfloat16, positive; float32 again."""
    return scale.to(torch.bfloat16).float().clamp(min=torch.finfo(torch.bfloat16).tiny)


class QatLinear(nn.Module):
    """A linear layer in place of ``nn.Linear``, rounded as it will be stored.

    Args:
        stored: precision of the stored scales. Transformers dequantizes into it as it loads; where inputs
            are rounded too, it multiplies later, in the precision that it computes in.
        learn_scales: scales start at those of the least squared error and are trained, as a multiple of
            that, so that one learning rate fits all sizes.
        lora: (rank, alpha): the weight stays, and ``alpha / rank * B A`` is added before the rounding.

    Attributes:
        weight: ``(out, in)`` float32.
    """

    initial: Tensor
    zero: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        grid: Grid,
        stored: torch.dtype,
        *,
        round_inputs: bool = False,
        learn_scales: bool = False,
        lora: tuple[int, float] | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.grid, self.round_inputs = grid, round_inputs
        self.stored = torch.float32 if round_inputs else stored
        self.weight = nn.Parameter(linear.weight.detach().float(), requires_grad=lora is None)
        self.bias = linear.bias
        self.settled = False
        if learn_scales:
            scales = fit(self.weight.detach(), grid, search=True)
            self.stretch = nn.Parameter(torch.ones_like(scales.scale))
            self.register_buffer("initial", scales.scale, persistent=False)
            self.register_buffer("zero", scales.zero, persistent=False)
        if lora is not None:
            rank, alpha = lora
            self.lora_a = nn.Parameter(self.weight.new_empty(rank, self.in_features))
            self.lora_b = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
            self.scaling = alpha / rank
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def float_weight(self) -> Tensor:
        """What is rounded, ``(out, in)`` float32."""
        if "lora_a" not in self._parameters:
            return self.weight
        with torch.autocast(self.weight.device.type, enabled=False):
            return torch.addmm(self.weight, self.lora_b, self.lora_a, alpha=self.scaling)

    def learnt_scale(self) -> Tensor | None:
        """``(rows, groups)`` where scales are learnt."""
        return self.initial * self.stretch if "stretch" in self._parameters else None

    def simulated(self) -> Tensor:
        """What it is rounded to, in the stored precision."""
        weight, scale = self.float_weight(), self.learnt_scale()
        if scale is None:
            made = RoundByRange.apply(weight, self.grid, self.stored)  # type: ignore[no-untyped-call]
        else:
            made = RoundByScale.apply(weight, scale, self.zero, self.grid, self.stored)  # type: ignore[no-untyped-call]
        return made  # type: ignore[no-any-return]

    @torch.no_grad()
    def codes(self) -> tuple[Tensor, Scales]:
        """What is stored: ``(out, in)`` int8, and the scales."""
        weight, scale = self.float_weight(), self.learnt_scale()
        scales = fit(weight, self.grid) if scale is None else Scales(usable(scale), self.zero)
        return to_codes(weight, self.grid, scales), scales

    @torch.no_grad()
    def settle(self) -> None:
        """Keep what it is rounded to as its weight, and round no more: for evaluation."""
        self.weight.data = self.simulated().to(self.weight.dtype)
        for name in ("stretch", "lora_a", "lora_b"):
            self._parameters.pop(name, None)
        self.settled = True

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.settled else self.simulated()
        if not torch.is_autocast_enabled(x.device.type):
            weight = weight.to(x.dtype)
        if self.round_inputs:
            x = RoundRows.apply(x)  # type: ignore[no-untyped-call]
        return F.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.grid}"


class RoundRows(torch.autograd.Function):
    """Inputs rounded to int8 by token as dynamic quantization does, with the identity's gradient."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return fake_quantize_rows(x)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        return grad
