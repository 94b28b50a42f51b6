"""Pooled activations of exchanges at some points of the reply, for several layers at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuneutils.shared.guarding import EMA_ALPHA
from tuneutils.shared.models import Loaded
from tuneutils.tools.guard.exchanges import Exchange
from tuneutils.tools.guard.judge import batches, reply_states

#: Points of a reply that are learnt from, as shares of its tokens; 0 is the prompt alone.
POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)
#: Depths at which layers are tried by default.
DEPTHS = (0.25, 0.4, 0.55, 0.7, 0.85)

Floats = NDArray[np.float32]


@dataclass
class Features:
    """Rows of all exchanges, one for each point of a reply, in the exchanges' order.

    Attributes:
        owner: ``(n,)`` index of a row's exchange.
        point: ``(n,)`` tokens of the reply up to the row.
        last: ``(n,)`` whether it is its exchange's last row.
        values: ``(layer, pooling)`` -> ``(n, H)``; ``first`` is the state at the prompt's end.
    """

    owner: NDArray[np.int64]
    point: NDArray[np.int64]
    last: NDArray[np.bool_]
    values: dict[tuple[int, str], Floats]

    def of(self, layer: int, pooling: str) -> Floats:
        """``(n, H)``, or ``(n, 2H)`` for ``prompt-mean``."""
        if pooling == "prompt-mean":
            return np.concatenate([self.values[layer, "first"], self.values[layer, "mean"]], axis=1)
        return self.values[layer, pooling]


def points(tokens: int) -> list[int]:
    """Where a reply of so many tokens is read."""
    return sorted({round(share * tokens) for share in POINTS})


def extract(
    loaded: Loaded,
    exchanges: Sequence[Exchange],
    layers: Sequence[int],
    *,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> Features:
    """Read the model's activations."""
    at = [points(len(e.reply_ids)) for e in exchanges]
    starts = np.concatenate([[0], np.cumsum([len(p) for p in at])]).astype(np.int64)
    values: dict[tuple[int, str], Floats] = {}
    for batch in batches([len(e.ids) for e in exchanges], batch_size):
        found = reply_states(loaded, [exchanges[i] for i in batch], layers)
        for i, states in zip(batch, found, strict=True):
            rows = slice(int(starts[i]), int(starts[i + 1]))
            for layer in layers:
                for name, made in pooled_at(states[layer].float(), at[i]).items():
                    if (layer, name) not in values:
                        values[layer, name] = np.zeros((int(starts[-1]), made.shape[1]), np.float32)
                    values[layer, name][rows] = made.cpu().numpy()
        if progress is not None:
            progress(len(batch))
    owner = np.repeat(np.arange(len(exchanges)), np.diff(starts))
    last = np.zeros(len(owner), bool)
    last[starts[1:] - 1] = True
    return Features(owner, np.concatenate([np.array(p, np.int64) for p in at]), last, values)


def pooled_at(states: Tensor, at: Sequence[int]) -> dict[str, Tensor]:
    """States ``(n + 1, H)`` pooled up to each point: name -> ``(k, H)``."""
    where = torch.tensor(list(at), device=states.device)
    steps = torch.arange(len(states), device=states.device)
    back = where[:, None] - steps[None, :]
    within = back >= 0
    mean = within.float() / (where + 1)[:, None]
    share = torch.full_like(steps, 1, dtype=torch.float32) * EMA_ALPHA
    share[0] = 1.0
    ema = torch.where(within, share * (1 - EMA_ALPHA) ** back.clamp(min=0), 0.0)
    return {
        "last": states[where],
        "mean": mean @ states,
        "ema": ema @ states,
        "first": states[:1].expand(len(at), -1),
    }


def default_layers(count: int) -> list[int]:
    """Blocks, from 1, at ``DEPTHS`` of the model's ``count``."""
    return sorted({max(1, round(depth * count)) for depth in DEPTHS})
