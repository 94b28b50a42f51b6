"""How words near mentions of one group differ from those near another: GenBit, nPMI, COBS.

All work on ``near``, the counts of words within a window of a mention, each weighted by decay ** distance
(decay 1 counts them plainly). A "neutral" word is none of the axis's own terms.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
#: Quantile .975 of Student's t with 1 to 30 degrees of freedom.
T_975 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)


def genbit(near: Floats, mentions: Floats, neutral: Bools, vocabulary: int) -> tuple[float | None, Floats]:
    """GenBit's score and the log-ratio of every word (Sengupta et al. 2021, GenBit).

    ``P(w | g) = (1 + near) / (mentions of g + vocabulary)``; the score is the mean of
    ``|ln P(w | first) / P(w | second)|`` over the neutral words whose smoothed count in both is at least the
    80th percentile of such counts above 2.

    Args:
        near: ``(2, words)``.
        mentions: ``(2,)``.
        neutral: ``(words,)``.

    Returns:
        The score, None without eligible words, and ``(words,)`` log-ratios, NaN where not eligible.
    """
    smoothed = near + 1.0
    total = smoothed.sum(axis=0)
    seen = total[total > 2.0]
    logs = np.full(near.shape[1], np.nan)
    if not len(seen):
        return None, logs
    eligible = neutral & (total > 2.0) & (total >= np.percentile(seen, 80))
    if not eligible.any():
        return None, logs
    given = smoothed / (mentions + vocabulary)[:, None]
    logs[eligible] = np.log(given[0, eligible] / given[1, eligible])
    return float(np.abs(logs[eligible]).mean()), logs


def npmi(near: Floats) -> Floats:
    """Normalised pointwise mutual information of words and groups (Bouma 2009; Aka et al. 2021).

    ``ln[p(w, g) / (p(w) p(g))] / -ln p(w, g)`` with ``p(w, g)`` the share of all counts of the axis.

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


def npmi_gap(near: Floats, eligible: Bools) -> float | None:
    """Mean absolute difference of two groups' nPMI over the eligible words seen near both."""
    if not near.sum(axis=1).all():
        return None
    values = npmi(near)
    good = eligible & (near > 0).all(axis=0)
    return float(np.abs(values[0, good] - values[1, good]).mean()) if good.any() else None


def cobs(near: Floats, mentions: Floats, tokens: int, eligible: Bools) -> float | None:
    """Co-occurrence bias score: mean ``|log10 [(c1/T1)/(n1/N) / ((c2/T2)/(n2/N))]|``.

    ``c`` the word's count near the group, ``T`` of all words near it, ``n`` the group's mentions, ``N`` all
    tokens (Bordia and Bowman 2019, section 3). Words not seen near both groups have no ratio.

    Args:
        near: ``(2, words)``.
        mentions: ``(2,)``.
    """
    good = eligible & (near > 0).all(axis=0)
    if not good.any() or not mentions.all():
        return None
    share = near[:, good] / near.sum(axis=1)[:, None] / (mentions / tokens)[:, None]
    return float(np.abs(np.log10(share[0] / share[1])).mean())


def jackknife(
    statistic: Callable[[Floats], float | None], buckets: Floats, value: float | None
) -> tuple[float | None, float | None]:
    """95 % interval of a statistic of summed buckets, by the delete-a-group jackknife (Kott 2001).

    Args:
        statistic: of the sum of buckets; None where it has no value.
        buckets: ``(K, ...)``.

    Returns:
        ``value -+ t(.975, K-1) * SE``, or Nones when it fails without one of the buckets.
    """
    whole = buckets.sum(axis=0)
    left = [statistic(whole - part) for part in buckets]
    if value is None or any(v is None for v in left) or len(buckets) < 2:
        return None, None
    each = np.array(left, dtype=np.float64)
    k = len(each)
    spread = T_975[min(k - 1, 30) - 1] * float(np.sqrt((k - 1) / k * ((each - each.mean()) ** 2).sum()))
    return value - spread, value + spread
