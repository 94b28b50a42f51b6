"""Pairs with their scores."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tuneutils.shared.errors import GateFailed
from tuneutils.tools.rm_train.pairs import Pair
from tuneutils.tools.rm_train.reward_model import RewardModel

#: Training pairs that are scored for the normalisation and the accuracy on what was learnt.
SAMPLE = 512


@dataclass(frozen=True)
class Scored:
    """Pairs with the raw scores ``(n,)`` of both sides."""

    pairs: Sequence[Pair]
    chosen: NDArray[np.float64]
    rejected: NDArray[np.float64]

    @property
    def difference(self) -> NDArray[np.float64]:
        made: NDArray[np.float64] = self.chosen - self.rejected
        return made


def score_pairs(rm: RewardModel, pairs: Sequence[Pair], batch_size: int) -> Scored:
    """Score both sides of each pair.

    Raises:
        GateFailed: a score is no number.
    """
    rows = [side.ids for pair in pairs for side in (pair.chosen, pair.rejected)]
    scores = np.array(rm.scores(rows, batch_size, raw=True), dtype=np.float64)
    for pair, *both in zip(pairs, scores[::2], scores[1::2], strict=True):
        for score in both:
            finite(score, pair.place)
    return Scored(pairs, scores[::2], scores[1::2])


def sample(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """At most ``SAMPLE`` of the pairs, in their order."""
    if len(pairs) <= SAMPLE:
        return list(pairs)
    kept = sorted(random.Random(seed).sample(range(len(pairs)), SAMPLE))
    return [pairs[i] for i in kept]


def finite(score: float, place: str) -> float:
    """The score.

    Raises:
        GateFailed: it is NaN or infinite.
    """
    if not math.isfinite(score):
        raise GateFailed(
            f"{place}: the score is {score}; train with a lower --learning-rate, or with --dtype float32"
        )
    return score
