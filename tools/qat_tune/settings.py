"""Learning rates of the weights and of learnt scales."""

from __future__ import annotations

from tuneutils.tools.qat_tune.params import Params

LEARNING_RATES = {"full": 1e-4, "lora": 1e-3}
SCALE_RATE = 1e-3


def learning_rate(params: Params) -> float:
    """The rate given, or the method's own."""
    return LEARNING_RATES[params.method] if params.learning_rate is None else params.learning_rate


def scale_rate(params: Params) -> float:
    return SCALE_RATE if params.scale_learning_rate is None else params.scale_learning_rate
