"""The losses of preference tuning, each as its paper writes it, on log-probabilities of whole completions.

Names: ``logratio = log π(y|x) − log π_ref(y|x)``; an average is over the completion's tokens, EOS included.
A target is the probability that ``chosen`` is the better one: 1 for a plain preference, the share of votes
for a voted one. Every paired loss ℓ but ORPO's likelihood term is a function of one number h, and a soft
target p gives ``p ℓ(h) + (1 − p) ℓ(−h)``.
"""

from __future__ import annotations

from dataclasses import dataclass

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class Kind:
    """What a loss works on.

    Attributes:
        beta: its β (IPO's τ, ORPO's λ) where none is given.
        reference: it compares with the reference model.
        averaged: it works on averages over tokens rather than sums.
    """

    beta: float
    reference: bool
    averaged: bool
    about: str


KINDS = {
    "dpo": Kind(0.1, True, False, "Rafailov et al. 2023, arXiv 2305.18290, equation 7"),
    "cdpo": Kind(0.1, True, False, "DPO with smoothed labels (Mitchell 2023)"),
    "robust": Kind(0.1, True, False, "Chowdhury et al. 2024, arXiv 2403.00409, equation 8"),
    "ipo": Kind(0.1, True, True, "Azar et al. 2023, arXiv 2310.12036, equation 17, per token"),
    "dpo-norm": Kind(5.0, True, True, "length-normalised DPO (Lambert et al. 2024, arXiv 2411.15124)"),
    "simpo": Kind(2.0, False, True, "Meng et al. 2024, arXiv 2405.14734, equation 6"),
    "kto": Kind(0.1, True, False, "Ethayarajh et al. 2024, arXiv 2402.01306, equation 8"),
    "orpo": Kind(0.1, False, True, "Hong et al. 2024, arXiv 2403.07691, equations 6 to 8"),
}
SMOOTHED = ("cdpo", "robust")


@dataclass(frozen=True)
class Objective:
    """A loss with its constants.

    Attributes:
        smoothing: ε of ``cdpo`` and ``robust``: the share of labels taken to be flipped.
        gamma: SimPO's target margin.
        desirable_weight, undesirable_weight: KTO's λ_D and λ_U.
    """

    name: str
    beta: float
    smoothing: float = 0.0
    gamma: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    def score(self, logprob: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
        """What the loss compares: of a completion's log-probability, the reference's, and its tokens."""
        scores = logprob - reference if self.kind.reference else logprob
        return scores / tokens if self.kind.averaged else scores

    def reward(self, logprob: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
        """The implicit reward: β times the score (DPO, equation 5 without its prompt's constant)."""
        return self.beta * self.score(logprob, reference, tokens)


def pair_losses(
    objective: Objective, chosen: Tensor, rejected: Tensor, target: Tensor, margin: Tensor
) -> Tensor:
    """Losses ``(n,)`` of pairs.

    Args:
        chosen, rejected: scores ``(n,)`` of ``Objective.score``.
        target: ``(n,)``, the probability that chosen is the better one.
        margin: ``(n,)`` of reward by which chosen should be ahead (ODPO, Amini et al. 2024,
            arXiv 2402.10571, equation 7); 0 for none. Losses that aim at a given distance ignore it.
    """
    if objective.name == "orpo":
        return orpo(chosen, rejected, target, objective.beta)
    difference = chosen - rejected
    if objective.name == "ipo":
        return target * ipo(difference, objective.beta) + (1 - target) * ipo(-difference, objective.beta)
    h = objective.beta * difference - margin
    if objective.name == "simpo":
        h = h - objective.gamma
        return -target * logsigmoid(h) - (1 - target) * logsigmoid(-h - 2 * objective.gamma)
    ahead = -target * logsigmoid(h) - (1 - target) * logsigmoid(-h)
    if objective.name not in SMOOTHED:
        return ahead
    behind = -target * logsigmoid(-h) - (1 - target) * logsigmoid(h)
    epsilon = objective.smoothing
    if objective.name == "cdpo":
        return (1 - epsilon) * ahead + epsilon * behind
    return ((1 - epsilon) * ahead - epsilon * behind) / (1 - 2 * epsilon)


def ipo(difference: Tensor, tau: float) -> Tensor:
    """``(h − 1/(2τ))²``."""
    return (difference - 1 / (2 * tau)) ** 2


def orpo(chosen: Tensor, rejected: Tensor, target: Tensor, coefficient: float) -> Tensor:
    """``−log p(chosen) − λ log σ(log odds(chosen) / odds(rejected))`` of average log-probabilities.

    ``odds(p) = p / (1 − p)``, equation 4. The likelihood term is of the completion alone, as the paper has
    it; TRL's counts the prompt too.
    """
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    ratio = -target * logsigmoid(log_odds) - (1 - target) * logsigmoid(-log_odds)
    return -chosen + coefficient * ratio


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 − exp(x))`` for ``x < 0``, without loss of digits (Mächler 2012); finite at 0."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = torch.log(-torch.expm1(x.clamp(min=-1.0)))
    far = torch.log1p(-torch.exp(x.clamp(max=-0.5)))
    return torch.where(x > -0.6931472, near, far)


def kto_losses(objective: Objective, logratio: Tensor, desirable: Tensor, baseline: Tensor) -> Tensor:
    """Losses ``(n,)`` of single completions, ``λ_y − v`` of equation 8 with λ_y as weight of the whole.

    Args:
        logratio: ``(n,)``.
        desirable: ``(n,)`` of booleans.
        baseline: z₀, of ``kto_baseline``.
    """
    sign = torch.where(desirable, 1.0, -1.0).to(logratio.dtype)
    weight = torch.where(desirable, objective.desirable_weight, objective.undesirable_weight)
    return weight * (1 - torch.sigmoid(objective.beta * sign * (logratio - baseline)))


def kto_baseline(logratios: Tensor) -> Tensor:
    """z₀, an estimate of KL(π ‖ π_ref) that no gradient goes through: the mean log-ratio of completions of
    other prompts, at least 0 (section 4.1).
    """
    return logratios.detach().mean().clamp(min=0)
