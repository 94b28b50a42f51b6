"""Agreement against published examples and other implementations; bias and consistency against counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tuneutils.tools.pref_collect import quality

NAN = np.nan
# Krippendorff (2011), Computing Krippendorff's Alpha-Reliability, section C: 4 observers, 12 units.
SECTION_C = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
        [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
    ]
)
# The same, section A: two observers, binary data.
SECTION_A = np.array([[0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]], dtype=float)


def counts(data: Any, values: Any) -> Any:
    return np.array([[(column == v).sum() for v in values] for column in data.T], dtype=float)


@pytest.mark.parametrize(
    ("level", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)]
)
def test_alpha_of_krippendorffs_example(level: str, published: float) -> None:
    values = np.arange(1.0, 6.0)
    assert quality.krippendorff_alpha(counts(SECTION_C, values), values, level) == pytest.approx(
        published, abs=5e-4
    )


def test_alpha_of_krippendorffs_binary_example() -> None:
    values = np.array([0.0, 1.0])
    assert quality.krippendorff_alpha(counts(SECTION_A, values), values, "nominal") == pytest.approx(
        0.095, abs=5e-4
    )


@pytest.mark.parametrize("level", quality.LEVELS)
def test_alpha_against_the_krippendorff_package(level: str) -> None:
    peer = pytest.importorskip("krippendorff")
    rng = np.random.default_rng(1)
    values = np.arange(-3.0, 4.0)
    data = rng.integers(-3, 4, (5, 60)).astype(float)
    data[1] = np.where(rng.random(60) < 0.7, data[0], data[1])
    data[rng.random(data.shape) < 0.3] = NAN
    wanted = peer.alpha(reliability_data=data, level_of_measurement=level, value_domain=list(values))
    assert quality.krippendorff_alpha(counts(data, values), values, level) == pytest.approx(wanted, abs=1e-12)


def test_alpha_without_variation_is_undefined() -> None:
    values = np.array([0.0, 1.0])
    assert np.isnan(quality.krippendorff_alpha(np.array([[2.0, 0.0], [2.0, 0.0]]), values, "nominal"))


def test_kappa_closed_form() -> None:
    """p_o = .7, p_e = .5: κ = .4."""
    assert quality.kappa_of(np.array([[[20.0, 5.0], [10.0, 15.0]]]))[0] == pytest.approx(0.4)


@pytest.mark.parametrize("weights", ["none", "linear", "quadratic"])
def test_kappa_against_scikit_learn(weights: str) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(2)
    one = rng.integers(0, 7, 200)
    other = np.clip(one + rng.integers(-2, 3, 200), 0, 6)
    confusion = np.zeros((1, 7, 7))
    np.add.at(confusion[0], (one, other), 1)
    wanted = metrics.cohen_kappa_score(one, other, weights=None if weights == "none" else weights)
    assert quality.kappa_of(confusion, weights)[0] == pytest.approx(wanted)


def vote(item: str, rater: str, value: int, **changes: Any) -> dict[str, Any]:
    return {
        "item": item,
        "prompt": "p",
        "completion_a": "a",
        "completion_b": "b",
        "rater": rater,
        "value": value,
        "both_bad": False,
        "left": "a",
        "aspects": {},
        "reason": "",
        "edited": "",
        "repeat": False,
        "gold": None,
        "seconds": 3.0,
        "simulated": False,
        "extra": {},
        **changes,
    }


def test_intervals_hold_the_value_and_narrow_with_items() -> None:
    rng = np.random.default_rng(3)

    def width(n: int) -> float:
        rows = []
        for i in range(n):
            truth = int(rng.choice([-2, 2]))
            for who in "xyz":
                rows.append(vote(f"i{i}", who, truth if rng.random() < 0.8 else -truth))
        found = quality.agreement(rows, "compare", 500, 0)
        for entry in (found["alpha"]["nominal"], found["kappa"]["nominal"]):
            assert entry["low"] < entry["value"] < entry["high"]
        return found["alpha"]["nominal"]["high"] - found["alpha"]["nominal"]["low"]

    assert width(400) < 0.6 * width(50)


def test_alpha_of_votes_is_that_of_their_matrix() -> None:
    rows = [
        vote(f"i{u}", f"r{r}", int(v) - 3)
        for r, line in enumerate(SECTION_C)
        for u, v in enumerate(line)
        if not np.isnan(v)
    ]
    found = quality.agreement(rows, "compare", 200, 0)["alpha"]
    assert found["ordinal"]["value"] == pytest.approx(0.815, abs=5e-4)
    assert found["interval"]["value"] == pytest.approx(0.849, abs=5e-4)


def test_left_share_counts_what_was_on_the_left() -> None:
    rows = [vote("1", "r", 2), vote("2", "r", -1), vote("3", "r", -3, left="b"), vote("4", "r", 0)]
    rows.append(vote("5", "r", 0, both_bad=True))
    found = quality.left_share(rows, 200, 0)
    assert found is not None
    assert (found["value"], found["n"]) == (pytest.approx(2 / 3), 3)


def test_self_consistency_and_gold() -> None:
    rows = [
        vote("1", "r", 2),
        vote("1", "r", 1, repeat=True),
        vote("2", "r", 2),
        vote("2", "r", -2, repeat=True),
    ]
    rows += [vote("3", "r", 3, gold="a"), vote("4", "r", 3, gold="b"), vote("5", "r", 0, gold="both-bad")]
    found = quality.self_consistency(rows, "compare", 200, 0)
    assert found["same_preference"]["value"] == 0.5
    assert found["same_point"]["value"] == 0.0
    assert found["mean_points_apart"] == 2.5
    gold = quality.gold_accuracy(rows, "compare", 200, 0)
    assert gold is not None
    assert (gold["value"], gold["n"]) == (pytest.approx(1 / 3), 3)


def test_one_rater_has_no_agreement() -> None:
    assert quality.agreement([vote("1", "r", 1)], "compare", 200, 0)["items"] == 0
