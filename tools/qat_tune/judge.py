"""How much of what rounding lost was won back, on held-out records, with intervals of resampled records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tuneutils.shared.divergences_model import Comparison
from tuneutils.shared.evaluate import RESAMPLES, Estimate, ratio_estimate

#: What is compared: the given model, rounded to nearest, and trained.
MODELS = ("float", "rounded", "trained")
Column = Sequence[Comparison]


def report(columns: dict[str, Column], origin: Sequence[int], seed: int) -> dict[str, Any]:
    """Perplexity, KL from the float model and top-1 agreement with it, and the shares recovered.

    Args:
        columns: by the names of ``MODELS``, one comparison a sequence.
        origin: the record of each sequence; records are what is resampled.
    """
    tokens = [c.tokens for c in columns["float"]]

    def estimate(values: Sequence[float], **keywords: Any) -> dict[str, Any]:
        return ratio_estimate(values, tokens, clusters=origin, seed=seed, **keywords).as_json()

    models = {}
    for name in MODELS:
        column = columns[name]
        models[name] = {
            "perplexity": estimate([c.nll for c in column], transform=np.exp),
            "kl": estimate([c.kl for c in column]),
            "agreement": estimate([c.agree for c in column]),
        }
    shares = {"perplexity": recovered([[c.nll for c in columns[m]] for m in MODELS], tokens, origin, seed)}
    kl = [[c.kl for c in columns[m]] for m in MODELS]
    shares["kl"] = recovered(kl, tokens, origin, seed, perplexity=False)
    return {
        "records": len(set(origin)),
        "sequences": len(tokens),
        "tokens": sum(tokens),
        "models": models,
        "recovered": {name: share and share.as_json() for name, share in shares.items()},
    }


def recovered(
    sums: Sequence[Sequence[float]],
    tokens: Sequence[int],
    origin: Sequence[int],
    seed: int,
    *,
    perplexity: bool = True,
) -> Estimate | None:
    """``(rounded - trained) / (rounded - float)``, of perplexities or of means a token; 1 is all of it.

    None where rounding lost nothing; so are resamples in which it did not, which are left out.

    Args:
        sums: of float, rounded and trained, ``(3, sequences)``.
    """
    order = {label: i for i, label in enumerate(dict.fromkeys(origin))}
    columns = np.zeros((len(order), 4))
    np.add.at(columns, [order[label] for label in origin], np.stack([*map(np.asarray, sums), tokens], 1))

    def share(summed: Any) -> Any:
        means = summed[:, :3] / summed[:, 3:]
        base, rounded, trained = (np.exp(means) if perplexity else means).T
        lost = rounded - base
        return (rounded - trained)[lost > 0] / lost[lost > 0]

    value = share(columns.sum(0, keepdims=True))
    if not len(value):
        return None
    n = len(order)
    if n < 2:
        return Estimate(float(value[0]), None, None, len(tokens), n)
    counts = np.random.default_rng(seed).multinomial(n, [1 / n] * n, RESAMPLES)
    low, high = np.percentile(share(counts @ columns), [2.5, 97.5])
    return Estimate(float(value[0]), float(low), float(high), len(tokens), n)


def lines(made: dict[str, Any]) -> list[str]:
    """The report for people."""

    def shown(value: dict[str, Any] | None, digits: int) -> str:
        if value is None:
            return "nothing was lost"
        text = f"{value['value']:.{digits}f}"
        return (
            text
            if value["low"] is None
            else f"{text} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"
        )

    out = [f"held out: {made['records']} records, {made['tokens']} tokens"]
    for name in MODELS:
        model = made["models"][name]
        line = f"{name}: perplexity {shown(model['perplexity'], 2)}"
        if name != "float":
            line += f", KL {shown(model['kl'], 4)}, agreement {shown(model['agreement'], 3)}"
        out.append(line)
    shares = made["recovered"]
    out.append(
        f"recovered of the perplexity {shown(shares['perplexity'], 2)}, of the KL {shown(shares['kl'], 2)}"
    )
    return out
