"""The learning rate over a run: warmed up again from zero, then decayed again."""

from __future__ import annotations

import math


def rate_factor(step: int, steps: int, *, schedule: str, warmup: int, final: float) -> float:
    """The learning rate of the ``step``-th update (1 to ``steps``) over its peak.

    Linear warm-up through ``warmup`` updates, then cosine decay to ``final`` (Ibrahim et al. 2024,
    arXiv 2403.08763, section 4.1, which takes 0.1; Loshchilov & Hutter 2017, equation 5), linear decay, or
    none.
    """
    if step <= warmup:
        return step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2
    return final + (1 - final) * (1 - done) if schedule == "linear" else 1.0
