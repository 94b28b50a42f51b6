"""Zeroing single weights, layer by layer: each is scored on what the layers before it now give."""

from __future__ import annotations

from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from torch import Tensor, nn  # isort: skip

from tuneutils.shared.command import Run
from tuneutils.shared.errors import ToolError
from tuneutils.shared.layerwise import Step, decoder_of, walk
from tuneutils.tools.prune.params import Params
from tuneutils.tools.prune.plan import Shares
from tuneutils.tools.prune.sparse import (
    Inputs,
    Pattern,
    magnitude_mask,
    output_error,
    sparsegpt,
    wanda_mask,
)

#: Tokens on which the errors of outputs are reported, where nothing else needs the inputs' products.
ERROR_TOKENS = 2048


def prune_weights(run: Run[Params], model: Any, ids: Tensor, shares: Shares) -> list[dict[str, Any]]:
    """Zero weights of every linear layer of the decoder, in place; embeddings and head stay whole.

    Returns:
        A row for each matrix: what went, and what that did to its output on the calibration text.

    Raises:
        ToolError: columns that N:M does not divide.
    """
    params = run.params
    pattern = Pattern.parse(params.pattern)
    decoder = decoder_of(model, params.model)
    for name, module in decoder.linears().items():
        if pattern.group and module.in_features % pattern.group:
            raise ToolError(
                f"{name}: {module.in_features} columns cannot be cut into groups of {pattern.group}"
            )
    rows: list[dict[str, Any]] = []
    for number in range(params.rounds):
        # Few at first leaves more to choose from later (Zhu and Gupta 2017, arXiv 1710.01878, equation 1).
        grown = 1 - (1 - (number + 1) / params.rounds) ** 3
        levels = {n: shares.of(n) * grown for n in decoder.linears()}
        if params.budget == "global":
            levels = global_levels(decoder.linears(), levels)
        rows = []
        with run.progress(len(decoder.layers), f"pruning, round {number + 1}", "layers") as bar:
            for step in walk(decoder, ids.to(model.device)):
                rows += _prune_layer(params, step, levels, pattern)
                bar.update(1)
    return rows


def global_levels(linears: dict[str, nn.Linear], levels: dict[str, float]) -> dict[str, float]:
    """The share of each matrix that lies under one threshold for all of them.

    The threshold is the quantile of all absolute weights at the mean share, so that the total is the same.
    """
    sizes = {name: module.weight.numel() for name, module in linears.items()}
    count = int(sum(levels[n] * size for n, size in sizes.items()))
    if not count:
        return dict.fromkeys(levels, 0.0)
    everything = torch.cat([m.weight.detach().abs().flatten() for m in linears.values()])
    threshold = everything.kthvalue(count).values
    return {n: float((m.weight.abs() <= threshold).float().mean()) for n, m in linears.items()}


def _prune_layer(
    params: Params, step: Step, levels: dict[str, float], pattern: Pattern
) -> list[dict[str, Any]]:
    """Prune a layer's matrices on the inputs that they have with none of them pruned."""
    linears = step.linears
    before = {name: module.weight.detach() for name, module in linears.items()}
    # Only SparseGPT needs the inputs' products; the others report errors by them, for which fewer tokens do.
    tokens = step.inputs.shape[0] * step.inputs.shape[1]
    every = 1 if params.method == "sparsegpt" else -(-tokens // ERROR_TOKENS)
    seen: dict[str, Inputs] = {}

    def see(name: str, rows: Tensor) -> None:
        if name not in seen:
            seen[name] = Inputs.empty(rows.shape[1], every=every)
        seen[name].add(rows)

    rows = {}
    for names in step.observe_all(see):
        shares = [levels[f"{step.name}.{name}"] for name in names]
        inputs = seen[names[0]]
        made = _pruned(params, [before[n] for n in names], inputs, shares, pattern)
        for name, after in zip(names, made, strict=True):
            linears[name].weight.data = after
            rows[name] = {
                "layer": step.index,
                "module": name,
                "weights": after.numel(),
                "zeros": int((after == 0).sum()),
                "sparsity": round(float((after == 0).double().mean()), 6),
                "output_error": float(f"{output_error(before[name], after, inputs):.6g}"),
            }
    step.changed()
    return [rows[name] for name in linears if name in rows]


def _pruned(
    params: Params, weights: list[Tensor], inputs: Inputs, shares: list[float], pattern: Pattern
) -> list[Tensor]:
    """Matrices with the same inputs; those of which nothing goes stay as they are."""
    chosen = [i for i, share in enumerate(shares) if share > 0]
    made = list(weights)
    if not chosen:
        return made
    if params.method == "sparsegpt":
        pruned = sparsegpt(
            [weights[i] for i in chosen], inputs, [shares[i] for i in chosen], pattern, params.damping
        )
        for i, weight in zip(chosen, pruned, strict=True):
            made[i] = weight
        return made
    for i in chosen:
        if params.method == "wanda":
            mask = wanda_mask(weights[i], inputs, shares[i], pattern)
        else:
            mask = magnitude_mask(weights[i], shares[i], pattern)
        made[i] = weights[i].masked_fill(mask, 0)
    return made
