"""Safetensors read and written in slices, so that no more than a slice is ever in memory.

``safetensors.safe_open`` maps the file, and every page that was read counts as resident until it is closed;
``save_file`` needs all tensors of a shard at once. Both would double the memory of a merge.
Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuneutils.shared.errors import ToolError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
SLICE_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Spec:
    """A tensor's dtype and shape, without its data."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """One safetensors file, open for reading rows of its tensors.

    Raises:
        ToolError: it is no safetensors file, or is cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY)
        try:
            length = int.from_bytes(os.pread(self._file, 8, 0), "little")
            header: dict[str, Any] = json.loads(os.pread(self._file, length, 8))
            header.pop("__metadata__", None)
            self.specs = {k: Spec(DTYPES[v["dtype"]], tuple(v["shape"])) for k, v in header.items()}
            self._offsets = {k: 8 + length + v["data_offsets"][0] for k, v in header.items()}
            end = 8 + length + max((v["data_offsets"][1] for v in header.values()), default=0)
        except (ValueError, KeyError, TypeError, MemoryError, OverflowError) as exc:
            os.close(self._file)
            raise ToolError(f"{path}: no safetensors file: {type(exc).__name__}: {exc}") from exc
        if os.fstat(self._file).st_size < end:
            os.close(self._file)
            raise ToolError(f"{path}: cut off: its header promises {end} bytes")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of a tensor; a scalar counts as one row."""
        spec = self.specs[name]
        rows = spec.shape[0] if spec.shape else 1
        stop = rows if stop is None else stop
        width = spec.nbytes // rows if rows else 0
        buffer = bytearray((stop - start) * width)
        view, at = memoryview(buffer), self._offsets[name] + start * width
        while view:
            done = os.preadv(self._file, [view], at)
            if not done:
                raise ToolError(f"{self.path}: cut off in tensor {name}")
            view, at = view[done:], at + done
        shape = (stop - start, *spec.shape[1:]) if spec.shape else ()
        if not buffer:
            return torch.empty(shape, dtype=spec.dtype)
        return torch.frombuffer(buffer, dtype=spec.dtype).reshape(shape)

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def row_slices(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive rows that hold at most ``SLICE_ELEMENTS`` elements, one row at least."""
    rows = shape[0] if shape else 1
    step = max(1, SLICE_ELEMENTS // max(1, math.prod(shape[1:])))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def write_tensors(
    path: Path, specs: Mapping[str, Spec], slices: Callable[[str], Iterator[torch.Tensor]]
) -> None:
    """Write a safetensors file whose tensors arrive in slices of rows.

    Args:
        specs: what is written, in this order.
        slices: gives a tensor's consecutive slices, in any dtype; each is rounded once to the spec's.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, spec in specs.items():
        offsets = [at, at := at + spec.nbytes]
        header[name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, spec in specs.items():
            written = 0
            for part in slices(name):
                stored = part.to(spec.dtype).contiguous().flatten().view(torch.uint8)
                written += stream.write(stored.numpy().data)
            assert written == spec.nbytes, name
