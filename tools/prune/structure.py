"""Cutting out heads, feed-forward channels or layers: what stays is a smaller plain model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from torch import Tensor  # isort: skip

from tuneutils.shared.command import Run
from tuneutils.shared.importance import Importance, measure_importance
from tuneutils.shared.layerwise import PARTS, decoder_of, layer_linears, layer_parts
from tuneutils.shared.logprobs_model import causal_nll
from tuneutils.shared.narrowing import Shape, influential_layers, make_student
from tuneutils.tools.prune.params import Params
from tuneutils.tools.prune.plan import units_left

TAYLOR_ROWS = 4


def prune_structure(run: Run[Params], model: Any, ids: Tensor) -> tuple[Any, list[dict[str, Any]]]:
    """The smaller model, and a row for each of the original's layers: what stays of it, and its scores.

    All layers keep equally many heads and channels, so that one config describes them.

    Raises:
        ToolError: the architecture has no such modules; the message names what is missing.
    """
    params = run.params
    layers = decoder_of(model, params.model).layers
    if params.method != "layers":
        for index, layer in enumerate(layers):
            layer_parts(layer, f"{params.model}: layer {index}")
    text = model.config.get_text_config()
    there = {
        "heads": text.num_key_value_heads,
        "mlp": text.intermediate_size,
        "layers": text.num_hidden_layers,
    }[params.method]
    target = units_left(there, params.sparsity)
    origin = list(range(text.num_hidden_layers))
    scores: dict[int, float] = {}
    ids = ids.to(model.device)
    for number in range(params.rounds):
        keep = max(target, round(there - (there - target) * (number + 1) / params.rounds))
        importance = score(model, ids, params.importance, params.method)
        shape = Shape(
            influential_layers(importance.influence, keep) if params.method == "layers" else None,
            intermediate=keep if params.method == "mlp" else None,
            kv_heads=keep if params.method == "heads" else None,
        )
        scores |= dict(zip(origin, importance.influence.tolist(), strict=True))
        model = make_student(model, shape, importance).to(ids.device).requires_grad_(False)
        if shape.layers is not None:
            origin = [origin[i] for i in shape.layers]
    left = target if params.method != "layers" else 0
    rows = [
        {
            "layer": index,
            "module": params.method,
            "kept": (left or there if params.method != "layers" else 1) if index in origin else 0,
            "sparsity": round(1 - (left / there if left else 1), 6) if index in origin else 1.0,
            "influence": round(score_, 6),
        }
        for index, score_ in sorted(scores.items())
    ]
    return model, rows


def score(model: Any, ids: Tensor, by: str, method: str) -> Importance:
    """Importance by activations, with Taylor's where asked."""
    made = measure_importance(model, ids, channels=method != "layers")
    if by == "activation":
        return made
    return taylor(model, ids, made)


def taylor(model: Any, ids: Tensor, made: Importance) -> Importance:
    """First-order importance |sum of weight × gradient| (Molchanov et al. 2019, arXiv 1906.10771, eq. 8).

    Of a channel or group of heads, over the columns of the matrix that reads it; of a layer, the sum of its
    matrices' |weight × gradient|.
    """
    decoder = decoder_of(model)
    weights = [m.weight.requires_grad_(True) for m in decoder.linears().values()]
    model.zero_grad()
    for start in range(0, len(ids), TAYLOR_ROWS):
        rows = ids[start : start + TAYLOR_ROWS]
        causal_nll(model, rows, None, rows, reduction="sum").backward()  # type: ignore[no-untyped-call]
    influence, mlp, groups = [], [], []
    for layer in decoder.layers:
        linears = layer_linears(layer)
        products = {n: (m.weight * m.weight.grad).detach() for n, m in linears.items()}
        influence.append(torch.stack([p.abs().sum() for p in products.values()]).sum())
        if made.mlp.numel():
            mlp.append(products[PARTS["down"]].sum(0).abs())
            heads = products[PARTS["o"]].sum(0).view(made.groups.shape[1], -1)
            groups.append(heads.sum(1).abs())
    for weight in weights:
        weight.requires_grad_(False)
        weight.grad = None
    return replace(
        made,
        influence=torch.stack(influence),
        mlp=torch.stack(mlp) if mlp else made.mlp,
        groups=torch.stack(groups) if groups else made.groups,
    )
