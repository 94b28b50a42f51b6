"""What pruning cost on held-out records, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tuneutils.shared.divergences_model import Comparison
from tuneutils.shared.evaluate import paired_difference, ratio_estimate


def describe(before: Sequence[Comparison], after: Sequence[Comparison], seed: int) -> dict[str, Any]:
    """Both models' numbers, and nats a token lost, over the same records."""
    tokens = [c.tokens for c in after]

    def of(column: Sequence[Comparison]) -> dict[str, Any]:
        nll = [c.nll for c in column]
        return {
            "perplexity": ratio_estimate(nll, tokens, transform=np.exp, seed=seed).as_json(),
            "kl": ratio_estimate([c.kl for c in column], tokens, seed=seed).as_json(),
            "agreement": ratio_estimate([c.agree for c in column], tokens, seed=seed).as_json(),
        }

    lost = paired_difference([c.nll for c in after], [c.nll for c in before], tokens, tokens, seed=seed)
    return {"original": of(before), "pruned": of(after), "lost_nll": lost.as_json(), "records": len(tokens)}


def one_line(made: dict[str, Any]) -> str:
    """The report in a line for people."""

    def shown(value: dict[str, Any], digits: int) -> str:
        if value["low"] is None:
            return f"{value['value']:.{digits}f}"
        return f"{value['value']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"

    pruned, original = made["pruned"], made["original"]
    return (
        f"perplexity {shown(original['perplexity'], 2)} → {shown(pruned['perplexity'], 2)}, "
        f"KL {shown(pruned['kl'], 3)}, agreement {shown(pruned['agreement'], 3)} (n = {made['records']})"
    )
