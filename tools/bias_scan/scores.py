"""The scores of a data scan: representation of each axis and group, association of each pair of groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from tuneutils.tools.bias_scan import association
from tuneutils.tools.bias_scan.intervals import Bounds, jackknife, percentiles, resampled_sums
from tuneutils.tools.bias_scan.report import Score
from tuneutils.tools.bias_scan.tally import SHARDS, Tally

Floats = NDArray[np.float64]
Found = tuple[float | None, Bounds, dict[str, float | int | None]]
TVD = (
    "total variation 1/2 sum |target_g - p_g|, p_g the group's share of the axis's mentions; target {target}"
)
PER_TERM = "as representation, with mentions divided by the number of the group's terms before (HELM)"
SHARE = "share of the axis's mentions"
ROWS = "share of all rows that name the group"
GENBIT = (
    "GenBit (Sengupta et al. 2021): mean |ln P(w|a)/P(w|b)|, P(w|g) = (1 + near)/(mentions + vocabulary), "
    "over neutral words in the upper fifth of counts; weights {decay:g}^distance within {size} content words"
)
NPMI = "mean |nPMI(w,a) - nPMI(w,b)| (Bouma 2009; Aka et al. 2021) over the same words, where seen near both"
COBS = (
    "COBS (Bordia and Bowman 2019): mean |log10 [(c_a/T_a)/(n_a/N)] / [(c_b/T_b)/(n_b/N)]| over the same "
    "words, where seen near both"
)
CHANCE_DRAWS = 200


@dataclass(frozen=True)
class Pair:
    """Two groups of an axis, or one and the rest of its axis, and the words that their scores ask about.

    Attributes:
        words: ``(k,)`` indices of the words asked about.
        ratios: ``(k,)`` their log-ratios.
        near: ``(2, k)`` their counts near each side; ``totals``: ``(2,)`` those of all words.
        first, second: group numbers of the sides.
    """

    words: NDArray[np.int64]
    ratios: Floats
    near: Floats
    totals: Floats
    first: tuple[int, ...]
    second: tuple[int, ...]


class Scores:
    """All scores of a tally, and the words behind them.

    Attributes:
        words: the words of all shards, sorted.
        pairs: ``axis.pair`` → what its scores ask about.
    """

    def __init__(self, tally: Tally, targets: Mapping[int, Floats], minimum: int, seed: int) -> None:
        self._tally, self._targets, self._minimum, self._seed = tally, targets, minimum, seed
        columns = [near.words for near in tally.near]
        self.words = sorted(set().union(*columns))
        place = {word: i for i, word in enumerate(self.words)}
        #: Of each shard: where its words stand among all, and in its own tables.
        self._columns = [
            (np.array([place[w] for w in own], dtype=np.int64), np.array(list(own.values()), dtype=np.int64))
            for own in columns
        ]
        self._neutral: dict[int, NDArray[np.bool_]] = {}
        self._of_axis: dict[int, Floats] = {}
        self.pairs: dict[str, Pair] = {}
        self.members = [np.flatnonzero(tally.matcher.group_axis == a) for a in range(len(tally.matcher.axes))]

    def all(self) -> list[Score]:
        made = []
        for axis in range(len(self.members)):
            made += self._representation(axis) + self._shares(axis) + self._associations(axis)
        return made

    def _representation(self, axis: int) -> list[Score]:
        members = self.members[axis]
        counts = self._tally.mentions[:, members].astype(np.float64)
        n = int(counts.sum())
        stated = axis in self._targets
        target = self._targets.get(axis, np.full(len(members), 1 / len(members)))
        sizes = self._tally.matcher.terms_per_group[members]
        formulas = {"representation": TVD.format(target="as stated" if stated else "uniform")}
        formulas["representation-per-term"] = PER_TERM
        made = []
        for (metric, formula), divisor in zip(formulas.items(), (np.ones(len(members)), sizes)):
            value = _tvd(counts.sum(axis=0, keepdims=True) / divisor, target)[0] if n else None
            bounds: Bounds = (None, None)
            extra = {}
            if n:
                bounds = percentiles(_tvd(resampled_sums(counts, self._seed) / divisor, target))
                extra = {"chance": self._tvd_by_chance(n, target)} if metric == "representation" else {}
            made.append(self._score(axis, "", metric, formula, n, value, bounds, extra))
        return made

    def _tvd_by_chance(self, n: int, target: Floats) -> float:
        """Mean of the score if n mentions fell to the groups at random with the target's shares."""
        drawn = np.random.default_rng(self._seed).multinomial(n, target / target.sum(), size=CHANCE_DRAWS)
        return float(_tvd(drawn.astype(np.float64), target).mean())

    def _shares(self, axis: int) -> list[Score]:
        tally, members = self._tally, self.members[axis]
        named = tally.mentions[:, members].astype(np.float64)
        total = named.sum()
        rows = tally.rows_with[:, members].astype(np.float64)
        shares = _with_bounds(named, named.sum(axis=1), self._seed)
        covers = _with_bounds(rows, tally.bucket_rows.astype(np.float64), self._seed)
        made = []
        for i, number in enumerate(members.tolist()):
            group = tally.matcher.groups[number][1]
            extra = {"mentions": int(named[:, i].sum())}
            made.append(self._score(axis, group, "share", SHARE, int(total), *shares[i], extra))
            score = self._score(
                axis, group, "rows", ROWS, tally.rows, *covers[i], {"rows": int(rows[:, i].sum())}
            )
            made.append(Score(**(vars(score) | {"unit": "rows"})))
        return made

    def _score(
        self, axis: int, group: str, metric: str, formula: str, n: int, value: float | None, bounds: Bounds,
        extra: Mapping[str, float | int | None],
    ) -> Score:  # fmt: skip
        name = self._tally.matcher.axes[axis]
        return Score(name, group, metric, formula, n, value, *bounds, self._minimum, "mentions", "", extra)

    def _associations(self, axis: int) -> list[Score]:
        made = []
        for name, first, second in self._sides(axis):
            mentions = self._mentions(first), self._mentions(second)
            n = int(min(m.sum() for m in mentions))
            window = self._tally.near[0].window
            formulas = {
                "genbit": GENBIT.format(decay=window.decay, size=window.size),
                "npmi": NPMI,
                "cobs": COBS,
            }
            found: dict[str, Found] = {}
            if n >= self._minimum:
                found = self._associate(axis, name, first, second, np.stack(mentions, axis=1))
            for metric, formula in formulas.items():
                value, bounds, extra = found.get(metric, (None, (None, None), {}))
                made.append(self._score(axis, name, metric, formula, n, value, bounds, extra))
        return made

    def _sides(self, axis: int) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """Every pair of an axis of up to three groups; of more, each that is named against the rest."""
        groups = self._tally.matcher.groups
        members = self.members[axis].tolist()
        if len(members) <= 3:
            return [(f"{groups[a][1]}:{groups[b][1]}", (a,), (b,)) for a, b in combinations(members, 2)]
        named = [i for i in members if self._tally.mentions[:, i].any()]
        return [(f"{groups[i][1]}:rest", (i,), tuple(m for m in members if m != i)) for i in named]

    def _mentions(self, side: tuple[int, ...]) -> Floats:
        """``(SHARDS,)``; a bucket is CRC modulo 256, a shard modulo 8."""
        counts = self._tally.mentions[:, list(side)].sum(axis=1).astype(np.float64)
        return counts.reshape(-1, SHARDS).sum(axis=0)

    def _near(self, side: tuple[int, ...]) -> Floats:
        """``(SHARDS, words)``."""
        made = np.zeros((SHARDS, len(self.words)))
        for shard, (to, source) in enumerate(self._columns):
            near = self._tally.near[shard]
            for group in side:
                if group in near.tables:
                    made[shard, to] += near.table(group)[source]
        return made

    def _both(self, axis: int, first: tuple[int, ...], second: tuple[int, ...]) -> Floats:
        """``(SHARDS, 2, words)``; the rest of an axis is all of it but the first group."""
        near = self._near(first)
        if len(first) + len(second) < len(self.members[axis]):
            return np.stack([near, self._near(second)], axis=1)
        if axis not in self._of_axis:
            self._of_axis = {axis: self._near(tuple(self.members[axis].tolist()))}
        return np.stack([near, self._of_axis[axis] - near], axis=1)

    def _associate(
        self, axis: int, name: str, first: tuple[int, ...], second: tuple[int, ...], mentions: Floats
    ) -> dict[str, Found]:
        vocabulary, tokens = len(self.words), self._tally.tokens
        near = self._both(axis, first, second)
        here = near.any(axis=(0, 1))
        neutral = self.neutral(axis)[here]
        # One array a shard for the jackknife: counts of words, and in the last column the mentions.
        shards = np.concatenate([near[:, :, here], mentions[:, :, None]], axis=2)

        def statistic(summed: Floats) -> Floats:
            near, mentions = summed[:, :-1], summed[:, -1]
            asked = association.eligible(near.sum(axis=0), neutral)
            return association.all_three(near[:, asked], near.sum(axis=1), mentions, tokens, vocabulary)

        found = jackknife(statistic, shards)
        whole = shards.sum(axis=0)
        near, mentions = whole[:, :-1], whole[:, -1]
        asked = association.eligible(near.sum(axis=0), neutral)
        near, totals = near[:, asked], near.sum(axis=1)
        ratios = association.log_ratios(near, mentions, vocabulary)
        pair = Pair(np.flatnonzero(here)[asked], ratios, near, totals, first, second)
        self.pairs[f"{self._tally.matcher.axes[axis]}.{name}"] = pair
        chance = np.full(3, np.nan)
        if totals.all():
            dealt = association.by_chance(near, totals, self._seed)
            each = [association.all_three(d, totals, mentions, tokens, vocabulary) for d in dealt]
            chance = np.stack(each).mean(axis=0)
        return {
            metric: (value, bounds, {"chance": float(by_chance), "words": int(asked.sum())})
            for metric, (value, bounds), by_chance in zip(association.METRICS, found, chance)
        }

    def neutral(self, axis: int) -> NDArray[np.bool_]:
        """``(words,)``: which are no terms of the axis."""
        if axis not in self._neutral:
            terms = self._tally.matcher.words_of(axis)
            self._neutral[axis] = np.array([word not in terms for word in self.words], dtype=bool)
        return self._neutral[axis]


def _tvd(counts: Floats, target: Floats) -> Floats:
    """``(k,)`` of ``(k, groups)`` counts; NaN where all are zero."""
    total = counts.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.abs(target - counts / total).sum(axis=1) / 2


def _with_bounds(counts: Floats, totals: Floats, seed: int) -> list[tuple[float | None, Bounds]]:
    """Each column's share of the totals with the bootstrap interval over buckets."""
    if not totals.sum():
        return [(None, (None, None))] * counts.shape[1]
    sums = resampled_sums(np.column_stack([counts, totals]), seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = sums[:, :-1] / sums[:, -1:]
    values = counts.sum(axis=0) / totals.sum()
    return [(float(value), percentiles(column)) for value, column in zip(values, ratios.T)]
