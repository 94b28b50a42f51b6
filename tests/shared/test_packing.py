"""Packed integers against compressed-tensors' own, and checkpoints that safetensors reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tuneutils.shared.models import resolve
from tuneutils.shared.packing import (
    CheckpointWriter,
    copy_companions,
    pack,
    packed_tensors,
    quantization_config,
    unpack,
)
from tuneutils.shared.quantizers import Grid, fake_quantize, fit, to_codes
from tuneutils.shared.weights import Weights

CASES = [(bits, columns) for bits in range(2, 9) for columns in (32, 64, 40, 7)]


def codes_of(bits: int, rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits * columns)
    return torch.randint(
        -(1 << bits - 1), 1 << bits - 1, (rows, columns), generator=generator, dtype=torch.int8
    )


@pytest.mark.parametrize(("bits", "columns"), CASES)
@pytest.mark.parametrize("rows", [False, True])
def test_unpack_undoes_pack(bits: int, columns: int, rows: bool) -> None:
    codes = codes_of(bits, 5, columns)
    given = codes.T.contiguous() if rows else codes
    assert torch.equal(unpack(pack(given, bits, rows=rows), bits, columns, rows=rows), given)


@pytest.mark.parametrize(("bits", "columns"), CASES)
@pytest.mark.parametrize("rows", [False, True])
def test_packing_is_that_of_compressed_tensors(bits: int, columns: int, rows: bool) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = codes_of(bits, 5, columns)
    given = codes.T.contiguous() if rows else codes
    assert torch.equal(
        pack(given, bits, rows=rows), helpers.pack_to_int32(given, bits, packed_dim=0 if rows else 1)
    )


def test_four_bits_by_hand() -> None:
    """-8 is stored as 0, 7 as 15; the first code takes the lowest bits."""
    words = pack(torch.tensor([[-8, 7, -7, 6, 0, 0, 0, -1]], dtype=torch.int8), 4)
    assert words.tolist() == [[0x7888E1F0]]


@pytest.mark.parametrize("grid", [Grid(4, 16), Grid(4, 16, False), Grid(3, 32, False), Grid(8)], ids=str)
def test_compressed_tensors_decompresses_to_the_simulated_weights(grid: Grid) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    scales = fit(weight, grid)
    stored = packed_tensors("m", to_codes(weight, grid, scales), grid, scales, torch.float32)
    config = quantization_config({grid: ["m"]})["config_groups"]["group_0"]
    scheme = QuantizationScheme(targets=["Linear"], weights=config["weights"])
    theirs = PackedQuantizationCompressor.decompress(
        {k.removeprefix("m."): v for k, v in stored.items()}, scheme
    )
    assert torch.equal(theirs["weight"], fake_quantize(weight, grid, scales))


def test_zero_points_on_several_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="single grid"):
        quantization_config({Grid(4, 16, False): ["a"], Grid(8, 16, False): ["b"]})


def test_a_single_file(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5).to(torch.bfloat16), "b": torch.arange(4), "c": torch.tensor(0, dtype=torch.uint8),
        "d": torch.randn(6, 2).T, "e": torch.empty(0, 3),
    }  # fmt: skip
    with CheckpointWriter(tmp_path) as out:
        for name, tensor in tensors.items():
            out.put({name: tensor})
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert out.bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as stream:
        assert stream.metadata() == {"format": "pt"}


def test_shards_and_their_index(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, shard_bytes=100) as out:
        for i in range(4):
            out.put({f"t{i}": torch.full((15,), float(i))})
    names = [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, "model.safetensors.index.json"]
    assert index == {"metadata": {"total_size": 240}, "weight_map": {f"t{i}": n for i, n in enumerate(names)}}
    assert load_file(tmp_path / names[2])["t2"].tolist() == [2.0] * 15


def test_companions_without_the_old_manifest(tiny_model: Path, tmp_path: Path) -> None:
    copy_companions(Weights(resolve(str(tiny_model))), tmp_path, {"dtype": "bfloat16", "torch_dtype": None})
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert {"tokenizer.json", "tokenizer_config.json"} <= {p.name for p in tmp_path.iterdir()}
    assert not list(tmp_path.glob("*.safetensors"))
