"""OpenVINO's intermediate representation, made by OpenVINO GenAI from our GGUF."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from tuneutils.shared.engines.runtimes import require_engine
from tuneutils.shared.errors import ToolError
from tuneutils.tools.edge_export.children import run_child
from tuneutils.tools.edge_export.export import Built, Job
from tuneutils.tools.edge_export.gguf_model import FILE_TYPES, TensorTypes, tensor_types
from tuneutils.tools.edge_export.gguf_target import write

MODEL = "openvino_model.xml"
WEIGHTS = {"f32", "f16", "bf16", "u8", "i8", "u4", "i4"}
#: Elements of a constant that may be a weight; shapes and axes are smaller.
SMALLEST = 16
#: What OpenVINO's GGUF reader knows.
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def build(job: Job) -> Built:
    """Write ``openvino_model.xml`` and ``.bin`` and the tokenizer's models."""
    name = (job.weights.config.get("architectures") or ["none"])[0]
    if name not in ARCHITECTURES:
        raise ToolError(f"{job.weights.given}: {name}: OpenVINO reads {', '.join(ARCHITECTURES)}")
    if job.scheme not in FILE_TYPES:
        require_engine("llama.cpp")
    path = job.folder / "model.gguf"
    write(job, path)
    command = ["tuneutils.shared.engines.openvino_genai", "convert", str(path), str(job.weights.folder)]
    run_child(command, job.environment, "OpenVINO cannot read the GGUF file")
    path.unlink()
    if not (job.folder / MODEL).is_file():
        raise ToolError(f"{job.weights.given}: OpenVINO wrote no {MODEL}")
    return Built("openvino-genai", ".", openvino_tensor_types(job.folder / MODEL), "openvino_genai.py")


def openvino_tensor_types(path: Path) -> TensorTypes:
    """The types of the matrices and vectors; scales and zero points of packed weights count as bytes only."""
    return tensor_types(_constants(path))


def _constants(path: Path) -> Iterator[tuple[str, int, int]]:
    seen = set()
    for layer in ElementTree.parse(path).getroot().iter("layer"):
        data = layer.find("data")
        if layer.get("type") != "Const" or data is None or data.get("offset") in seen:
            continue
        shape = [int(n) for n in (data.get("shape") or "").split(",") if n.strip()]
        kind = data.get("element_type", "")
        if math.prod(shape) < SMALLEST or kind not in WEIGHTS:
            continue
        seen.add(data.get("offset"))
        beside = len(shape) == 3 and shape[-1] == 1
        yield kind.upper(), 0 if beside else math.prod(shape), int(data.get("size", "0"))
