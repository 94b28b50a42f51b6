"""What can be said of a set of items: every metric by its formula, as a ratio of two sums.

An item is one record, question or prompt with its raw scores (``nll``, ``tokens``, ``acc``, …). Metrics are
only ever computed from items, so a report that is read again gives the same numbers as the measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tuneutils.shared.evaluate import Estimate, Floats, paired_difference, ratio_estimate

Item = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """``transform(sum of numerator / sum of denominator)`` over items.

    Attributes:
        denominator: an item's field; None counts items.
        better: ``lower``, ``higher``, or None where neither is.
    """

    name: str
    numerator: str
    denominator: str | None
    formula: str
    better: str | None
    transform: Callable[[Floats], Floats] = lambda ratio: ratio


PERPLEXITY = Metric("perplexity", "nll", "tokens", "exp(Σ nll / Σ tokens)", "lower", np.exp)
BITS_PER_BYTE = Metric(
    "bits_per_byte", "nll", "bytes", "Σ nll / (ln 2 · Σ UTF-8 bytes)", "lower", lambda r: r / np.log(2)
)
BYTE_PERPLEXITY = Metric("byte_perplexity", "nll", "bytes", "exp(Σ nll / Σ UTF-8 bytes)", "lower", np.exp)
WORD_PERPLEXITY = Metric("word_perplexity", "nll", "words", "exp(Σ nll / Σ words)", "lower", np.exp)
TARGET_PERPLEXITY = Metric(
    "perplexity", "nll", None, "exp(mean over items of the target's nll)", "lower", np.exp
)

KL = Metric("kl", "kl", "tokens", "Σ KL(original ‖ model) / Σ tokens, in nats", "lower")
AGREEMENT = Metric(
    "agreement", "agree", "tokens", "share of tokens with the original's most likely next token", "higher"
)

_MEANS = {
    "acc": ("mean(argmax log P(choice | context) is right)", "higher"),
    "acc_norm": ("mean(argmax log P(choice | context) / characters is right)", "higher"),
    "acc_bytes": ("mean(argmax log P(choice | context) / UTF-8 bytes is right)", "higher"),
    "exact_match": ("mean(filtered answer equals the target)", "higher"),
    "contains": ("mean(filtered answer contains the target)", "higher"),
    "stop_rate": ("mean(EOS is generated within the limit)", "higher"),
    "length": ("mean generated tokens, EOS not counted", None),
    "distinct_1": ("mean over answers of different tokens / tokens", None),
    "distinct_2": ("mean over answers of different bigrams / bigrams", None),
    "repetition": ("mean over answers of 1 - different 4-grams / 4-grams", "lower"),
}

#: The metrics of each kind of task, the first being its headline.
KINDS: dict[str, tuple[str, ...]] = {
    "text": ("bits_per_byte", "perplexity"),
    "multiple_choice": ("acc", "acc_norm", "acc_bytes"),
    "loglikelihood": ("acc", "perplexity"),
    "loglikelihood_rolling": ("bits_per_byte", "byte_perplexity", "word_perplexity"),
    "generate_until": ("exact_match", "stop_rate", "length"),
    "fidelity": ("kl", "agreement"),
    "generation": (
        "stop_rate", "length", "distinct_1", "distinct_2", "repetition", "exact_match", "contains",
    ),
}  # fmt: skip


def metric(kind: str, name: str) -> Metric:
    """The definition of a task kind's metric; an unknown name is a mean over items."""
    if kind == "loglikelihood" and name == "perplexity":
        return TARGET_PERPLEXITY
    for defined in (PERPLEXITY, BITS_PER_BYTE, BYTE_PERPLEXITY, WORD_PERPLEXITY, KL, AGREEMENT):
        if defined.name == name:
            return defined
    formula, better = _MEANS.get(name, (f"mean of {name} over items", "higher"))
    if kind == "loglikelihood" and name == "acc":
        formula = "mean(each token of the target is the most likely one)"
    return Metric(name, name, None, formula, better)


def estimate(defined: Metric, items: Sequence[Item], seed: int) -> Estimate:
    """The metric over items, with its interval."""
    return ratio_estimate(
        _column(items, defined.numerator),
        _column(items, defined.denominator),
        transform=defined.transform,
        clusters=_clusters(items),
        seed=seed,
    )


def difference(defined: Metric, items: Sequence[Item], base: Sequence[Item], seed: int) -> Estimate:
    """The metric minus the baseline's on the same items, with the paired interval."""
    return paired_difference(
        _column(items, defined.numerator) or [],
        _column(base, defined.numerator) or [],
        _column(items, defined.denominator),
        _column(base, defined.denominator),
        transform=defined.transform,
        clusters=_clusters(items),
        seed=seed,
    )


def _column(items: Sequence[Item], field: str | None) -> Any:
    return None if field is None else [float(item[field]) for item in items]


def _clusters(items: Sequence[Item]) -> list[Any] | None:
    return [item["cluster"] for item in items] if items and "cluster" in items[0] else None
