"""From scores and log-probabilities to advantages and returns: pure functions on padded batches.

All tensors are ``(B, R)`` over response tokens, with ``mask`` 1 on the real ones; nothing that stands on
a pad enters a result.
"""

from __future__ import annotations

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from torch import Tensor


def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float
) -> Tensor:
    """``(B, R)``: minus ``kl_coef`` times the k1 estimate of KL on each token, the score on the last one.

    A row sums to its score less ``kl_coef`` times its sequence KL. Ziegler et al. 2019, equation 2.

    Args:
        scores: ``(B,)``.
        logprobs, ref_logprobs: of the sampled tokens under the policy and under the reference.
    """
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    last = mask.sum(1).long() - 1
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards))


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns ``(B, R)``, 0 on pads (Schulman et al. 2015, GAE, equation 16).

    The value past the last real token is 0: an episode ends there, by EOS or by its length.
    """
    mask = mask.to(values)
    values, rewards = values * mask, rewards * mask
    advantages = torch.zeros_like(values)
    after = values.new_zeros(len(values))
    next_value = torch.zeros_like(after)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        after = (delta + gamma * lam * after) * mask[:, t]
        advantages[:, t] = after
        next_value = values[:, t]
    return advantages, (advantages + values) * mask


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over real tokens."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True, epsilon: float = 1e-8) -> Tensor:
    """Mean 0 and standard deviation 1 over the real tokens of the batch, or with its mean kept."""
    mask = mask.to(values)
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    made = (values - mean) * torch.rsqrt(variance + epsilon)
    return (made if shift_mean else made + mean) * mask


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """``1 - Var(returns - values) / Var(returns)``; 0 where the returns do not vary."""
    real = mask.bool()
    left, total = (returns - values)[real], returns[real]
    variance = float(total.var(correction=0))
    return 1.0 - float(left.var(correction=0)) / variance if variance > 0 else 0.0


def adapted_kl_coef(coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """The coefficient after a batch of ``episodes`` and mean sequence KL ``kl`` (Ziegler et al. 2019)."""
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * episodes / horizon)


def with_missing_eos(scores: Tensor, finished: Tensor, how: str, penalty: float) -> Tensor:
    """Scores ``(B,)`` of responses, those without EOS replaced by ``-penalty`` or less by it.

    ``replace`` is N+'s detail 6.2, ``subtract`` is TRL's ``missing_eos_penalty``.
    """
    if how == "none":
        return scores
    punished = torch.full_like(scores, -penalty) if how == "replace" else scores - penalty
    return torch.where(finished, scores, punished)
