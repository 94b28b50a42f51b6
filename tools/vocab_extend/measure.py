"""What new tokens change: tokens per word, and bits per byte under each way to start."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tuneutils.shared.evaluate import paired_difference, ratio_estimate

LN2 = math.log(2)
Items = list[dict[str, float]]
Estimates = dict[str, Any]


def fertility(old: Tokenizer, new: Tokenizer, texts: Sequence[str], seed: int) -> Estimates:
    """Tokens per word (between white space) and UTF-8 bytes per token, before and after, by document."""
    words = [len(text.split()) for text in texts]
    sizes = [len(text.encode("utf-8", "surrogatepass")) for text in texts]
    counts = {
        side: [len(e.ids) for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        for side, tokenizer in (("before", old), ("after", new))
    }
    made: Estimates = {"documents": len(texts), "words": sum(words), "bytes": sum(sizes)}
    for side, tokens in counts.items():
        made[side] = {
            "tokens": sum(tokens),
            "tokens_per_word": ratio_estimate(tokens, words, seed=seed).as_json(),
            "bytes_per_token": ratio_estimate(sizes, tokens, seed=seed).as_json(),
        }
    return made


def bits(items: Items, seed: int) -> Estimates:
    """Bits per byte of measured documents, which does not depend on how they are cut."""
    nll, sizes = _columns(items)
    return ratio_estimate(nll, sizes, seed=seed).as_json()


def bits_change(before: Items, after: Items, seed: int) -> Estimates:
    """Bits per byte after less before, paired by document."""
    (old, sizes), (new, _) = _columns(before), _columns(after)
    return paired_difference(new, old, sizes, sizes, seed=seed).as_json()


def _columns(items: Items) -> tuple[Any, Any]:
    return np.array([item["nll"] for item in items]), LN2 * np.array([item["bytes"] for item in items])


def measure_all(
    texts: Mapping[str, Sequence[str]],
    loaded: Any,
    tokenizer: Any,
    put: Mapping[str, Callable[[], None]],
    max_length: int,
    seed: int,
) -> Estimates:
    """Bits per byte of each text: by the model as it is, and after each of ``put`` with the new tokenizer.

    Args:
        loaded: the model with its old tokenizer; it ends as the last of ``put`` leaves it.
        put: way to start → puts its rows into the model.
    """
    from dataclasses import replace

    from tuneutils.shared.evaluate_model import perplexity_items, text_sequence

    def measured(model: Any) -> dict[str, Items]:
        return {
            name: perplexity_items(
                model,
                [(text_sequence(t, model.tokenizer), len(t.encode("utf-8", "surrogatepass"))) for t in given],
                max_length=max_length,
            )
            for name, given in texts.items()
        }

    before = measured(loaded)
    made: Estimates = {name: {"base": bits(before[name], seed), "inits": {}} for name in texts}
    extended = replace(loaded, tokenizer=tokenizer)
    for way, place in put.items():
        place()
        after = measured(extended)
        for name in texts:
            made[name]["inits"][way] = {
                "bits_per_byte": bits(after[name], seed),
                "change": bits_change(before[name], after[name], seed),
            }
    return made
