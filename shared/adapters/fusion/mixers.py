"""How several adapters' outputs at one place become one: the only trained parameters of a fusion."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from .config import FusionConfig

#: As BERT initialises its projections, and the `adapters` library those of AdapterFusion.
INIT_STD = 0.02


class AttentionMixer(nn.Module):
    """AdapterFusion's attention (Pfeiffer et al. 2021, section 3.2), without biases.

    Args:
        width: of the stream, d.
        normalize: read ``h / rms(h)``; see `unit_rms`.
        size: width of Q and K; V is then ``I + U D`` with D ``(size, d)`` and U ``(d, size)``, U zero at
            the start. None: Q, K and V are ``(d, d)``, V the identity at the start.
    """

    def __init__(self, width: int, size: int | None, normalize: bool = False) -> None:
        super().__init__()
        self.normalize = normalize
        self.query = nn.Linear(width, size or width, bias=False)
        self.key = nn.Linear(width, size or width, bias=False)
        nn.init.normal_(self.query.weight, std=INIT_STD)
        nn.init.normal_(self.key.weight, std=INIT_STD)
        if size is None:
            self.value = nn.Linear(width, width, bias=False)
            nn.init.eye_(self.value.weight)
        else:
            self.value_down = nn.Linear(width, size, bias=False)
            self.value_up = nn.Linear(size, width, bias=False)
            nn.init.normal_(self.value_down.weight, std=INIT_STD)
            nn.init.zeros_(self.value_up.weight)

    def forward(self, query: torch.Tensor, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mixed output ``(..., d)`` and the weights ``(..., N)``.

        Both products with K and V are taken once, not for each adapter: ``(Qh)ᵀ(K z_n) = (Kᵀ Q h)ᵀ z_n`` and
        ``Σ s_n V z_n = V Σ s_n z_n``.

        Args:
            query: ``(..., d)``. outputs: ``(..., N, d)``, of each adapter.
        """
        reading = self.query(unit_rms(query) if self.normalize else query) @ self.key.weight
        weights = torch.softmax((outputs @ reading.unsqueeze(-1)).squeeze(-1), dim=-1)
        return self._value(weighted_sum(weights, outputs)), weights

    def _value(self, mixed: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "value"):
            return cast(torch.Tensor, self.value(mixed))
        return cast(torch.Tensor, mixed + self.value_up(self.value_down(mixed)))

    def penalty(self) -> torch.Tensor:
        """``‖V − I‖²_F``: what keeps V from adding capacity of its own."""
        if hasattr(self, "value"):
            weight = self.value.weight
            return (weight - torch.eye(len(weight), device=weight.device, dtype=weight.dtype)).square().sum()
        # ‖U D‖² = tr((UᵀU)(D Dᵀ)), without the (d, d) product.
        up, down = self.value_up.weight, self.value_down.weight
        return ((up.t() @ up) * (down @ down.t())).sum()


class GateMixer(nn.Module):
    """A softmax gate: ``softmax(W h + b)``, W ``(N, d)``; it starts as the plain average."""

    def __init__(self, width: int, adapters: int, normalize: bool = False) -> None:
        super().__init__()
        self.normalize = normalize
        self.gate = nn.Linear(width, adapters)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, query: torch.Tensor, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `AttentionMixer.forward`."""
        weights = torch.softmax(self.gate(unit_rms(query) if self.normalize else query), dim=-1)
        return weighted_sum(weights, outputs), weights

    def penalty(self) -> torch.Tensor:
        return self.gate.weight.new_zeros(())


def unit_rms(h: torch.Tensor) -> torch.Tensor:
    """``h / rms(h)`` over the last axis, ``rms(h) = sqrt(mean(h²) + 1e-6)``.

    The published query is the output of a LayerNorm. A pre-norm model's stream grows from layer to layer, and
    with it the scores: in the upper layers the untrained softmax would already have chosen one adapter.
    """
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)


def weighted_sum(weights: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """``Σ_n s_n z_n`` of weights ``(..., N)`` and outputs ``(..., N, d)``."""
    return (weights.unsqueeze(-2) @ outputs).squeeze(-2)


def make_mixer(config: FusionConfig, width: int) -> nn.Module:
    """The mixer of a fusion over a stream of the given width."""
    if config.kind == "gate":
        return GateMixer(width, len(config.adapters), config.normalize_query)
    return AttentionMixer(width, config.projection_size(), config.normalize_query)
