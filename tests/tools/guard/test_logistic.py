"""The optimum of logistic regression against closed forms, Newton's method and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneutils.shared import ngrams
from tuneutils.tools.guard.logistic import Dense, Sparse, auc, fit, log_loss


def problem(seed: int, n: int = 80, d: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, d))
    targets = (rng.random(n) < 1 / (1 + np.exp(-rows @ rng.normal(size=d)))).astype(float)
    return rows, targets, rng.random(n) + 0.1


def newton(rows: np.ndarray, targets: np.ndarray, weights: np.ndarray, l2: float) -> np.ndarray:
    """The same objective by Newton's method, written out with its Hessian."""
    design = np.hstack([rows, np.ones((len(rows), 1))])
    penalty = l2 * np.diag([1.0] * rows.shape[1] + [0.0])
    share, at = weights / weights.sum(), np.zeros(design.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(-design @ at))
        gradient = design.T @ (share * (p - targets)) + penalty @ at
        hessian = (design.T * (share * p * (1 - p))) @ design + penalty
        at = at - np.linalg.solve(hessian, gradient)
    return at


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("l2", [0.001, 0.1, 1.0])
def test_equals_newtons_method(seed: int, l2: float) -> None:
    rows, targets, weights = problem(seed)
    found = fit(Dense(rows), targets, l2, sample_weights=weights)
    assert found.gradient <= 1e-8
    expected = newton(rows, targets, weights, l2)
    np.testing.assert_allclose(np.append(found.weights, found.bias), expected, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_equals_scikit_learn(seed: int) -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    rows, targets, weights = problem(seed)
    share = weights / weights.sum()
    theirs = linear.LogisticRegression(C=1 / 0.1, tol=1e-10, max_iter=10_000)
    theirs.fit(rows, targets, sample_weight=share)
    found = fit(Dense(rows), targets, 0.1, sample_weights=weights)
    np.testing.assert_allclose(found.weights, theirs.coef_[0], atol=1e-5)
    assert found.bias == pytest.approx(theirs.intercept_[0], abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20), st.integers(1, 20))
def test_one_binary_feature_has_the_log_odds_ratio(a: int, b: int, c: int, d: int) -> None:
    """Unpenalised, with a of a + b positive at 1 and c of c + d at 0: w = ln(ad / bc), b = ln(c / d)."""
    rows = np.array([[1.0]] * (a + b) + [[0.0]] * (c + d))
    targets = np.array([1] * a + [0] * b + [1] * c + [0] * d)
    found = fit(Dense(rows), targets, 0.0)
    assert found.weights[0] == pytest.approx(math.log(a * d / (b * c)), abs=1e-5)
    assert found.bias == pytest.approx(math.log(c / d), abs=1e-5)


def test_no_point_nearby_is_better() -> None:
    rows, targets, weights = problem(7)
    found = fit(Dense(rows), targets, 0.05, sample_weights=weights)

    def objective(w: np.ndarray, b: float) -> float:
        return log_loss(rows @ w + b, targets, weights) + 0.025 * float(w @ w)

    best = objective(found.weights, found.bias)
    assert best == pytest.approx(found.loss, abs=1e-12)
    rng = np.random.default_rng(0)
    for _ in range(200):
        step = rng.normal(size=7) * 1e-2
        assert objective(found.weights + step[:6], found.bias + step[6]) > best


def test_where_it_starts_does_not_matter() -> None:
    rows, targets, _ = problem(3)
    plain = fit(Dense(rows), targets, 0.1)
    far = fit(Dense(rows), targets, 0.1, start=(np.full(6, 30.0), -20.0))
    np.testing.assert_allclose(far.weights, plain.weights, atol=1e-6)


def test_separable_classes_with_a_penalty_end() -> None:
    found = fit(Dense(np.array([[-1.0], [1.0]])), np.array([0, 1]), 0.01)
    # by symmetry b = 0 and w solves  w * l2 = 1 / (1 + exp(w))
    assert found.bias == pytest.approx(0, abs=1e-7)
    assert found.weights[0] * 0.01 == pytest.approx(1 / (1 + math.exp(found.weights[0])), abs=1e-7)


def test_sparse_rows_are_the_dense_ones() -> None:
    texts = ["kill the process", "kill the man", "open the door", "", "open source"]
    rows = [ngrams.features({"prompt": t}, 256) for t in texts]
    dense = np.zeros((5, 256))
    for i, (columns, values) in enumerate(rows):
        dense[i, columns] += values
    sparse, rng = Sparse(rows, 256), np.random.default_rng(0)
    vector, residuals = rng.normal(size=256), rng.normal(size=5)
    np.testing.assert_allclose(sparse.times(vector), dense @ vector, atol=1e-12)
    np.testing.assert_allclose(sparse.transposed_times(residuals), dense.T @ residuals, atol=1e-12)
    targets = np.array([0, 1, 0, 1, 0])
    a, b = fit(sparse, targets, 0.01), fit(Dense(dense), targets, 0.01)
    np.testing.assert_allclose(a.weights, b.weights, atol=1e-6)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_auc_is_the_share_of_pairs_in_order(items: list[tuple[int, bool]]) -> None:
    scores, targets = np.array([i[0] for i in items]), np.array([i[1] for i in items])
    pairs = [(p > q) + 0.5 * (p == q) for p in scores[targets] for q in scores[~targets]]
    found = auc(scores, targets)
    assert math.isnan(found) if not pairs else found == pytest.approx(np.mean(pairs))
