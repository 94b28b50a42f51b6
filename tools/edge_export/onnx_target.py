"""ONNX for ONNX Runtime GenAI, by its own model builder."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tuneutils.shared.errors import require
from tuneutils.tools.edge_export.children import run_child
from tuneutils.tools.edge_export.export import Built, Job
from tuneutils.tools.edge_export.gguf_model import TensorTypes, tensor_types

MODEL = "model.onnx"


def build(job: Job) -> Built:
    """Write ``model.onnx`` with its data, ``genai_config.json`` and the tokenizer."""
    require("onnx_ir", "edge")
    require("onnx", "edge")
    with tempfile.TemporaryDirectory(prefix="tuneutils-onnx-") as cache:
        run_child(
            [
                *("onnxruntime_genai.models.builder", "-i", str(job.weights.folder), "-o", str(job.folder)),
                *("-p", job.scheme, "-e", "cpu", "-c", cache),
                *("--extra_options", f"block_size={job.params.block_size}"),
            ],
            {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **job.environment},
            f"the ONNX model builder cannot write {job.scheme}",
        )
    return Built("onnxruntime-genai", ".", onnx_tensor_types(job.folder / MODEL), "onnx_genai.py")


def onnx_tensor_types(path: Path) -> TensorTypes:
    """The types of an ONNX file's weights.

    A matrix stored in blocks counts as the parameters that it stands for; its scales and zero points count as
    bytes of it. Rotary tables are no weights.
    """
    rows = list(_weights(path))
    looked_up = sum(size for name, _, size in rows if name.startswith("embedding "))
    return tensor_types(((n.removeprefix("embedding "), p, s) for n, p, s in rows), looked_up)


def _weights(path: Path) -> Iterator[tuple[str, int, int]]:
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    sizes = {t.name: (t, _bytes(t)) for t in model.graph.initializer}
    done: set[str] = set()
    for node in model.graph.node:
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            attributes = {a.name: a.i for a in node.attribute}
            start = 1 if node.op_type == "MatMulNBits" else 0
            packed = node.input[start]
            others = [n for n in node.input[start + 1 :] if n in sizes]
            if packed in done or packed not in sizes:  # a tied embedding reads the head's through a Reshape
                continue
            bits = attributes.get("bits", 4)
            names = [n for n in [packed, *others] if n not in done]
            yield f"INT{bits}", sizes[packed][1] * 8 // bits, sum(sizes[n][1] for n in names)
            done.update(names)
    for name, (tensor, size) in sizes.items():
        floating = tensor.data_type in (
            onnx.TensorProto.FLOAT,
            onnx.TensorProto.FLOAT16,
            onnx.TensorProto.BFLOAT16,
        )
        if name not in done and floating and not name.startswith(("cos_cache", "sin_cache")):
            mark = "embedding " if name.startswith("model.embed_tokens") else ""
            yield mark + onnx.TensorProto.DataType.Name(tensor.data_type), math.prod(tensor.dims), size


def _bytes(tensor: object) -> int:
    import onnx

    assert isinstance(tensor, onnx.TensorProto)
    width = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(math.prod(tensor.dims)) * width
