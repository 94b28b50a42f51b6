"""The evaluation's numbers against brute force."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from tuneutils.tools.rm_train import measures

RNG = np.random.default_rng(7)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("ties", [False, True])
def test_best_of_n_is_the_mean_over_all_subsets(n: int, ties: bool) -> None:
    scores = RNG.integers(0, 3, 6).astype(float) if ties else RNG.normal(size=6)
    values = RNG.normal(size=6)
    means = []
    for subset in combinations(range(6), n):
        best = max(scores[i] for i in subset)
        means.append(np.mean([values[i] for i in subset if scores[i] == best]))
    assert measures.best_of_n(scores, values, n) == pytest.approx(np.mean(means))


def test_best_of_n_refuses_more_than_there_are() -> None:
    with pytest.raises(ValueError, match="best of 3 of 2"):
        measures.best_of_n([1, 2], [1, 2], 3)


def test_best_of_n_curve() -> None:
    curve = measures.best_of_n_curve([([0.0, 1.0], [5.0, 7.0]), ([2.0, 1.0, 0.0], None)], seed=0)
    assert [p["prompts"] for p in curve] == [2, 2, 1]
    assert [p["reward"]["value"] for p in curve] == pytest.approx([0.75, (1 + 5 / 3) / 2, 2.0])
    assert [p["value"]["value"] for p in curve[:2]] == [6.0, 7.0]
    assert "value" not in curve[2]
    assert [p["kl"] for p in curve] == pytest.approx([0, math.log(2) - 1 / 2, math.log(3) - 2 / 3])


def test_ece_by_brute_force() -> None:
    d = RNG.normal(scale=2, size=300)
    p = RNG.choice([0.0, 0.25, 1.0], size=300)
    bins, ece = measures.reliability(d, p, [str(i // 2) for i in range(300)], seed=0)
    total = 0.0
    for low in np.arange(0.5, 1, 0.05):
        inside = [
            (1 / (1 + math.exp(-abs(x))), q if x > 0 else 1 - q)
            for x, q in zip(d, p)
            if low <= 1 / (1 + math.exp(-abs(x))) < low + 0.05
        ]
        if inside:
            total += abs(sum(c for c, _ in inside) - sum(o for _, o in inside))
    assert ece["value"] == pytest.approx(total / 300)
    assert (ece["n"], ece["clusters"]) == (300, 150)
    assert ece["low"] <= ece["high"]
    assert sum(b["n"] for b in bins) == 300


def test_ece_of_a_calibrated_model_goes_to_zero() -> None:
    d = RNG.normal(size=200_000)
    won = RNG.random(200_000) < 1 / (1 + np.exp(-d))
    columns = [str(i % 50) for i in range(200_000)]
    assert measures.reliability(d, won.astype(float), columns, seed=0)[1]["value"] < 0.01


@pytest.mark.parametrize(("factor", "least"), [(1.0, 0.85), (2.0, 0.8)])
def test_interval_of_ece_holds_the_truth(factor: float, least: float) -> None:
    """Scores that are calibrated, or ``factor`` times too large, of 200 pairs at a time.

    The truth is an integral over the distribution of the scores; the percentile interval never holds 0.
    """
    rng = np.random.default_rng(3)
    grid = np.linspace(0, 12, 200_001)  # |log-odds|, half-normal of scale 1.5
    weights = np.exp(-((grid / 1.5) ** 2) / 2)
    sure, right = 1 / (1 + np.exp(-factor * grid)), 1 / (1 + np.exp(-grid))
    at = np.minimum(((sure - 0.5) * 20).astype(int), 9)
    gaps = [np.sum((weights * (sure - right))[at == b]) for b in range(10)]
    truth = float(np.abs(gaps).sum() / weights.sum())
    held = 0
    for seed in range(60):
        odds = rng.normal(scale=1.5, size=200)
        won = (rng.random(200) < 1 / (1 + np.exp(-odds))).astype(float)
        ece = measures.reliability(factor * odds, won, [str(i) for i in range(200)], seed)[1]
        held += ece["low"] <= truth <= ece["high"]
    assert held / 60 >= least


def test_correct_counts_ties_of_the_model_by_half_and_leaves_even_votes_out() -> None:
    found = measures.correct([1.0, -1.0, 0.0, 2.0, -3.0], [1.0, 1.0, 1.0, 0.5, 0.2])
    assert found[:3].tolist() == [1.0, 0.0, 0.5]
    assert math.isnan(found[3])
    assert found[4] == 1.0


def test_cross_entropy() -> None:
    expected = [math.log1p(math.exp(-0.3)), 0.6 * math.log1p(math.exp(1)) + 0.4 * math.log1p(math.exp(-1))]
    assert measures.cross_entropy([0.3, -1.0], [1.0, 0.6]).tolist() == pytest.approx(expected)


def test_correlations() -> None:
    x = RNG.normal(size=200)
    y = np.exp(x) + RNG.normal(size=200)
    found = measures.correlations(x, y, [str(i) for i in range(200)], seed=0)
    assert found["pearson"]["value"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    ranks = [[sum(v < a for v in z) + 1 for a in z] for z in (x, y)]
    assert found["spearman"]["value"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    for one in found.values():
        assert one["low"] < one["value"] < one["high"]
    flat = measures.correlations([1.0, 1.0], [1.0, 2.0], ["a", "b"], seed=0)
    assert flat["pearson"] == {"value": None, "low": None, "high": None, "n": 2, "clusters": 2}


def test_average_ranks_share() -> None:
    assert measures.average_ranks(np.array([3.0, 1.0, 3.0, 2.0, 3.0])).tolist() == [4, 1, 4, 2, 4]


def test_intervals_cover_as_often_as_they_say() -> None:
    covered = 0
    for trial in range(200):
        rng = np.random.default_rng(trial)
        x = rng.normal(size=(60, 2)) @ np.linalg.cholesky([[1, 0.5], [0.5, 1]]).T
        found = measures.correlations(x[:, 0], x[:, 1], [str(i) for i in range(60)], seed=trial)["pearson"]
        covered += found["low"] <= 0.5 <= found["high"]
    assert 0.88 <= covered / 200 <= 0.99


def test_human_ceiling_by_hand() -> None:
    votes = [(1, 2, -1), (3, 0), (1,), (), (-1, -2, -3)]
    found = measures.human_ceiling(votes, [1.0, -1.0, 1.0, 1.0, -2.0], list("abcde"), seed=0)
    assert found is not None
    # a: without the first or second the others are even; without the third they say +. b: the others of the
    # first are even; of the second say +. e: thrice -.
    assert found["rater"]["n"] == 5
    assert found["rater"]["value"] == pytest.approx((0 + 0.5 + 3) / 5)
    assert found["model"]["value"] == pytest.approx((1 + 0 + 3) / 5)
    assert measures.human_ceiling([(1,), ()], [1.0, 1.0], ["a", "b"], seed=0) is None


def test_bins_hold_each_pair_once() -> None:
    sizes = np.array([0.1, 0.2, 0.2, 0.7, 1.0, np.nan])
    hits = np.array([1.0, 0.0, 1.0, np.nan, 1.0, 1.0])
    found = measures.by_bin(hits, sizes, [0.1, 0.2, 0.5, 1.0], list("abcdef"), seed=0)
    assert [(b["from"], b["accuracy"]["n"], b["accuracy"]["value"]) for b in found] == [
        (0.1, 1, 1.0),
        (0.2, 2, 0.5),
        (0.5, 1, 1.0),
    ]
