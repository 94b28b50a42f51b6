"""How words near mentions of one group differ from those near another: GenBit, nPMI, COBS.

All work on ``near``, ``(2, words)`` counts of words within a window of a mention, each weighted by
decay ** distance (decay 1 counts them plainly), and ask about the same words: neutral ones (no terms of the
axis) whose smoothed count is in the upper fifth.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
CHANCE_DRAWS = 20


def eligible(near: Floats, neutral: Bools) -> Bools:
    """Words that the scores ask about.

    Neutral words whose count near both groups, plus one for each (GenBit's smoothing), is at least the 80th
    percentile of such counts above 2, which are those of all words seen near either group.

    Args:
        near: ``(2, words)``.
        neutral: ``(words,)``.
    """
    total = near.sum(axis=0) + 2.0
    seen = total[total > 2.0]
    if not len(seen):
        return np.zeros(near.shape[1], dtype=bool)
    return neutral & (total > 2.0) & (total >= np.percentile(seen, 80))


def log_ratios(near: Floats, mentions: Floats, vocabulary: int) -> Floats:
    """``(words,)``: ``ln P(w | first) / P(w | second)`` (Sengupta et al. 2021, GenBit, section 3).

    ``P(w | g) = (1 + near) / (mentions + vocabulary)``.
    """
    given = (near + 1.0) / (mentions + vocabulary)[:, None]
    return np.log(given[0] / given[1])


def genbit(near: Floats, mentions: Floats, words: Bools, vocabulary: int) -> float | None:
    """GenBit's score: the mean absolute log-ratio over ``words``."""
    if not words.any():
        return None
    return float(np.abs(log_ratios(near[:, words], mentions, vocabulary)).mean())


def npmi(near: Floats) -> Floats:
    """Normalised pointwise mutual information of words and groups (Bouma 2009; Aka et al. 2021).

    ``ln[p(w, g) / (p(w) p(g))] / -ln p(w, g)`` with ``p(w, g)`` the share of all counts near the groups.

    Args:
        near: ``(groups, words)``.

    Returns:
        ``(groups, words)``; -1, its limit, where a word never stands near the group; NaN for unseen words.
    """
    joint = near / near.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        made = np.log(joint / (joint.sum(axis=0) * joint.sum(axis=1)[:, None])) / -np.log(joint)
    made[(joint == 0.0) & (joint.sum(axis=0) > 0.0)] = -1.0
    made[:, joint.sum(axis=0) == 0.0] = np.nan
    made[joint == 1.0] = np.nan
    return made


def npmi_gap(near: Floats, words: Bools) -> float | None:
    """Mean absolute difference of two groups' nPMI over the words seen near both."""
    good = words & (near > 0).all(axis=0)
    if not good.any():
        return None
    values = npmi(near)[:, good]
    return float(np.abs(values[0] - values[1]).mean())


def cobs(near: Floats, mentions: Floats, tokens: int, words: Bools) -> float | None:
    """Co-occurrence bias score: mean ``|log10 [(c1/T1)/(n1/N) / ((c2/T2)/(n2/N))]|`` over words near both.

    ``c`` the word's count near the group, ``T`` of all words near it, ``n`` the group's mentions, ``N`` all
    tokens (Bordia and Bowman 2019, section 3).

    Args:
        near: ``(2, words)``.
        mentions: ``(2,)``.
    """
    good = words & (near > 0).all(axis=0)
    if not good.any() or not mentions.all():
        return None
    share = near[:, good] / near.sum(axis=1)[:, None] / (mentions / tokens)[:, None]
    return float(np.abs(np.log10(share[0] / share[1])).mean())


def by_chance(near: Floats, seed: int) -> Floats:
    """``(CHANCE_DRAWS, 2, words)``: each word's count dealt to the groups at random.

    Binomial with the first group's share of all counts, as if no word leant to either; weights are taken for
    whole counts.
    """
    total = near.sum(axis=0)
    share = near[0].sum() / total.sum()
    counts = np.ceil(total).astype(np.int64)
    scale = np.divide(total, counts, out=np.zeros_like(total), where=counts > 0)
    rng = np.random.default_rng(seed)
    first = rng.binomial(counts, share, size=(CHANCE_DRAWS, len(counts))) * scale
    return np.stack([first, total - first], axis=1)
