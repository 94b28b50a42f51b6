"""Numbers with intervals, and how texts are cut for scoring. No torch here; see ``evaluate_model``.

Every metric is a ratio of two sums over items (``perplexity = exp(sum nll / sum tokens)``, ``accuracy =
sum correct / sum 1``), so one bootstrap serves them all: resample clusters of items with replacement,
form the ratio again, take percentiles (Efron and Tibshirani, An Introduction to the Bootstrap, ch. 13).
Two models on the same items are compared with the same resamples (paired), which removes the items' own
difficulty from the interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Floats = NDArray[np.float64]
Transform = Callable[[Floats], Floats]
RESAMPLES = 10_000
_CHUNK_VALUES = 2_000_000


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval.

    Attributes:
        low, high: None with fewer than two clusters, of which the bootstrap can say nothing.
        n: items.
        clusters: what was resampled.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    clusters: int

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


def _identity(ratio: Floats) -> Floats:
    return ratio


def ratio_estimate(
    numerators: ArrayLike,
    denominators: ArrayLike | None = None,
    *,
    transform: Transform = _identity,
    clusters: Sequence[Any] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Estimate:
    """``transform(sum numerators / sum denominators)`` with its percentile bootstrap interval.

    Args:
        numerators: ``(n,)``, one an item.
        denominators: ``(n,)``; ones by default, which makes it a mean.
        clusters: ``(n,)`` labels; items of one label are resampled together. Each item alone by default.

    Raises:
        ValueError: without items, or with a denominator that sums to zero.
    """
    columns = _columns([(numerators, denominators)], clusters)
    value = _ratios(columns.sum(0, keepdims=True), transform)[0]
    low, high = _interval(columns, lambda sums: _ratios(sums, transform), seed, resamples, level)
    return Estimate(float(value), low, high, np.size(np.asarray(numerators)), len(columns))


def paired_difference(
    numerators: ArrayLike,
    base_numerators: ArrayLike,
    denominators: ArrayLike | None = None,
    base_denominators: ArrayLike | None = None,
    *,
    transform: Transform = _identity,
    clusters: Sequence[Any] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Estimate:
    """The difference of two such ratios over the same items, with the interval of paired resamples.

    Arguments as in :func:`ratio_estimate`; item ``i`` of both sides is the same item.
    """
    if np.shape(np.asarray(numerators)) != np.shape(np.asarray(base_numerators)):
        raise ValueError("paired items must be equally many on both sides")
    columns = _columns([(numerators, denominators), (base_numerators, base_denominators)], clusters)

    def difference(sums: Floats) -> Floats:
        return _ratios(sums[:, :2], transform) - _ratios(sums[:, 2:], transform)

    value = difference(columns.sum(0, keepdims=True))[0]
    low, high = _interval(columns, difference, seed, resamples, level)
    return Estimate(float(value), low, high, np.size(np.asarray(numerators)), len(columns))


def _columns(pairs: list[tuple[ArrayLike, ArrayLike | None]], clusters: Sequence[Any] | None) -> Floats:
    """``(clusters, 2 * pairs)`` sums of numerators and denominators."""
    made: list[Floats] = []
    for numerators, denominators in pairs:
        top = np.asarray(numerators, dtype=np.float64)
        if not top.size:
            raise ValueError("no items to estimate from")
        made += [top, np.ones_like(top) if denominators is None else np.asarray(denominators, np.float64)]
    values = np.stack(made, axis=1)
    if clusters is None:
        return values
    order = {label: i for i, label in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros((len(order), values.shape[1]))
    np.add.at(sums, [order[label] for label in clusters], values)
    return sums


def _ratios(sums: Floats, transform: Transform) -> Floats:
    if not np.all(sums[:, 1] > 0):
        raise ValueError("a denominator sums to zero")
    return transform(sums[:, 0] / sums[:, 1])


def _interval(
    columns: Floats, statistic: Callable[[Floats], Floats], seed: int, resamples: int, level: float
) -> tuple[float | None, float | None]:
    count = len(columns)
    if count < 2:
        return None, None
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK_VALUES // count)
    drawn: list[Floats] = []
    for start in range(0, resamples, rows):
        picks = rng.integers(0, count, size=(min(rows, resamples - start), count))
        drawn.append(statistic(np.stack([column[picks].sum(1) for column in columns.T], axis=1)))
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(np.concatenate(drawn), [tail, 100 - tail])
    return float(low), float(high)


def score_windows(length: int, max_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """How ``length`` tokens are scored by a model that sees ``max_length``: ``(start, first, end)``.

    A window feeds tokens ``start`` to ``end - 2`` and scores tokens ``first`` to ``end - 1``; each token but
    the first is scored once. The first window is full; each later one scores ``stride`` new tokens with as
    much context before them as fits. ``stride = max_length`` is what lm-evaluation-harness does
    (``get_rolling_token_windows`` with ``context_len=1``); a smaller one gives more context and costs more.
    """
    if not 1 <= stride <= max_length:
        raise ValueError(f"stride must be between 1 and {max_length}, is {stride}")
    done = 1
    while done < length:
        new = min(length - done, max_length if done == 1 else stride)
        end = done + new
        yield max(0, end - max_length - 1), done, end
        done = end


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What the first token of a text is predicted from: BOS, or EOS without one (as the harness does)."""
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    assert isinstance(token, int)
    return token


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Token ids of a context and of what is scored after it, split as lm-evaluation-harness does.

    Spaces at the context's end go to the continuation; both are tokenized together and the ids cut at the
    length of the context's own encoding. An empty context becomes the prefix token.

    Raises:
        ValueError: the continuation has no token of its own.
    """
    prefix = prefix_token(tokenizer)
    if not context:
        ids = list(tokenizer.encode(continuation, add_special_tokens=False))
        if ids and ids[0] == prefix:
            head, rest = ids[:1], ids[1:]
        else:
            head, rest = [prefix], ids
    else:
        head = _encode(tokenizer, context.rstrip(), prefix)
        rest = _encode(tokenizer, context + continuation, prefix)[len(head) :]
        head = head or [prefix]  # the context was all spaces
    if not rest:
        raise ValueError(f"the continuation {continuation!r} has no token of its own")
    return head, rest


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, prefix: int) -> list[int]:
    if text.startswith(str(tokenizer.decode(prefix))):
        return list(tokenizer.encode(text, add_special_tokens=False))
    return list(tokenizer.encode(text))


def distinct_n(tokens: Sequence[int], n: int) -> float:
    """Share of different n-grams among all (Li et al. 2016, arXiv 1510.03055); 1 without any n-gram."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0
