"""The report's numbers on cases that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tuneutils.shared.divergences_model import CALIBRATION_BINS, Comparison
from tuneutils.tools.distill.report import (
    calibration_difference,
    calibration_error,
    describe,
    ece,
    finite,
    one_line,
    retention,
    win_rate,
)


def item(*, nll: float = 1.0, kl: float = 0.1, correct: int = 5, confidence: float = 0.5) -> Comparison:
    """Ten tokens, all predicted with one confidence."""
    bins = np.zeros((CALIBRATION_BINS, 3))
    bins[min(int(confidence * CALIBRATION_BINS), CALIBRATION_BINS - 1)] = (10, 10 * confidence, correct)
    return Comparison(10, kl, 8, correct, nll, bins)


def test_calibration_error_is_the_gap_between_confidence_and_truth() -> None:
    bins = np.zeros((CALIBRATION_BINS, 3))
    bins[3], bins[12] = (30, 30 * 0.22, 3), (10, 10 * 0.85, 9)
    assert ece(bins) == pytest.approx((30 * abs(0.1 - 0.22) + 10 * abs(0.9 - 0.85)) / 40)


def test_a_calibrated_model_has_no_error() -> None:
    estimate = calibration_error([item(correct=5, confidence=0.5)] * 4, 0)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0, 0, 0))


def test_calibration_intervals_hold_the_value_and_pair_the_models() -> None:
    rng = np.random.default_rng(0)
    column = [item(correct=int(rng.integers(0, 11)), confidence=0.7) for _ in range(40)]
    estimate = calibration_error(column, 0)
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.low < estimate.value < estimate.high
    same = calibration_difference(column, column, 0)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_win_rate_counts_equals_half() -> None:
    ours, theirs = [item(nll=x) for x in (1, 2, 3, 4)], [item(nll=x) for x in (2, 2, 2, 9)]
    assert win_rate(ours, theirs, "nll", 0).value == (1 + 0.5 + 0 + 1) / 4


def test_retention_is_accuracy_over_the_teachers_and_nats_lost() -> None:
    teacher, student = [item(correct=8, nll=10)] * 3, [item(correct=6, nll=15)] * 3
    made = retention(teacher, student, 0)
    assert made["accuracy"]["value"] == made["accuracy"]["low"] == 0.75
    assert made["lost_nll"]["value"] == pytest.approx(0.5)
    assert "accuracy" not in retention([item(correct=0)] * 3, student, 0)


def test_the_difference_to_the_baseline_is_students_less_baselines() -> None:
    models = {
        "teacher": [item(kl=0.0)] * 5,
        "student": [item(kl=x / 10) for x in range(5)],
        "baseline": [item(kl=x / 10 + 1) for x in range(5)],
    }
    made = describe(models, 0)
    against = made["against_baseline"]
    assert against["kl"]["value"] == pytest.approx(-0.1)  # a nat for each sequence of ten tokens
    assert against["kl"]["high"] == pytest.approx(-0.1)
    assert against["win_rate_kl"]["value"] == 1
    assert against["win_rate"]["value"] == 0.5
    assert "less the baseline's: kl -0.100" in one_line("heldout", made)
    assert finite(made)


def test_without_a_common_vocabulary_nothing_is_said_of_distance() -> None:
    made = describe({"student": [item()] * 3, "baseline": [item()] * 3}, 0)
    assert "kept" not in made
    assert not {"kl", "agreement"} & made["models"]["student"].keys()
    assert "perplexity" in one_line("heldout", made)


def test_one_sequence_has_no_interval() -> None:
    made = describe({"teacher": [item()], "student": [item()]}, 0)
    assert made["models"]["student"]["calibration_error"]["low"] is None
    assert made["kept"]["student"]["accuracy"]["low"] is None


def test_what_is_no_number_is_found() -> None:
    assert not finite({"a": {"b": float("nan")}})
