"""The report's numbers against their definitions, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tuneutils.tools.pref_tune.losses import Objective
from tuneutils.tools.pref_tune.measures import forgetting_report, pair_report, single_report

POLICY = np.array([[-4.0, -9.0], [-6.0, -6.0], [-8.0, -3.0]])
REFERENCE = np.array([[-5.0, -5.0], [-6.0, -6.0], [-7.0, -4.0]])
TOKENS = np.array([[2.0, 3.0], [3.0, 3.0], [4.0, 1.0]])


def test_margins_and_accuracy_of_pairs() -> None:
    found = pair_report(Objective("dpo", 0.5), POLICY, REFERENCE, TOKENS, ["a", "b", "c"], 0)
    # log-ratios: (1, −4), (0, 0), (−1, 1): right, a tie, wrong
    assert found["accuracy"]["value"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert found["margin"]["value"] == pytest.approx(0.5 * (5 + 0 - 2) / 3)
    assert found["logratio_chosen"]["value"] == pytest.approx(0)
    assert found["logratio_rejected"]["value"] == pytest.approx(-1)
    # per token: policy (−2, −3), (−2, −2), (−2, −3); reference (−2.5, −1.67), a tie, (−1.75, −4)
    assert found["logprob_accuracy"]["value"] == pytest.approx(2.5 / 3)
    assert found["logprob_accuracy_reference"]["value"] == pytest.approx(1.5 / 3)
    assert found["logprob_accuracy_gain"]["value"] == pytest.approx(1 / 3)


def test_rewards_per_token() -> None:
    found = pair_report(Objective("ipo", 2.0), POLICY, REFERENCE, TOKENS, ["a", "b", "c"], 0)
    assert found["margin"]["value"] == pytest.approx(2 * ((1 / 2 + 4 / 3) + 0 + (-1 / 4 - 1)) / 3)


def test_pairs_of_one_prompt_are_resampled_together() -> None:
    found = pair_report(Objective("dpo", 0.5), POLICY, REFERENCE, TOKENS, ["a", "a", "a"], 0)
    assert (found["prompts"], found["margin"]["low"]) == (1, None)


def test_single_answers() -> None:
    rewards, good = np.array([1.0, 3.0, 2.0, -2.0, 1.0]), np.array([1.0, 1.0, 1.0, 0.0, 0.0])
    found = single_report(rewards, good, list("abcde"), 0)
    assert found["margin"]["value"] == pytest.approx(2.0 - -0.5)
    assert found["ranked_right"] == pytest.approx(5.5 / 6)  # one tie of six


def test_one_label_has_no_margin() -> None:
    assert "margin" not in single_report(np.ones(3), np.ones(3), list("abc"), 0)


def test_forgetting_is_the_ratio_of_perplexities() -> None:
    policy = [{"nll": 21.0, "tokens": 10, "bytes": 40}, {"nll": 9.0, "tokens": 5, "bytes": 20}]
    reference = [{"nll": 20.0, "tokens": 10, "bytes": 40}, {"nll": 9.5, "tokens": 5, "bytes": 20}]
    found = forgetting_report(policy, reference, 0)
    assert found["perplexity"]["value"] == pytest.approx(math.exp(30 / 15))
    rise = math.exp(30 / 15) / math.exp(29.5 / 15) - 1
    assert found["perplexity_rise"]["value"] == pytest.approx(rise)
    assert found["bits_per_byte_rise"]["value"] == pytest.approx(0.5 / math.log(2) / 60)
