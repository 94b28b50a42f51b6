"""Sentiment of the sampled rows of each group, by VADER (Hutto and Gilbert 2014): a word list with rules."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from tuneutils.tools.bias_scan.report import Score
from tuneutils.tools.bias_scan.tally import Tally

FORMULA = "mean VADER compound (-1 to 1) of sampled rows that name the group; mean -+ 1.96 s/sqrt(n)"
GAP = "|difference of two groups' mean VADER compound|, rows that name both left out; Welch's interval"
MINIMUM = 30


def sentiment(tally: Tally) -> list[Score]:
    """A score a group; gaps of pairs up to three groups, else of each against the rest."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyser = SentimentIntensityAnalyzer()
    known: dict[str, float] = {}
    made: list[Score] = []
    for axis, name in enumerate(tally.matcher.axes):
        members = np.flatnonzero(tally.matcher.group_axis == axis).tolist()
        texts = {i: {row.text for row in tally.sampled(i)} for i in members if i in tally.samples}
        for text in set().union(*texts.values()):
            if text not in known:
                known[text] = float(analyser.polarity_scores(text)["compound"])
        for i, found in texts.items():
            values = np.array([known[t] for t in sorted(found)])
            made.append(_mean(name, tally.matcher.groups[i][1], values))
        made += _gaps(
            tally, name, {i: {t: known[t] for t in found} for i, found in texts.items()}, len(members)
        )
    return made


def _mean(axis: str, group: str, values: NDArray[np.float64]) -> Score:
    half = 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    value = float(values.mean())
    low, high = max(-1.0, value - half), min(1.0, value + half)
    n = len(values)
    return Score(axis, group, "sentiment", FORMULA, n, value, low, high, MINIMUM, "sampled rows")


def _gaps(tally: Tally, axis: str, texts: dict[int, dict[str, float]], groups: int) -> list[Score]:
    made = []
    if groups <= 3:
        sides = [((a,), (b,)) for a, b in combinations(texts, 2)]
    else:
        sides = [((a,), tuple(b for b in texts if b != a)) for a in texts]
    for first, second in sides:
        left, right = texts[first[0]], {t: v for i in second for t, v in texts[i].items()}
        a = np.array([v for t, v in sorted(left.items()) if t not in right])
        b = np.array([v for t, v in sorted(right.items()) if t not in left])
        other = tally.matcher.groups[second[0]][1] if groups <= 3 else "rest"
        name = f"{tally.matcher.groups[first[0]][1]}:{other}"
        made.append(_gap(axis, name, a, b))
    return made


def _gap(axis: str, name: str, a: NDArray[np.float64], b: NDArray[np.float64]) -> Score:
    n = min(len(a), len(b))
    score = Score(axis, name, "sentiment-gap", GAP, n, minimum=MINIMUM, unit="sampled rows")
    if n < 2:
        return score
    gap = float(a.mean() - b.mean())
    half = 1.96 * float(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b)) ** 0.5
    return Score(**(vars(score) | {"value": abs(gap)} | dict(zip(("low", "high"), _folded(gap, half)))))


def _folded(gap: float, half: float) -> tuple[float, float]:
    """The interval of ``|gap|``: from zero where that of the gap holds zero."""
    low, high = gap - half, gap + half
    if low <= 0 <= high:
        return 0.0, max(-low, high)
    return min(abs(low), abs(high)), max(abs(low), abs(high))
