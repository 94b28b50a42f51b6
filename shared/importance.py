"""How much each layer, channel and group of heads of a teacher does on some text.

Layers: block influence, 1 - cos(what goes in, what comes out), averaged over tokens (ShortGPT, Men et al.
2024, arXiv 2403.03853, equation 1). Channels and heads: the size of their activations (Minitron,
Muralidharan et al. 2024, arXiv 2407.14679, section 2.2), here the root of the sum of squares over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
import torch.nn.functional as F  # isort: skip
from torch import Tensor  # isort: skip

from tuneutils.shared.layerwise import PARTS, Step, decoder_of, layer_parts, walk


@dataclass(frozen=True)
class Importance:
    """Scores; higher stays.

    Attributes:
        influence: ``(layers,)`` block influence.
        hidden: ``(hidden,)`` of the residual stream's channels, after the norms.
        mlp: ``(layers, intermediate)``.
        groups: ``(layers, kv_heads)``, each with its query heads.
    """

    influence: Tensor
    hidden: Tensor
    mlp: Tensor
    groups: Tensor


def measure_importance(model: Any, ids: Tensor, *, channels: bool) -> Importance:
    """Measure a causal language model on ``(rows, length)`` token ids without padding.

    Args:
        channels: also score channels and heads, whose modules the architecture must then have.

    Raises:
        ToolError: it lacks them.
    """
    decoder = decoder_of(model)
    influence, mlp, groups = [], [], []
    hidden = torch.zeros(model.config.get_text_config().hidden_size, dtype=torch.float64)
    for step in walk(decoder, ids):
        influence.append(block_influence(step.inputs, step.outputs()))
        if channels:
            layer_parts(step.layer, type(model).__name__)
            squares = _squares(step)
            hidden += squares[PARTS["q"]] + squares[PARTS["gate"]]
            mlp.append(squares[PARTS["down"]].sqrt())
            heads = squares[PARTS["o"]].view(model.config.get_text_config().num_key_value_heads, -1)
            groups.append(heads.sum(1).sqrt())
    empty = torch.zeros(len(influence), 0)
    return Importance(
        torch.stack(influence),
        hidden.sqrt(),
        torch.stack(mlp) if mlp else empty,
        torch.stack(groups) if groups else empty,
    )


def block_influence(before: Tensor, after: Tensor) -> Tensor:
    """1 - the mean cosine of ``(..., hidden)`` before and after a layer."""
    cosine = F.cosine_similarity(before.flatten(0, -2).double(), after.flatten(0, -2).double(), dim=-1)
    return (1 - cosine.mean()).cpu()


def _squares(step: Step) -> dict[str, Tensor]:
    """Module name → sum of squares ``(columns,)`` of its inputs."""
    names = [PARTS[role] for role in ("q", "gate", "down", "o")]
    sums: dict[str, Tensor] = {}

    def add(name: str, inputs: Tensor) -> None:
        squares = inputs.double().square().sum(0).cpu()
        sums[name] = sums[name] + squares if name in sums else squares

    step.observe(names, add)
    return sums
