"""GGUF: written here in a plain precision, quantized by llama.cpp itself."""

from __future__ import annotations

from pathlib import Path

from tuneutils.tools.edge_export.children import run_child
from tuneutils.tools.edge_export.export import Built, Job
from tuneutils.tools.edge_export.gguf_model import FILE_TYPES, gguf_tensor_types, stored_type, write_gguf

MODEL = "model.gguf"


def build(job: Job) -> Built:
    """Write ``model.gguf``."""
    target = job.folder / MODEL
    write(job, target)
    return Built("llama.cpp", MODEL, gguf_tensor_types(target), "llama_cpp.py")


def write(job: Job, target: Path) -> None:
    """The GGUF file of a job's scheme; quantization starts from the precision of the stored weights."""
    if job.scheme in FILE_TYPES:
        write_gguf(job.weights, job.tokenizer, target, job.scheme)
        return
    plain = job.folder / ".plain.gguf"
    write_gguf(job.weights, job.tokenizer, plain, stored_type(job.weights))
    command = ["tuneutils.shared.engines.llama_cpp", "quantize", str(plain), str(target), job.scheme]
    command += ["pure"] if job.params.pure else []
    run_child(command, job.environment, f"llama.cpp cannot quantize to {job.scheme}")
    plain.unlink()
