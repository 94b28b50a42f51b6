"""The clipped losses of PPO, per token."""

from __future__ import annotations

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from torch import Tensor


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """``max(-A r, -A clip(r, 1 ± clip_range))`` (Schulman et al. 2017, PPO, equation 7)."""
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """Half the larger squared error of the value and of the value kept near the old one; 0 clips nothing."""
    error = (values - returns) ** 2
    if clip_range > 0:
        near = torch.clamp(values, old_values - clip_range, old_values + clip_range)
        error = torch.maximum(error, (near - returns) ** 2)
    return 0.5 * error


def is_clipped(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """Where the clipped term is the larger one, so that the token has no gradient."""
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    return -advantages * clipped > -advantages * ratio
