"""A model's matrices put on the grid for training, and what became of them written as ``quantize`` does."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

# isort: split
import torch
from torch import nn

from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.layerwise import Decoder
from tuneutils.shared.packing import (
    CheckpointWriter,
    copy_companions,
    packed_tensors,
    plain_tensors,
    quantization_config,
)
from tuneutils.shared.quantizers import Grid, working_groups
from tuneutils.shared.weights import Weights
from tuneutils.tools.qat_tune.fake import QatLinear
from tuneutils.tools.qat_tune.params import Params


@dataclass
class Layout:
    """What of a model goes on the grid.

    Attributes:
        targets, kept: full names of the linears that do, and that do not.
        stored: precision of scales and of all that is not on the grid.
    """

    decoder: Decoder
    targets: list[str]
    kept: list[str]
    grid: Grid
    stored: torch.dtype


def lay_out(decoder: Decoder, weights: Weights, params: Params) -> Layout:
    """Choose the matrices.

    Raises:
        ToolError: ``--skip`` leaves none (2), or one is no whole number of groups wide (65).
    """
    linears = decoder.linears()
    kept = [name for name in linears if any(fnmatchcase(name, p) for p in params.skip)]
    targets = [name for name in linears if name not in set(kept)]
    if not targets:
        raise ToolError(f"{weights.given}: --skip leaves nothing to quantize", code=ExitCode.USAGE)
    grid = Grid(params.bits, params.group_size or None, params.symmetric)
    bad = [name for name in targets if not grid.fits(linears[name].in_features)]
    if bad:
        fit = sorted(set.intersection(*(set(working_groups(linears[n].in_features)) for n in targets)))
        hint = f"--group-size {' or '.join(map(str, fit)) if fit else 0} works"
        named = f"{', '.join(bad[:3])}{f' and {len(bad) - 3} more' if len(bad) > 3 else ''}"
        raise ToolError(
            f"{weights.given}: {len(bad)} matrices are {linears[bad[0]].in_features} wide, no multiple of "
            f"--group-size {params.group_size}: {named}; {hint}, or --skip them"
        )
    return Layout(decoder, targets, kept, grid, _stored_dtype(weights, targets[0], params))


def _stored_dtype(weights: Weights, target: str, params: Params) -> torch.dtype:
    if params.dtype_stored != "auto":
        made: torch.dtype = getattr(torch, params.dtype_stored)
        return made
    code, _ = weights.specs()[weights.key(f"{target}.weight")]
    return {"F16": torch.float16}.get(code, torch.bfloat16)


@torch.no_grad()
def put_on_grid(model: Any, layout: Layout, params: Params, *, trained: bool = True) -> dict[str, QatLinear]:
    """Replace the targets of a float32 model in place, and round all else to the stored precision.

    Only the targets train, so that what is stored is what was simulated, everywhere.

    Args:
        trained: as the parameters say; otherwise rounding to nearest alone.

    Returns:
        Full name -> layer.
    """
    alpha = 2 * params.lora_rank if params.lora_alpha is None else params.lora_alpha
    lora = (params.lora_rank, alpha) if trained and params.method == "lora" else None
    on_grid = {f"{name}.weight" for name in layout.targets}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if name not in on_grid:
            parameter.data = parameter.data.to(layout.stored).to(parameter.dtype)
    made: dict[str, QatLinear] = {}
    for name in layout.targets:
        parent, _, leaf = name.rpartition(".")
        made[name] = QatLinear(
            model.get_submodule(name),
            layout.grid,
            layout.stored,
            round_inputs=params.activations == "int8",
            learn_scales=trained and params.learn_scales,
            lora=lora,
        )
        setattr(model.get_submodule(parent), leaf, made[name])
    return made


def settle(model: nn.Module, dtype: torch.dtype) -> Any:
    """The model as it computes once it is stored and loaded in a precision; changes it in place."""
    for module in model.modules():
        if isinstance(module, QatLinear):
            module.settle()
    return model.to(dtype).requires_grad_(False).eval()


def write(
    layers: dict[str, QatLinear], layout: Layout, weights: Weights, folder: Path, params: Params
) -> dict[str, Any]:
    """Write the artifact's model; returns its size in the metrics' terms."""
    dynamic = params.activations == "int8"
    with CheckpointWriter(folder) as out:
        for name, layer in layers.items():
            codes, scales = layer.codes()
            if dynamic:
                out.put(plain_tensors(name, codes, scales, layout.stored))
            else:
                out.put(packed_tensors(name, codes, layout.grid, scales, layout.stored))
        _write_rest(out, layout, weights)
    kept = [*layout.kept, layout.decoder.head]
    config = quantization_config({layout.grid: layout.targets}, kept, dynamic_inputs=dynamic)
    dtype = str(layout.stored).removeprefix("torch.")
    copy_companions(weights, folder, {"quantization_config": config, "dtype": dtype, "torch_dtype": None})
    on_grid = sum(layer.weight.numel() for layer in layers.values())
    total = sum(p.numel() for n, p in layout.decoder.model.named_parameters() if _is_stored(n))
    return {
        "bytes": out.bytes,
        "weights": total,
        "bits_per_weight": round(8 * out.bytes / total, 4),
        "quantized_matrices": len(layers),
        "quantized_share": round(on_grid / total, 4),
    }


def _is_stored(name: str) -> bool:
    return name.rpartition(".")[2] not in ("stretch", "lora_a", "lora_b")


def _write_rest(out: CheckpointWriter, layout: Layout, weights: Weights) -> None:
    """What is not on the grid, tensor by tensor, in the stored precision; a tied head once, as embedding."""
    done = {weights.key(f"{name}.weight") for name in layout.targets}
    if layout.decoder.tied and layout.decoder.embedding != layout.decoder.head:
        done.add(f"{layout.decoder.head}.weight")
    names = {weights.key(name): name for name, _ in layout.decoder.model.named_parameters()}
    for key in weights.files:
        if key not in done:
            tensor = weights.read(key)[key]
            stored = tensor.to(layout.stored) if tensor.is_floating_point() else tensor
            out.put({names.get(key, key): stored})
