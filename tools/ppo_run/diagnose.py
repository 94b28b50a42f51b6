"""What the numbers of a run say when it goes wrong, each by a name and with its likely causes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tuneutils.tools.ppo_run.params import Params

Line = dict[str, Any]
REPEAT_AFTER = 20
CLIP_FRACTION = 0.3
NEAR_LIMIT = 0.98
SHORTEST_LIMIT = 8
RATIO_TOLERANCE = 1e-6


def is_constant(line: Line) -> bool:
    """Whether all completions of the batch had one reward."""
    spread, size = float(line["reward_std"]), abs(float(line["reward"]))
    return spread <= 1e-9 * max(1.0, size)


def _ratio(log: Sequence[Line], _params: Params) -> bool:
    return bool(log[-1].get("first_ratio_deviation", 0.0) > RATIO_TOLERANCE)


def _constant(log: Sequence[Line], _params: Params) -> bool:
    return is_constant(log[-1])


def _negative_kl(log: Sequence[Line], _params: Params) -> bool:
    """Below zero by more than the k1 estimate's own noise, and falling."""
    recent = [line["kl"] for line in log[-3:]]
    return len(recent) == 3 and max(recent) < -0.5 and recent[0] > recent[1] > recent[2]


def _exploding_kl(log: Sequence[Line], params: Params) -> bool:
    return bool(log[-1]["kl"] > 10 * (params.kl_target or params.kl_budget or 10.0))


def _too_long(log: Sequence[Line], params: Params) -> bool:
    limit = params.max_new_tokens
    near = log[-1]["length"] >= NEAR_LIMIT * limit and log[-1]["finished"] < 0.05
    return bool(limit >= SHORTEST_LIMIT and near)


def _clipped(log: Sequence[Line], _params: Params) -> bool:
    return bool(log[-1].get("clip_fraction", 0.0) > CLIP_FRACTION)


def _bad_value(log: Sequence[Line], _params: Params) -> bool:
    recent = [line.get("explained_variance", 0.0) for line in log[-5:]]
    return len(recent) == 5 and max(recent) < 0


#: name → (what it looks like, what it usually comes from)
DIAGNOSES: dict[str, tuple[Callable[[Sequence[Line], Params], bool], str]] = {
    "ratio": (
        _ratio,
        "the probability ratio is not 1 before any update: temperature, dropout, positions or padding differ "
        "between the old and the new log-probabilities",
    ),
    "constant-reward": (
        _constant,
        "all completions of the batch have one reward: it is constant, or responses never differ",
    ),
    "negative-kl": (
        _negative_kl,
        "the KL from the reference is negative and falling: sampling is truncated, or EOS is mistreated",
    ),
    "exploding-kl": (
        _exploding_kl,
        "the KL from the reference explodes: raise --kl-coef or lower --learning-rate, and read the samples, "
        "which show whether the reward is being hacked",
    ),
    "length": (
        _too_long,
        "responses run to --max-new-tokens without EOS: penalise that (--missing-eos), allow more tokens, or "
        "doubt the reward, which may like length",
    ),
    "clip-fraction": (
        _clipped,
        "over 30 % of the tokens are clipped: lower --learning-rate or --ppo-epochs",
    ),
    "explained-variance": (
        _bad_value,
        "the value model explains less than nothing: raise --value-learning-rate, start it from the reward "
        "model, or scale the reward",
    ),
}


def diagnose(log: Sequence[Line], params: Params, warned: dict[str, int]) -> list[str]:
    """Warnings for the last line of the log, none of them twice within ``REPEAT_AFTER`` updates.

    Args:
        warned: name → update of the last warning; changed here.
    """
    made = []
    update = int(log[-1]["update"])
    for name, (applies, text) in DIAGNOSES.items():
        if applies(log, params) and update - warned.get(name, -REPEAT_AFTER) >= REPEAT_AFTER:
            warned[name] = update
            made.append(f"{name}: {text}")
    return made
