"""Pairs with their scores."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip

from tuneutils.shared.errors import GateFailed
from tuneutils.shared.pairs import Pair
from tuneutils.shared.reward_model import RewardModel
from tuneutils.tools.rm_train.packed import PairReader, pack, packed_length

#: Training pairs that are scored for the normalisation and the accuracy on what was learnt.
SAMPLE = 256


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
    """Score both sides of each pair, packed into one row where the model allows it.

    Args:
        batch_size: pairs of one forward pass.

    Raises:
        GateFailed: a score is no number.
    """
    sides = [[getattr(p, side).ids for p in pairs] for side in ("chosen", "rejected")]
    lengths = [packed_length(c, r) for c, r in zip(*sides, strict=True)]
    rm.model.eval()
    with PairReader(rm.model) as reader, rm.autocast(), torch.no_grad():
        if reader.agrees(rm.model, max(lengths)):
            made = np.zeros((2, len(pairs)))
            order = sorted(range(len(pairs)), key=lambda i: (lengths[i], i))
            for start in range(0, len(order), batch_size):
                at = order[start : start + batch_size]
                batch = pack(*([side[i] for i in at] for side in sides), rm.tokenizer.pad_token_id)
                found = reader(rm.model, {k: v.to(rm.where) for k, v in batch.items()})
                made[:, at] = torch.stack(found).float().cpu().numpy()
        else:
            made = np.array([rm.scores(side, 2 * batch_size, raw=True) for side in sides])
    for pair, *both in zip(pairs, *made, strict=True):
        for score in both:
            finite(score, pair.place)
    return Scored(pairs, made[0], made[1])


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
