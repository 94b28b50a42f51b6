"""What a fusion attends to and how well it predicts, on encoded records by domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tuneutils.shared.adapters.fusion import forced_weights, recorded_weights
from tuneutils.shared.evaluate import paired_difference, ratio_estimate
from tuneutils.shared.evaluate_model import Score, score_sequences
from tuneutils.shared.models import Loaded
from tuneutils.shared.supervise import Encoded

Domains = Mapping[str, Sequence[Encoded]]


def attention(loaded: Loaded, domains: Domains, adapters: int) -> dict[str, dict[str, NDArray[np.float64]]]:
    """The mean weights ``(N,)`` at each place over all tokens of a domain, by domain and place.

    Records go through one at a time, so that no padding is counted.
    """
    made: dict[str, dict[str, NDArray[np.float64]]] = {}
    for domain, sequences in domains.items():
        sums: dict[str, NDArray[np.float64]] = {}
        tokens = 0
        for sequence in sequences:
            with torch.inference_mode(), recorded_weights(loaded.model) as kept:
                loaded.model(torch.tensor([sequence.input_ids], device=loaded.device), logits_to_keep=1)
            tokens += len(sequence)
            for place, (weights,) in kept.items():
                total = weights.double().reshape(-1, adapters).sum(0).cpu().numpy()
                sums[place] = sums.get(place, np.zeros(adapters)) + total
        made[domain] = {place: total / tokens for place, total in sums.items()}
    return made


def ways(model: Any, names: Sequence[str]) -> dict[str, AbstractContextManager[Any]]:
    """How the fused model is measured: as it is, as its base, as each adapter alone, as their average."""
    count = len(names)
    made: dict[str, AbstractContextManager[Any]] = {"fused": nullcontext(), "base": model.disable_adapter()}
    for i, name in enumerate(names):
        made[f"only {name}"] = forced_weights(model, [float(i == j) for j in range(count)])
    made["average"] = forced_weights(model, [1 / count] * count)
    return made


def score_domains(loaded: Loaded, domains: Domains, progress: Any) -> dict[str, list[Score]]:
    """The scores of every domain's records, in order."""
    flat = [sequence for sequences in domains.values() for sequence in sequences]
    scores = iter(score_sequences(loaded, flat, progress=progress))
    return {domain: [next(scores) for _ in sequences] for domain, sequences in domains.items()}


def compare(
    scores: Mapping[str, Mapping[str, Sequence[Score]]], names: Sequence[str], seed: int
) -> dict[str, dict[str, Any]]:
    """For each domain the loss of every way, in nats a token, and the fused one's difference from each.

    Negative differences mean that the fusion is better. ``best_single`` is the adapter with the least loss
    on these very records, a choice that favours it over the fusion.
    """
    made: dict[str, dict[str, Any]] = {}
    for domain in scores["fused"]:
        losses = {way: [-s.logprob for s in found[domain]] for way, found in scores.items()}
        tokens = [s.tokens for s in scores["fused"][domain]]
        rows = {
            way: {"loss": ratio_estimate(loss, tokens, seed=seed).as_json()} for way, loss in losses.items()
        }
        for way, loss in losses.items():
            if way != "fused":
                found = paired_difference(losses["fused"], loss, tokens, tokens, seed=seed)
                rows[way]["fused_minus"] = found.as_json()
        best = min((f"only {name}" for name in names), key=lambda way: sum(losses[way]))
        made[domain] = {"tokens": sum(tokens), "best_single": best.removeprefix("only "), "ways": rows}
    return made
