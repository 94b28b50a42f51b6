"""How words near mentions of one group differ from those near another: GenBit, nPMI, COBS.

All work on ``near``, ``(2, words)`` counts of words within a window of a mention, each weighted by
decay ** distance (decay 1 counts them plainly), and ask about the same words, those of :func:`eligible`.
``totals`` are the ``(2,)`` sums over all words, asked about or not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
CHANCE_DRAWS = 20
METRICS = ("genbit", "npmi", "cobs")


def eligible(total: Floats, neutral: Bools) -> Bools:
    """Words that the scores ask about.

    Neutral words (no terms of the axis) whose count near both groups, plus one for each (GenBit's smoothing),
    is at least the 80th percentile of such counts above 2, which are those of all words seen near either.

    Args:
        total: ``(words,)`` counts near both groups together.
        neutral: ``(words,)``.
    """
    smoothed = total + 2.0
    seen = smoothed[smoothed > 2.0]
    if not len(seen):
        return np.zeros(len(total), dtype=bool)
    return neutral & (smoothed > 2.0) & (smoothed >= np.percentile(seen, 80))


def log_ratios(near: Floats, mentions: Floats, vocabulary: int) -> Floats:
    """``(words,)``: ``ln P(w | first) / P(w | second)`` (Sengupta et al. 2021, GenBit, section 3).

    ``P(w | g) = (1 + near) / (mentions + vocabulary)``.
    """
    given = (near + 1.0) / (mentions + vocabulary)[:, None]
    return np.log(given[0] / given[1])


def genbit(near: Floats, mentions: Floats, vocabulary: int) -> float:
    """GenBit's score: the mean absolute log-ratio; NaN without words."""
    return _mean(np.abs(log_ratios(near, mentions, vocabulary)))


def npmi(near: Floats, totals: Floats) -> Floats:
    """Normalised pointwise mutual information of words and groups (Bouma 2009; Aka et al. 2021).

    ``ln[p(w, g) / (p(w) p(g))] / -ln p(w, g)`` with ``p(w, g)`` the share of all counts near the groups.

    Returns:
        ``(2, words)``; -1, its limit, where a word never stands near the group; NaN for unseen words.
    """
    joint, group = near / totals.sum(), totals / totals.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        made = np.log(joint / (joint.sum(axis=0) * group[:, None])) / -np.log(joint)
    made[(joint == 0.0) & (joint.sum(axis=0) > 0.0)] = -1.0
    made[:, joint.sum(axis=0) == 0.0] = np.nan
    made[joint == 1.0] = np.nan
    return made


def npmi_gap(near: Floats, totals: Floats) -> float:
    """Mean absolute difference of two groups' nPMI over the words seen near both; NaN without one."""
    values = npmi(near[:, (near > 0).all(axis=0)], totals)
    return _mean(np.abs(values[0] - values[1]))


def cobs(near: Floats, totals: Floats, mentions: Floats, tokens: int) -> float:
    """Co-occurrence bias score: mean ``|log10 [(c1/T1)/(n1/N) / ((c2/T2)/(n2/N))]|`` over words near both.

    ``c`` the word's count near the group, ``T`` of all words near it, ``n`` the group's mentions, ``N`` all
    tokens (Bordia and Bowman 2019, section 3). NaN without words or without mentions of a group.
    """
    if not mentions.all():
        return float("nan")
    share = near[:, (near > 0).all(axis=0)] / totals[:, None] / (mentions / tokens)[:, None]
    return _mean(np.abs(np.log10(share[0] / share[1])))


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else float("nan")


def all_three(near: Floats, totals: Floats, mentions: Floats, tokens: int, vocabulary: int) -> Floats:
    """``(3,)``: the scores of ``METRICS``; NaN where there is none."""
    if not totals.all():
        return np.full(3, np.nan)
    found = (
        genbit(near, mentions, vocabulary),
        npmi_gap(near, totals),
        cobs(near, totals, mentions, tokens),
    )
    return np.array(found)


def by_chance(near: Floats, totals: Floats, seed: int) -> Floats:
    """``(CHANCE_DRAWS, 2, words)``: each word's count dealt to the groups at random.

    Binomial with the first group's share of all counts, as if no word leant to either; weights are taken for
    whole counts.
    """
    total = near.sum(axis=0)
    counts = np.ceil(total).astype(np.int64)
    scale = np.divide(total, counts, out=np.zeros_like(total), where=counts > 0)
    rng = np.random.default_rng(seed)
    first = rng.binomial(counts, totals[0] / totals.sum(), size=(CHANCE_DRAWS, len(counts))) * scale
    return np.stack([first, total - first], axis=1)
