"""Hashed n-grams: what is counted, that fields are apart, and that the hash spreads."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneutils.shared import ngrams


def dense(fields: dict[str, str], buckets: int = 1 << 16) -> np.ndarray:
    made = np.zeros(buckets)
    indices, values = ngrams.features(fields, buckets)
    np.add.at(made, indices, values)
    return made


def test_number_of_different_ngrams() -> None:
    """Of " abc ": 4 of two, 3 of three, 2 of four, 1 of five characters, and one word."""
    indices, values = ngrams.features({"prompt": "abc"}, 1 << 30)
    assert len(indices) == 4 + 3 + 2 + 1 + 1
    np.testing.assert_allclose(values, 1 / np.sqrt(11))


def test_repetition_counts_one_plus_its_logarithm() -> None:
    _, values = ngrams.features({"prompt": "a a"}, 1 << 30)
    # " a a ": " a" and "a " twice, " a " twice, "a a" once, " a a" "a a " once, " a a " once; "a" twice, "a a" once
    raw = np.array([1 + np.log(2)] * 4 + [1.0] * 5)
    np.testing.assert_allclose(np.sort(values), np.sort(raw / np.linalg.norm(raw)))


def test_case_and_white_space_do_not_matter_fields_do() -> None:
    assert np.array_equal(dense({"prompt": "How  do\nI"}), dense({"prompt": " how do i "}))
    assert not np.array_equal(dense({"prompt": "how"}), dense({"reply": "how"}))
    both = dense({"prompt": "how", "reply": "now"})
    np.testing.assert_allclose(both, dense({"prompt": "how"}) + dense({"reply": "now"}))


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["prompt", "reply"]), st.text(max_size=60)))
def test_each_field_has_length_one(fields: dict[str, str]) -> None:
    indices, values = ngrams.features(fields, 1 << 30)
    filled = sum(bool(" ".join(t.lower().split()).strip()) for t in fields.values())
    assert abs(float(values @ values) - filled) < 1e-9
    assert ((indices >= 0) & (indices < 1 << 30)).all()


def test_buckets_fill_evenly() -> None:
    words = {"prompt": " ".join(f"w{i:04d}x" for i in range(3000))}
    indices, _ = ngrams.features(words, 1 << 40)
    counts = np.bincount(indices % 64, minlength=64)
    expected = len(indices) / 64
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 63 + 5 * np.sqrt(2 * 63)  # five standard deviations


def test_score_is_the_inner_product() -> None:
    weights = np.random.default_rng(0).normal(size=1024).astype(np.float32)
    fields = {"prompt": "open the door", "reply": "no"}
    expected = dense(fields, 1024) @ weights + 0.5
    assert abs(ngrams.score(weights, 0.5, fields) - expected) < 1e-6
    assert ngrams.score(weights, 0.5, {"prompt": "", "reply": ""}) == 0.5
