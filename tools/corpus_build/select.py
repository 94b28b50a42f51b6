"""The documents that are most like the target, drawn by importance; see ``dsir.py``."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tuneutils.shared.records import Reader
from tuneutils.tools.corpus_build import dsir
from tuneutils.tools.corpus_build.contamination import strings
from tuneutils.tools.corpus_build.params import BuildParams
from tuneutils.tools.corpus_build.pool import Pool


def select(pool: Pool, params: BuildParams, seed: int) -> None:
    """Keep the share of the living documents that ``params.select`` names."""
    assert params.select is not None
    living = pool.living()
    featurizer = dsir.Featurizer(params.dsir_hash)
    redone = {d: featurizer([text])[0] for d, text in pool.changed.items() if pool.alive[d]}
    raw = np.zeros(dsir.BUCKETS, np.int64)
    for features, _ in _features(pool, living, redone):
        raw += dsir.bucket_counts(features)
    ratio = dsir.log_ratio(dsir.target_counts(_batches(params.target), featurizer), raw)
    weights = np.concatenate([dsir.log_weights(f, b, ratio) for f, b in _features(pool, living, redone)])
    count = max(round(params.select * len(living)), 1)
    chosen = np.zeros(len(living), bool)
    chosen[dsir.gumbel_top_k(weights, count, seed)] = True
    for document in living[~chosen].tolist():
        pool.drop(document, "not selected")


def _features(
    pool: Pool, living: np.ndarray, redone: dict[int, dsir.Features], at_once: int = 1 << 22
) -> Iterator[tuple[dsir.Features, np.ndarray]]:
    """Features and bounds of the living documents, some at a time."""
    held: list[np.ndarray] = []
    size = 0
    for document in living.tolist():
        start, end = pool.feature_bounds[document], pool.feature_bounds[document + 1]
        held.append(redone.get(document, pool.features[start:end]))
        size += len(held[-1])
        if size >= at_once:
            yield _joined(held)
            held, size = [], 0
    if held:
        yield _joined(held)


def _joined(held: list[np.ndarray]) -> tuple[dsir.Features, np.ndarray]:
    return np.concatenate(held), np.concatenate([[0], np.cumsum([len(h) for h in held], dtype=np.int64)])


def _batches(paths: tuple[str, ...], characters: int = 1 << 19) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for record in Reader(list(paths)):
        text = record.get("text")
        batch += [text] if isinstance(text, str) else strings(record)
        size += len(batch[-1]) if batch else 0
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
