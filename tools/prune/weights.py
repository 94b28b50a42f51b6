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
    linears = step.linears
    seen = {n: Inputs.empty(m.in_features, products=True) for n, m in linears.items()}
    step.observe(list(linears), lambda name, inputs: seen[name].add(inputs))
    rows = []
    for name, module in linears.items():
        before = module.weight.detach().clone()
        level = levels[f"{step.name}.{name}"]
        if level > 0:
            module.weight.data = _pruned(params, before, seen[name], level, pattern)
        after = module.weight.detach()
        rows.append(
            {
                "layer": step.index,
                "module": name,
                "weights": before.numel(),
                "zeros": int((after == 0).sum()),
                "sparsity": round(float((after == 0).double().mean()), 6),
                "output_error": float(f"{output_error(before, after, seen[name]):.6g}"),
            }
        )
    step.changed()
    return rows


def _pruned(params: Params, weight: Tensor, inputs: Inputs, level: float, pattern: Pattern) -> Tensor:
    if params.method == "sparsegpt":
        return sparsegpt(weight, inputs, level, pattern, params.damping)
    if params.method == "wanda":
        mask = wanda_mask(weight, inputs, level, pattern)
    else:
        mask = magnitude_mask(weight, level, pattern)
    return weight.masked_fill(mask, 0)
