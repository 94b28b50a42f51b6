"""One trained adapter at one place: what it adds to the stream there.

Submodules are named as PEFT saves them, so that an adapter's tensors load by their own names.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.activations import ACT2FN

from ..bottleneck import BottleneckConfig
from ..bottleneck.invertible import Coupling
from ..registry import AdapterError


class BottleneckExpert(nn.Module):
    """``scaling * up(f(down(x)))``; see `BottleneckConfig`. ``width`` is that of its output."""

    def __init__(self, config: BottleneckConfig, hidden_size: int) -> None:
        super().__init__()
        size = config.size(hidden_size)
        self.bottleneck_down = nn.Linear(hidden_size, size)
        self.bottleneck_up = nn.Linear(size, hidden_size)
        self.width = hidden_size
        self.act = ACT2FN[config.non_linearity]
        self.factor = 1.0
        if config.scaling == "learned":
            self.bottleneck_scaling = nn.Parameter(torch.ones(1))
        else:
            self.factor = float(config.scaling or 0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bottleneck_up(self.act(self.bottleneck_down(x.to(self.bottleneck_down.weight.dtype))))
        return x * getattr(self, "bottleneck_scaling", self.factor)


class LoraExpert(nn.Module):
    """``scaling * B(A(x))`` (Hu et al. 2021, equation 3). ``width`` is that of its output."""

    def __init__(self, in_features: int, out_features: int, rank: int, scaling: float) -> None:
        super().__init__()
        self.lora_A = nn.Linear(in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, out_features, bias=False)
        self.width = out_features
        self.scaling = scaling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype))) * self.scaling)


class InvertibleExpert(nn.Module):
    """The invertible adapter of a language at the embedding; see `Coupling`."""

    def __init__(self, config: BottleneckConfig, width: int) -> None:
        super().__init__()
        assert config.non_linearity is not None
        self.bottleneck_coupling = Coupling(width, config.invertible_size, config.non_linearity)
        self.width = width


Expert = BottleneckExpert | LoraExpert | InvertibleExpert


def make_expert(entry: dict[str, Any], module: nn.Module, key: str, hidden_size: int) -> Expert | None:
    """The modules of one adapter at one place, their weights still to be loaded; None where it has none.

    Args:
        entry: of `FusionConfig.adapters`.
        module: the frozen module there; ``key``: its name in the model.
        hidden_size: width of the stream.
    """
    config = entry["config"]
    if isinstance(module, nn.Embedding):
        made = BottleneckConfig(**config)
        return InvertibleExpert(made, module.embedding_dim) if made.invertible else None
    if entry["peft_type"] == "BOTTLENECK":
        return BottleneckExpert(BottleneckConfig(**config), config.get("hidden_size") or hidden_size)
    in_features, out_features = _get_in_out_features(module)
    if in_features is None or out_features is None:
        raise AdapterError(f"{key} is no linear layer; only LoRAs of linear layers can be composed")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(ranks, key), config["r"])
    alpha = alphas.get(get_pattern_key(alphas, key), config["lora_alpha"])
    scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return LoraExpert(in_features, out_features, rank, scaling)
