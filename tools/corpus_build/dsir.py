"""Data selection with importance resampling (Xie et al. 2023, arXiv 2302.03169).

Features are counts of word unigrams and bigrams hashed into ``BUCKETS``; the log-weight of a document is
sum over buckets of count · (ln p_target - ln p_raw), and documents are drawn without replacement by the
Gumbel top-k trick. Smoothing, tokens and noise are those of the authors' package ``data-selection`` 1.0.3,
so that with ``hash_with="sha256"`` and the same seed the same documents are chosen.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tuneutils.tools.corpus_build.tokens import Index, Tokens, tokenize, windows

BUCKETS = 10_000
SMOOTHING = 1e-8
HASHES = ("fast", "sha256")

Floats = NDArray[np.float64]
Features = NDArray[np.uint16]

_WORD_PUNCT = re.compile(r"\w+|[^\w\s]+")


class Featurizer:
    """Bucket numbers of the unigrams and bigrams of texts.

    Args:
        hash_with: ``fast``, a 64-bit polynomial hash computed over whole batches, or ``sha256``, the hash of
            the authors' package, remembered for each n-gram met.
    """

    def __init__(self, hash_with: str = "fast") -> None:
        self.hash_with = hash_with
        self._known: dict[str, int] = {}
        self._pairs: dict[tuple[str, str], int] = {}

    def __call__(self, texts: Sequence[str], tokens: Tokens | None = None) -> tuple[Features, Index]:
        """Bucket numbers ``(n,)`` of all texts, and bounds ``(texts + 1,)`` between those of each."""
        if self.hash_with == "sha256":
            made = [self._reference(text) for text in texts]
            bounds = np.concatenate([[0], np.cumsum([len(m) for m in made], dtype=np.int64)])
            return np.concatenate(made) if made else np.zeros(0, np.uint16), bounds
        return fast_features(tokenize(texts) if tokens is None else tokens)

    def _reference(self, text: str) -> Features:
        words = _WORD_PUNCT.findall(text.lower())
        known, pairs = self._known, self._pairs
        if len(known) + len(pairs) > 5_000_000:
            known.clear()
            pairs.clear()
        found = []
        for word in words:
            bucket = known.get(word)
            if bucket is None:
                bucket = known[word] = _sha256_bucket(word)
            found.append(bucket)
        for pair in pairwise(words):
            bucket = pairs.get(pair)
            if bucket is None:
                bucket = pairs[pair] = _sha256_bucket(" ".join(pair))
            found.append(bucket)
        return np.array(found, np.uint16)


def _sha256_bucket(ngram: str) -> int:
    return int(hashlib.sha256(ngram.encode("utf-8", "surrogatepass")).hexdigest(), 16) % BUCKETS


def fast_features(tokens: Tokens) -> tuple[Features, Index]:
    """As ``Featurizer``, from tokens: unigrams and bigrams, each by its hash modulo ``BUCKETS``."""
    pairs, first = windows(tokens, 2)
    unigrams = (tokens.hashes % np.uint64(BUCKETS)).astype(np.uint16)
    bigrams = (pairs % np.uint64(BUCKETS)).astype(np.uint16)
    # A bigram goes right before the token that starts it, so that each text's lie together.
    features = np.empty(len(unigrams) + len(bigrams), np.uint16)
    at = first + np.arange(len(first))
    is_bigram = np.zeros(len(features), bool)
    is_bigram[at] = True
    features[is_bigram] = bigrams
    features[~is_bigram] = unigrams
    return features, tokens.bounds + np.searchsorted(first, tokens.bounds)


def bucket_counts(features: Features) -> Index:
    return np.bincount(features, minlength=BUCKETS)


def log_ratio(target_counts: Index, raw_counts: Index) -> Floats:
    """``(BUCKETS,)``: ln(p_target + 1e-8) - ln(p_raw + 1e-8)."""
    target = target_counts / max(target_counts.sum(), 1)
    raw = raw_counts / max(raw_counts.sum(), 1)
    return np.asarray(np.log(target + SMOOTHING) - np.log(raw + SMOOTHING))


def log_weights(features: Features, bounds: Index, ratio: Floats) -> Floats:
    """``(texts,)`` log importance weights."""
    sums = np.concatenate([[0.0], np.cumsum(ratio[features])])
    return np.asarray(sums[bounds[1:]] - sums[bounds[:-1]])


def gumbel_top_k(
    weights: Floats, count: int, seed: int, *, allowed: NDArray[np.bool_] | None = None
) -> Index:
    """Indices, in order, of ``count`` documents drawn without replacement with probability ∝ exp(weight).

    Args:
        allowed: ``(n,)`` only these may be drawn. Where there are no more than ``count``, all are.
    """
    candidates = np.arange(len(weights)) if allowed is None else np.flatnonzero(allowed)
    if count >= len(candidates):
        return candidates
    noisy = weights[candidates] + np.random.RandomState(seed).gumbel(size=len(candidates))
    chosen = np.argpartition(-noisy, count)[:count]
    return np.sort(candidates[chosen])


def target_counts(texts: Iterable[Sequence[str]], featurizer: Featurizer) -> Index:
    """Bucket counts of the target's texts, given in batches."""
    counts = np.zeros(BUCKETS, np.int64)
    for batch in texts:
        counts += bucket_counts(featurizer(batch)[0])
    return counts
