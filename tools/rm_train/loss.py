"""The loss of a reward model on pairs."""

from __future__ import annotations

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

from torch import Tensor  # isort: skip
from torch.nn.functional import binary_cross_entropy_with_logits


def bradley_terry(
    chosen: Tensor, rejected: Tensor, target: Tensor, margin: Tensor, centre: float = 0.0
) -> Tensor:
    """Each pair's loss ``(n,)``, in nats.

    The cross-entropy between ``target``, the probability that chosen is preferred, and its model
    σ(r_c - r_r - m); with target 1 that is -log σ(r_c - r_r - m) (Touvron et al. 2023, Llama 2, equation
    2). Added to it is ``centre`` · (r_c + r_r)² (Eisenstein et al. 2023, arXiv 2312.09244, equation 2).
    """
    logits = chosen - rejected - margin
    loss = binary_cross_entropy_with_logits(logits, target, reduction="none")
    return loss + centre * (chosen + rejected).square() if centre else loss
