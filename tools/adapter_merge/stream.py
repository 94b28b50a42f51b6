"""An adapter into its base, slice by slice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from tuneutils.shared.device import dtype_name
from tuneutils.shared.errors import ToolError
from tuneutils.tools.adapter_merge.adapter import Adapter, Factors
from tuneutils.tools.adapter_merge.base import INDEX, Base, copy_companions, write_config
from tuneutils.tools.adapter_merge.tensorfile import (
    Spec,
    TensorFile,
    row_slices,
    write_tensors,
)


class Update(Protocol):
    """A ΔW as the base stores it."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def rows(self, start: int, stop: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class Dense:
    """A ΔW that is no product of small factors; made when first needed, and not kept."""

    shape: tuple[int, int]
    make: Callable[[], torch.Tensor]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.make()[start:stop]


@dataclass(frozen=True)
class Edit:
    """What happens to one stored tensor, in this order.

    Attributes:
        source: take the tensor from this file and key rather than from the base.
        update: add ΔW.
        magnitude: DoRA's m, one a logical output; the sum is rescaled to these norms.
        columns: the norms run over columns of the stored tensor (Conv1D, embeddings) rather than rows.
        factor: IA3's scaling, broadcast over the stored tensor.
        added: a bias update.
        tokens: (indices, rows) that replace rows.
    """

    source: tuple[TensorFile, str] | None = None
    update: Update | None = None
    magnitude: torch.Tensor | None = None
    columns: bool = False
    factor: torch.Tensor | None = None
    added: torch.Tensor | None = None
    tokens: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def only_tokens(self) -> bool:
        others = (self.source, self.update, self.magnitude, self.factor, self.added)
        return self.tokens is not None and all(value is None for value in others)


@dataclass
class Plan:
    """Edits by parameter name."""

    edits: dict[str, Edit]
    untied: dict[str, str]

    @property
    def changed(self) -> int:
        return len(self.edits)


def plan(adapter: Adapter, base: Base) -> Plan:
    """Turn an adapter's tensors into edits of the base's.

    Raises:
        ToolError: a module or shape that this base does not have.
    """
    edits: dict[str, Edit] = {}
    for name, key in adapter.whole.items():
        edits[name] = Edit(source=(adapter.file, key))
    for module, parts in adapter.modules.items():
        for name, change in _module_edits(adapter, base, module, parts).items():
            edits[name] = replace(edits.get(name, Edit()), **change)
    return _settle_ties(edits, adapter, base)


def _module_edits(
    adapter: Adapter, base: Base, module: str, parts: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    weight: dict[str, Any] = {}
    bias: dict[str, Any] = {}
    transposed = module in base.structure.conv1d
    for part, target in (("base_layer.weight", weight), ("base_layer.bias", bias)):
        if part in parts:
            target["source"] = (adapter.file, parts[part])
    factors = adapter.factors(module, transposed)
    if factors is not None:
        weight["update"] = factors
        weight["magnitude"] = adapter.part(module, "lora_magnitude_vector")
        weight["columns"] = factors.transposed
        if (update := adapter.part(module, "lora_B.bias")) is not None:
            rank = factors.a.shape[0]
            bias["added"] = update * adapter.scaling(module, rank)
    if (scale := adapter.part(module, "ia3_l")) is not None:
        weight["factor"] = scale.T if transposed else scale
        if scale.shape[0] != 1 and base.key(f"{module}.bias") is not None:
            bias["factor"] = scale.flatten()
    if (rows := adapter.part(module, "trainable_tokens_delta")) is not None:
        weight["tokens"] = (_token_indices(adapter, module), rows)
    found = {f"{module}.weight": weight, f"{module}.bias": bias}
    return {name: change for name, change in found.items() if change}


def _token_indices(adapter: Adapter, module: str) -> torch.Tensor:
    config = adapter.config
    given = config.get("token_indices") or config.get("trainable_token_indices")
    if isinstance(given, dict):
        given = next((v for k, v in given.items() if module == k or module.endswith(f".{k}")), None)
    if not given:
        raise ToolError(f"{adapter.path}: {module}: trained token rows without their indices")
    return torch.tensor(given)


def _settle_ties(edits: dict[str, Edit], adapter: Adapter, base: Base) -> Plan:
    """Decide for each tied pair whether it stays tied, then check names and shapes.

    Unmerged, LoRA or saved weights on one side of a pair leave the other side as it is, so the merged
    model must not be tied; trained token rows and ``ensure_weight_tying`` act on both sides.
    """
    untied: dict[str, str] = {}
    for tied, partner in base.structure.tied.items():
        here, there = edits.get(tied), edits.get(partner)
        if here is None and there is None:
            continue
        stays = adapter.config.get("ensure_weight_tying") or adapter.type == "TRAINABLE_TOKENS"
        if stays or (here is None and there is not None and there.only_tokens):
            edits.setdefault(partner, here or Edit())
            edits.pop(tied, None)
            continue
        untied[tied] = partner
        if there is not None and there.tokens is not None:
            edits[tied] = replace(edits.get(tied, Edit()), tokens=there.tokens)
        edits.setdefault(tied, Edit())
    for name, edit in edits.items():
        _check_fits(adapter, base, name, edit)
    return Plan(edits, untied)


def _check_fits(adapter: Adapter, base: Base, name: str, edit: Edit) -> None:
    key = base.key(name)
    if key is None:
        raise ToolError(
            f"{adapter.path}: does not fit its base: {base.ref.given} has no parameter {name}; "
            "name the right base with --model"
        )
    shape = base.spec(key).shape
    given: tuple[int, ...] = shape
    if edit.source is not None:
        file, key_there = edit.source
        given = file.specs[key_there].shape
    if edit.update is not None and given == shape:
        given = edit.update.shape
    if given != shape:
        resized = " (a resized vocabulary: resize the base first)" if given[1:] == shape[1:] else ""
        raise ToolError(
            f"{adapter.path}: does not fit its base: {name} is {list(given)} in the adapter and "
            f"{list(shape)} in {base.ref.given}{resized}"
        )


def write_model(base: Base, adapter: Path, made: Plan, to: Path, dtype: torch.dtype | None) -> dict[str, int]:
    """Write the merged model, shard by shard, with configuration and tokenizer.

    Args:
        adapter: folder whose tokenizer, if any, takes the base's place.
        dtype: as stored; None keeps each tensor's own.

    Returns:
        counts of tensors, of changed ones, and of bytes.
    """
    copy_companions(base.folder, adapter, to)
    by_key = {base.key(name): (name, edit) for name, edit in made.edits.items() if name not in made.untied}
    weight_map: dict[str, str] = {}
    total = 0
    for file in base.files:
        sources = {key: (file, key, by_key.get(key, ("", Edit()))[1]) for key in file.specs}
        for tied in base.structure.tied:
            sources.pop(tied, None)
        for tied, partner in made.untied.items():
            key = base.key(partner)
            if key in file.specs:
                assert key is not None
                sources[tied] = (file, key, made.edits[tied])
        specs = {name: _spec(source.specs[key], dtype) for name, (source, key, _) in sources.items()}
        write_tensors(to / file.path.name, specs, lambda name, s=sources: edited(*s[name]))  # type: ignore[misc]
        weight_map.update(dict.fromkeys(specs, file.path.name))
        total += sum(spec.nbytes for spec in specs.values())
    if (base.folder / INDEX).is_file():
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (to / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    changes: dict[str, object] = {}
    if made.untied:
        changes["tie_word_embeddings"] = False
    if dtype is not None:
        changes["dtype"] = dtype_name(dtype)
    if changes:
        write_config(to, changes)
    return {"tensors": len(weight_map), "changed": made.changed, "bytes": total}


def _spec(spec: Spec, dtype: torch.dtype | None) -> Spec:
    return Spec(dtype, spec.shape) if dtype is not None and spec.dtype.is_floating_point else spec


def edited(file: TensorFile, key: str, edit: Edit) -> Iterator[torch.Tensor]:
    """A tensor's slices of rows with its edit applied in float32; untouched ones as they are."""
    if edit.source is not None:
        file, key = edit.source
    shape = file.specs[key].shape
    update = edit.update
    if isinstance(update, Dense):
        whole = update.make()
        update = replace(update, make=lambda: whole)
    edit = replace(edit, update=update)
    touched = any(v is not None for v in (update, edit.factor, edit.added, edit.tokens))
    scale = _column_scale(file, key, edit, shape) if edit.magnitude is not None and edit.columns else None
    for start, stop in row_slices(shape):
        rows = file.read(key, start, stop)
        yield _apply(rows, edit, scale, start, stop) if touched else rows


def _apply(rows: torch.Tensor, edit: Edit, scale: torch.Tensor | None, start: int, stop: int) -> torch.Tensor:
    rows = rows.float()
    if edit.update is not None:
        rows += edit.update.rows(start, stop)
    if scale is not None:
        rows *= scale
    elif edit.magnitude is not None:
        rows *= (edit.magnitude[start:stop] / torch.linalg.vector_norm(rows, dim=1))[:, None]
    if edit.factor is not None:
        rows = rows * (edit.factor if edit.factor.shape[0] == 1 else edit.factor[start:stop])
    if edit.added is not None:
        rows += edit.added[start:stop]
    if edit.tokens is not None:
        indices, values = edit.tokens
        here = (indices >= start) & (indices < stop)
        rows[indices[here] - start] = values[here]
    return rows


def _column_scale(file: TensorFile, key: str, edit: Edit, shape: tuple[int, ...]) -> torch.Tensor:
    """DoRA's m / ‖W + ΔW‖ (Liu et al. 2024, equation 5) where the norms run down the stored columns."""
    assert edit.update is not None
    assert edit.magnitude is not None
    squares = torch.zeros(shape[1], dtype=torch.float64)
    for start, stop in row_slices(shape):
        rows = file.read(key, start, stop).float() + edit.update.rows(start, stop)
        squares += rows.double().square().sum(0)
    return edit.magnitude / squares.sqrt().float()


def plan_updates(updates: Mapping[str, Update], adapter: Adapter, base: Base) -> Plan:
    """Edits that add one ΔW to each named module's weight."""
    edits = {f"{module}.weight": Edit(update=update) for module, update in updates.items()}
    return _settle_ties(edits, adapter, base)


def module_factors(adapter: Adapter, base: Base) -> dict[str, Factors]:
    """The low-rank updates of an adapter that is nothing but LoRA; checked against the base's shapes."""
    found = {}
    for module in adapter.modules:
        factors = adapter.factors(module, module in base.structure.conv1d)
        if factors is not None:
            found[module] = factors
            _check_fits(adapter, base, f"{module}.weight", Edit(update=factors))
    return found
