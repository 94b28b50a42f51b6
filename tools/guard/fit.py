"""The two layers, learnt from pooled activations and texts; every choice by cross-validation over groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tuneutils.shared import ngrams
from tuneutils.shared.guarding import POOLINGS
from tuneutils.tools.guard.exchanges import Exchange
from tuneutils.tools.guard.features import Features
from tuneutils.tools.guard.logistic import Dense, Fit, Sparse, auc, fit, log_loss

PROBE_L2 = (1.0, 0.1, 0.01)
TEXT_L2 = (1e-2, 1e-3, 1e-4)
CATEGORY_L2 = 0.1
JOINT_L2 = 1e-3
SEARCH_TOLERANCE = 1e-4

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """One way to read the activations, and how well it did out of fold, exchange by exchange."""

    layer: int
    pooling: str
    l2: float
    auc: float
    log_loss: float


@dataclass
class Learning:
    """What rows teach: targets, weights, folds.

    Attributes:
        weights: 1 over an exchange's rows; of a bad request that the model handled only the whole reply
            is taught, since at the prompt nothing was decided yet.
    """

    exchanges: Sequence[Exchange]
    features: Features
    fold: NDArray[np.int64]
    targets: NDArray[np.float64]
    weights: Array

    @classmethod
    def of(cls, exchanges: Sequence[Exchange], features: Features, fold: Sequence[int]) -> Learning:
        owner = features.owner
        rows = np.bincount(owner, minlength=len(exchanges))
        handled = np.array([e.kind == "handled" for e in exchanges])[owner]
        weights = np.where(handled, features.last.astype(np.float64), 1.0 / rows[owner])
        targets = np.array([float(e.failed) for e in exchanges])[owner]
        return cls(exchanges, features, np.asarray(fold)[owner], targets, weights)

    @property
    def failed(self) -> NDArray[np.bool_]:
        """``(exchanges,)``."""
        return np.array([e.failed for e in self.exchanges])

    def highest(self, logits: Array) -> NDArray[np.int64]:
        """``(exchanges,)`` the row in which each exchange's logit is highest, the first of equals."""
        order = np.lexsort((-logits, self.features.owner))
        _, first = np.unique(self.features.owner[order], return_index=True)
        return np.asarray(order[first])

    def out_of_fold(self, predict: Callable[[NDArray[np.int64], NDArray[np.int64]], Array]) -> Array:
        """``(n,)`` logits, each of a fit that did not see its fold; ``predict(learnt, other)`` gives some."""
        logits = np.zeros(len(self.targets))
        for fold in np.unique(self.fold):
            learnt, other = np.flatnonzero(self.fold != fold), np.flatnonzero(self.fold == fold)
            logits[other] = predict(learnt, other)
        return logits


def standard(values: NDArray[Any]) -> tuple[Array, Array]:
    """Mean and standard deviation of each column; 1 for a constant one."""
    mean, std = values.mean(0, dtype=np.float64), values.std(0, dtype=np.float64)
    return mean, np.where(std > 1e-8, std, 1.0)


def choose(
    learning: Learning, layers: Sequence[int], poolings: Sequence[str]
) -> tuple[Choice, Array, list[Choice]]:
    """The layer, pooling and penalty with the best out-of-fold AUC over exchanges; its logits; all tried.

    An exchange counts by its highest logit, as it does when it is watched. Of equals the lower loss wins,
    then the lower layer.
    """
    tried: list[tuple[Choice, Array]] = []
    for layer in layers:
        for pooling in poolings:
            tried += _path(learning, layer, pooling)
    tried.sort(key=lambda t: (-t[0].auc, t[0].log_loss, t[0].layer, POOLINGS.index(t[0].pooling), -t[0].l2))
    best, logits = tried[0]
    return best, logits, [choice for choice, _ in tried]


def _path(learning: Learning, layer: int, pooling: str) -> list[tuple[Choice, Array]]:
    """All penalties, the strongest first, each fit starting from the one before."""
    values = learning.features.of(layer, pooling)
    logits = {l2: np.zeros(len(values)) for l2 in PROBE_L2}
    for fold in np.unique(learning.fold):
        learnt, other = np.flatnonzero(learning.fold != fold), np.flatnonzero(learning.fold == fold)
        mean, std = standard(values[learnt])
        rows, held = Dense((values[learnt] - mean) / std), (values[other] - mean) / std
        start = None
        for l2 in PROBE_L2:
            found = fit(
                rows, learning.targets[learnt], l2,
                sample_weights=learning.weights[learnt], start=start, tolerance=SEARCH_TOLERANCE,
            )  # fmt: skip
            start = (found.weights, found.bias)
            logits[l2][other] = held @ found.weights + found.bias
    made = []
    for l2 in PROBE_L2:
        at = learning.highest(logits[l2])
        area = auc(logits[l2][at], learning.failed)
        loss = log_loss(logits[l2], learning.targets, learning.weights)
        made.append((Choice(layer, pooling, l2, round(area, 6), round(loss, 6)), logits[l2]))
    return made


def folded(rows: NDArray[Any], targets: NDArray[Any], l2: float, weights: Array) -> tuple[Array, float, Fit]:
    """A probe on standardised activations as weights and intercept for activations as they are."""
    mean, std = standard(rows)
    found = fit(Dense((rows - mean) / std), targets, l2, sample_weights=weights)
    scaled = found.weights / std
    return scaled, found.bias - float(scaled @ mean), found


def probe_weights(learning: Learning, choice: Choice) -> tuple[torch.Tensor, float]:
    """``(P, H)`` and the intercept, learnt from all rows."""
    values = learning.features.of(choice.layer, choice.pooling)
    weights, bias, _ = folded(values, learning.targets, choice.l2, learning.weights)
    parts = 2 if choice.pooling == "prompt-mean" else 1
    return torch.from_numpy(weights.reshape(parts, -1).astype(np.float32)), bias


def category_weights(learning: Learning, layer: int) -> tuple[tuple[str, ...], torch.Tensor, Array]:
    """Names, ``(C, H)`` and ``(C,)``: each kind of failure against the others, on the running mean."""
    features = learning.features
    chosen = np.flatnonzero(learning.failed[features.owner])
    values = features.of(layer, "mean")[chosen]
    named = np.array([learning.exchanges[i].category for i in features.owner[chosen]])
    names = tuple(sorted(set(named)))
    weights, biases = np.zeros((len(names), values.shape[1])), np.zeros(len(names))
    for i, name in enumerate(names):
        if len(names) > 1:
            of = named == name
            weights[i], biases[i], _ = folded(values, of, CATEGORY_L2, learning.weights[chosen])
    return names, torch.from_numpy(weights.astype(np.float32)), biases


def text_rows(
    exchanges: Sequence[Exchange], features: Features, decode: Callable[[Sequence[int]], str]
) -> Sparse:
    """The n-grams of each row's text: the prompt, and the reply up to there."""
    made = []
    for owner, point in zip(features.owner, features.point, strict=True):
        exchange = exchanges[owner]
        whole = point == len(exchange.reply_ids)
        reply = exchange.reply if whole else decode(exchange.reply_ids[:point])
        made.append(ngrams.features({"prompt": exchange.prompt, "reply": reply}))
    return Sparse(made, ngrams.BUCKETS)


def fit_text(learning: Learning, rows: Sparse) -> tuple[NDArray[np.float32], float, Array, dict[str, Any]]:
    """Weights ``(buckets,)``, intercept, out-of-fold logits ``(n,)``, and how the penalty was chosen."""
    best: tuple[float, float, Array] | None = None
    tried = []
    for l2 in TEXT_L2:
        logits = np.zeros(len(learning.targets))
        for fold in np.unique(learning.fold):
            learnt = (learning.fold != fold).astype(np.float64)
            found = fit(
                rows, learning.targets, l2,
                sample_weights=learning.weights * learnt, tolerance=SEARCH_TOLERANCE,
            )  # fmt: skip
            other = learning.fold == fold
            logits[other] = rows.times(found.weights)[other] + found.bias
        loss = log_loss(logits, learning.targets, learning.weights)
        area = auc(logits[learning.highest(logits)], learning.failed)
        tried.append({"l2": l2, "auc": round(area, 6), "log_loss": round(loss, 6)})
        if best is None or loss < best[0]:
            best = (loss, l2, logits)
    assert best is not None
    final = fit(rows, learning.targets, best[1], sample_weights=learning.weights, tolerance=1e-7)
    return final.weights.astype(np.float32), final.bias, best[2], {"l2": best[1], "tried": tried}


def fit_joint(learning: Learning, probe: Array, text: Array) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The probe's scale (slope, intercept) and the joint (intercept, probe's, text's slope).

    Fitted on one row for each exchange, where the probe is highest: as calibrated as out-of-fold logits let
    it be for what is said of a whole exchange.
    """
    at = learning.highest(probe)
    failed = learning.failed
    alone = fit(Dense(probe[at, None]), failed, JOINT_L2)
    both = fit(Dense(np.stack([probe[at], text[at]], axis=1)), failed, JOINT_L2)
    return (float(alone.weights[0]), alone.bias), (both.bias, *map(float, both.weights))


def as_rows(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """For the artifact, best first."""
    return [asdict(choice) for choice in choices]
