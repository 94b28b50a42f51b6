"""Quantized checkpoints that other libraries load, written tensor by tensor.

Integers go out in compressed-tensors' formats (https://github.com/vllm-project/compressed-tensors), which
Transformers and vLLM read: ``pack-quantized`` for weights alone, ``int-quantized`` where activations are
rounded too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

# isort: split
import torch
from torch import Tensor

from tuneutils.shared.quantizers import Grid, Scales
from tuneutils.shared.weights import INDEX, Weights

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
COMPANIONS = (".json", ".jinja", ".txt", ".model")
SHARD_BYTES = 5_000_000_000
PACKED_CODES = 1 << 18


def pack(codes: Tensor, bits: int, *, rows: bool = False) -> Tensor:
    """Signed codes of ``bits`` bits, densely in int32 words along each row (with ``rows``: each column).

    Code ``i`` is stored, with ``2**(bits-1)`` added, in the bits from ``i * bits`` on, low bits first, also
    across words: 32 codes take ``bits`` words.
    """
    given = codes.T if rows else codes
    # A part at a time: eight bytes a code are many times what is stored.
    parts = torch.split(given, max(1, PACKED_CODES // max(1, given.shape[1])))
    packed = torch.cat([_pack(part, bits) for part in parts])
    return (packed.T if rows else packed).contiguous()


def _pack(codes: Tensor, bits: int) -> Tensor:
    table = codes.to(torch.int64) + (1 << (bits - 1))
    count = table.shape[1]
    table = torch.nn.functional.pad(table, (0, -count % 32)).view(len(table), -1, 32)
    words = torch.zeros(*table.shape[:2], bits, dtype=torch.int64, device=codes.device)
    for i in range(32):
        word, offset = divmod(i * bits, 32)
        words[..., word] |= (table[..., i] << offset) & 0xFFFFFFFF
        if offset + bits > 32:
            words[..., word + 1] |= table[..., i] >> (32 - offset)
    packed = words.flatten(1)[:, : -(-count * bits // 32)]
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def unpack(words: Tensor, bits: int, count: int, *, rows: bool = False) -> Tensor:
    """The first ``count`` codes of each row (column) that :func:`pack` packed, int8."""
    table = (words.T if rows else words).to(torch.int64) & 0xFFFFFFFF
    table = torch.nn.functional.pad(table, (0, -table.shape[1] % bits)).view(len(table), -1, bits)
    out = torch.empty(*table.shape[:2], 32, dtype=torch.int64, device=words.device)
    for i in range(32):
        word, offset = divmod(i * bits, 32)
        value = table[..., word] >> offset
        if offset + bits > 32:
            value = value | (table[..., word + 1] << (32 - offset))
        out[..., i] = value & ((1 << bits) - 1)
    codes = (out.flatten(1)[:, :count] - (1 << (bits - 1))).to(torch.int8)
    return (codes.T if rows else codes).contiguous()


def packed_tensors(
    module: str, codes: Tensor, grid: Grid, scales: Scales, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What ``pack-quantized`` stores for a module: ``<module>.weight_packed``, scales, zero points, shape."""
    made = {
        f"{module}.weight_packed": pack(codes, grid.bits),
        f"{module}.weight_scale": scales.scale.to(dtype),
        f"{module}.weight_shape": torch.tensor(codes.shape),
    }
    if not grid.symmetric:
        made[f"{module}.weight_zero_point"] = pack(scales.zero.to(torch.int8), grid.bits, rows=True)
    return made


def plain_tensors(module: str, codes: Tensor, scales: Scales, dtype: torch.dtype) -> dict[str, Tensor]:
    """What ``int-quantized`` stores for a module: int8 codes and their scales."""
    return {f"{module}.weight": codes, f"{module}.weight_scale": scales.scale.to(dtype)}


def quantization_config(
    groups: Mapping[Grid, Sequence[str]], ignore: Sequence[str] = (), *, dynamic_inputs: bool = False
) -> dict[str, Any]:
    """The ``quantization_config`` of ``config.json``.

    A single grid is marked to be dequantized as it is read. Without that, Transformers 5.23 with
    compressed-tensors 0.15 to 0.20 builds the module that packed zero points are loaded into with an unpacked
    shape, and fails, as it does on embeddings; with it, all matrices are read by the first group's grid. So
    zero points, embeddings and several grids exclude each other.

    Args:
        groups: grid -> the modules on it.
        ignore: linear modules in full precision.
        dynamic_inputs: inputs are rounded to int8 by token, at run time.

    Raises:
        ValueError: several grids, one of them with zero points.
    """
    single = len(groups) == 1
    if not single and not all(grid.symmetric for grid in groups):
        raise ValueError("zero points need a single grid")
    form = "int-quantized" if dynamic_inputs else "pack-quantized"
    made: dict[str, Any] = {}
    for index, (grid, modules) in enumerate(groups.items()):
        made[f"group_{index}"] = {
            "targets": sorted(modules),
            "weights": _arguments(grid),
            "input_activations": _token_arguments() if dynamic_inputs else None,
            "output_activations": None,
            "format": form,
        }
    config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": made,
        "ignore": sorted(ignore),
    }
    return {**config, "dequantize": True} if single and not dynamic_inputs else config


def _arguments(grid: Grid) -> dict[str, Any]:
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if grid.group_size is None else "group",
        "group_size": grid.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _token_arguments() -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
        "actorder": None,
        "block_structure": None,
        "observer": None,
        "observer_kwargs": {},
    }


class CheckpointWriter:
    """A Transformers folder whose tensors arrive one at a time and are in memory no longer than that.

    Safetensors puts its header first, so each shard's data go to a temporary file and behind the header at
    the end. Format: https://github.com/huggingface/safetensors#format.

    Attributes:
        bytes: of tensor data so far.
    """

    def __init__(self, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.bytes = 0
        self._shard_bytes = shard_bytes
        self._headers: list[dict[str, Any]] = [{}]
        self._names: set[str] = set()
        self._sizes = [0]
        self._data = self._data_path(0).open("wb")

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Append tensors."""
        for name, tensor in tensors.items():
            assert name not in self._names, name
            self._names.add(name)
            raw = tensor.detach().cpu().contiguous()
            size = raw.numel() * raw.element_size()
            if self._sizes[-1] and self._sizes[-1] + size > self._shard_bytes:
                self._next_shard()
            start = self._sizes[-1]
            self._headers[-1][name] = {
                "dtype": DTYPES[raw.dtype],
                "shape": list(raw.shape),
                "data_offsets": [start, start + size],
            }
            if size:
                self._data.write(raw.flatten().view(torch.uint8).numpy().data)
            self._sizes[-1] += size
            self.bytes += size

    def _next_shard(self) -> None:
        self._data.close()
        self._headers.append({})
        self._sizes.append(0)
        self._data = self._data_path(len(self._headers) - 1).open("wb")

    def _data_path(self, shard: int) -> Path:
        return self.folder / f".shard-{shard}.data"

    def close(self) -> None:
        """Put the shards together under their final names, with an index if there are several."""
        self._data.close()
        count = len(self._headers)
        listed: dict[str, str] = {}
        for shard, header in enumerate(self._headers):
            name = f"model-{shard + 1:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"
            listed.update(dict.fromkeys(header, name))
            text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            with open(self.folder / name, "wb") as out, open(self._data_path(shard), "rb") as data:
                out.write(len(text).to_bytes(8, "little") + text)
                out.flush()
                _copy(data.fileno(), out.fileno())
            self._data_path(shard).unlink()
        if count > 1:
            index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(listed.items()))}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._data.close()


def _copy(source: int, target: int) -> None:
    while chunk := os.read(source, 1 << 22):
        view = memoryview(chunk)
        while view:
            view = view[os.write(target, view) :]


def copy_companions(weights: Weights, to: Path, changes: Mapping[str, Any]) -> None:
    """Copy a model's tokenizer, licence and configuration, with changes to ``config.json``.

    A change to None removes the field.
    """
    for path in sorted(weights.folder.iterdir()):
        licence = path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
        if (
            path.is_file()
            and (path.suffix in COMPANIONS or licence)
            and path.name not in (INDEX, "artifact.json")
        ):
            (to / path.name).write_bytes(path.read_bytes())
    config = {**weights.config, **changes}
    config = {key: value for key, value in config.items() if value is not None or key not in changes}
    (to / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
