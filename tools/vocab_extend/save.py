"""The extended model's files: every tensor as it was stored, the embeddings with new rows behind the old."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

# isort: split
import torch
from torch import Tensor

from tuneutils.shared.packing import CheckpointWriter
from tuneutils.shared.weights import Weights as Stored
from tuneutils.shared.weights import check_finite
from tuneutils.tools.vocab_extend.initialise import Weights, new_rows

if TYPE_CHECKING:
    from tuneutils.tools.vocab_extend.tokens import Extension


def save(
    base: Any, folder: Path, made: Extension, weights: Weights | None, seed: int, trust_remote_code: bool
) -> None:
    """Write weights and configuration into the folder that has the tokenizer already."""
    stored = Stored(base, trust_remote_code=trust_remote_code)
    model = stored.skeleton()
    stored.check_names(model)
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    places = {
        stored.key(name): min(i for i, module in enumerate(modules) if module is owner)
        for name, owner in _owned(model)
        if any(module is owner for module in modules)
    }
    if modules[0].weight is modules[1].weight:
        places = dict.fromkeys(places, 0)
    size = made.first + len(made.pieces)
    with CheckpointWriter(folder) as writer:
        for key in stored.files:
            tensor = stored.read(key)[key]
            if key in places:
                check_finite(base.given, key, tensor)
                tensor = _with_rows(tensor, made, size, weights, seed + places[key])
            writer.put({key: tensor})
    _configuration(stored, folder, max(size, _rows(stored.config)))


def _owned(model: Any) -> list[tuple[str, Any]]:
    return [
        (f"{name}.{leaf}", owner)
        for name, owner in model.named_modules()
        for leaf, value in owner._parameters.items()
        if value is not None
    ]


def _with_rows(tensor: Tensor, made: Extension, size: int, weights: Weights | None, seed: int) -> Tensor:
    old = tensor[: made.first]
    if tensor.dim() == 1:  # a head's bias
        rows = old.float().mean().expand(size - made.first)
    else:
        rows = new_rows(old, size - made.first, weights, seed)
    return torch.cat([old, rows.to(tensor.dtype), tensor[size:]])


def _rows(config: Mapping[str, Any]) -> int:
    return int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size", 0))


def _configuration(stored: Stored, folder: Path, size: int) -> None:
    """The base's configuration with the new vocabulary's size, and what else the tokenizer did not write."""
    from tuneutils.shared.artifact import write_json

    for path in sorted(stored.folder.iterdir()):
        licence = path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
        code = stored.trust_remote_code and path.suffix == ".py"
        kept = path.name == "generation_config.json" or licence or code
        if path.is_file() and kept:
            (folder / path.name).write_bytes(path.read_bytes())
    config = dict(stored.config)
    if "vocab_size" in config or "text_config" not in config:
        config["vocab_size"] = size
    if "vocab_size" in config.get("text_config", {}):
        config["text_config"] = {**config["text_config"], "vocab_size": size}
    write_json(folder / "config.json", config)
