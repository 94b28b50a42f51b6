"""Intervals, differences, Mann-Whitney, WEAT: against closed forms, other implementations and enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tuneutils.shared.evaluate import paired_difference, ratio_estimate
from tuneutils.tools.bias_scan.models import weat
from tuneutils.tools.bias_scan.models.estimates import (
    Measure,
    Settings,
    cluster,
    differences,
    estimate,
    percent,
    ratio,
    resampled_sums,
    share,
)
from tuneutils.tools.bias_scan.models.mann_whitney import pairwise

RNG = np.random.default_rng(7)


def measure(hits: np.ndarray, **more: object) -> Measure:
    return Measure("t", "m", "f", share(hits), percent, len(hits), neutral=50.0, **more)  # type: ignore[arg-type]


def test_sums_of_equal_rows_are_drawn_as_if_each_were_drawn() -> None:
    """Mean and variance of a resampled sum are n p and n p (1 - p)."""
    hits = np.repeat([1.0, 0.0], [30, 70])
    sums = resampled_sums(share(hits), seed=1, resamples=40_000)
    assert (sums[:, 1] == 100).all()
    assert sums[:, 0].mean() == pytest.approx(30, abs=0.1)
    assert sums[:, 0].var() == pytest.approx(21, rel=0.03)


def test_an_interval_is_that_of_the_plain_bootstrap() -> None:
    hits = RNG.random(200) < 0.6
    found = estimate(measure(hits), Settings())
    plain = ratio_estimate(hits, resamples=40_000)
    assert found.value == pytest.approx(100 * plain.value)
    assert [found.low, found.high] == pytest.approx([100 * plain.low, 100 * plain.high], abs=1.0)


def test_a_difference_is_paired() -> None:
    base = RNG.random(300) < 0.6
    new = np.where(RNG.random(300) < 0.1, ~base, base)
    difference, change = differences(measure(new), measure(base), Settings(), "new", "base")
    plain = paired_difference(new, base, resamples=40_000)
    assert difference.value == pytest.approx(100 * plain.value)
    assert [difference.low, difference.high] == pytest.approx([100 * plain.low, 100 * plain.high], abs=1.0)
    assert change.value == pytest.approx(abs(100 * new.mean() - 50) - abs(100 * base.mean() - 50))
    assert (difference.metric, change.metric) == ("m-difference", "m-bias-change")


def test_a_model_does_not_differ_from_itself() -> None:
    hits = RNG.random(100) < 0.7
    for score in differences(measure(hits), measure(hits), Settings(), "a", "b"):
        assert (score.value, score.low, score.high) == (0.0, 0.0, 0.0)


def test_refusals() -> None:
    settings = Settings(min_items=30)
    few = estimate(measure(np.ones(29)), settings).checked()
    assert few.value is None
    assert few.note == "refused: n=29 is below 30"
    alike = estimate(measure(np.ones(40)), settings)
    assert (alike.value, alike.low) == (100.0, None)
    assert "no spread" in alike.note
    none = Measure("t", "m", "f", np.zeros((40, 2)), ratio, 40)
    assert estimate(none, settings).value is None


def test_clusters_are_resampled_whole() -> None:
    columns = cluster(share([1, 1, 0, 0]), ["a", "a", "b", "b"])
    assert columns.tolist() == [[2, 2], [0, 2]]


@pytest.mark.parametrize(("size", "decimals"), [(5, 9), (8, 9), (8, 0), (9, 9), (20, 1), (30, 9)])
def test_mann_whitney_is_scipys(size: int, decimals: int) -> None:
    """Exact for small groups without ties, else the normal approximation with both corrections."""
    stats = pytest.importorskip("scipy.stats")
    values = np.round(RNG.normal(size=(6, size)) * 2 + RNG.normal(size=(6, 1)), decimals)
    u, p = pairwise(values)
    for i, j in itertools.permutations(range(6), 2):
        expected = stats.mannwhitneyu(values[i], values[j])
        assert u[i, j] == expected.statistic
        assert p[i, j] == pytest.approx(expected.pvalue, rel=1e-9)


def test_mann_whitney_by_enumeration() -> None:
    """All ways to deal 8 ranks to two groups of four."""
    first, second = [1.0, 2.0, 3.0, 6.0], [4.0, 5.0, 7.0, 8.0]
    pool = first + second
    seen = sum(a > b for a in first for b in second)
    extreme = 0
    for chosen in itertools.combinations(range(8), 4):
        rest = [pool[i] for i in range(8) if i not in chosen]
        value = sum(pool[i] > b for i in chosen for b in rest)
        extreme += max(value, 16 - value) >= max(seen, 16 - seen)
    assert pairwise([first, second])[1][0, 1] == pytest.approx(extreme / math.comb(8, 4))


def test_weat_by_its_definition() -> None:
    x, y, a, b = (RNG.normal(size=(n, 5)) for n in (4, 4, 3, 6))

    def cos(v: np.ndarray, w: np.ndarray) -> float:
        return float(v @ w / np.linalg.norm(v) / np.linalg.norm(w))

    s = [np.mean([cos(w, v) for v in a]) - np.mean([cos(w, v) for v in b]) for w in [*x, *y]]
    found = weat.associations(np.concatenate([x, y]), a, b)
    np.testing.assert_allclose(found, s)
    d = (np.mean(s[:4]) - np.mean(s[4:])) / np.std(s, ddof=1)
    assert weat.effect_size(weat.columns(found, 4).sum(0, keepdims=True))[0] == pytest.approx(d)
    partitions = [sum(s[i] for i in chosen) for chosen in itertools.combinations(range(8), 4)]
    p, count, exact = weat.p_value(found, 4, 1000, seed=0)
    assert (count, exact) == (70, True)
    assert p == pytest.approx(np.mean([t >= sum(s[:4]) - 1e-12 for t in partitions]))


def test_sampled_p_tends_to_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    s = RNG.normal(size=16)
    s[:8] += 0.5
    exact, count, whole = weat.p_value(s, 8, 0, seed=0)
    assert (count, whole) == (12_870, True)
    monkeypatch.setattr(weat, "EXACT_PARTITIONS", 0)
    sampled, count, whole = weat.p_value(s, 8, 200_000, seed=1)
    assert (count, whole) == (200_000, False)
    assert sampled == pytest.approx(exact, abs=4 * math.sqrt(exact / 200_000))


def test_a_sampled_p_is_never_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weat, "EXACT_PARTITIONS", 0)
    s = np.repeat([1.0, 0.0], 40)
    assert weat.p_value(s, 40, 999, seed=0)[0] == pytest.approx(1 / 1000)
