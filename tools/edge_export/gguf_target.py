"""GGUF: written here in a plain precision, quantized by llama.cpp itself."""

from __future__ import annotations

import os
import subprocess
import sys

from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.tools.edge_export.export import Built, Job
from tuneutils.tools.edge_export.gguf_model import FILE_TYPES, gguf_tensor_types, stored_type, write_gguf

MODEL = "model.gguf"


def build(job: Job) -> Built:
    """Write ``model.gguf``; quantization starts from the precision in which the weights are stored."""
    target = job.folder / MODEL
    write(job, target)
    return Built("llama.cpp", MODEL, gguf_tensor_types(target), "llama_cpp.mjs")


def write(job: Job, target: os.PathLike[str]) -> None:
    """The GGUF file of a job's scheme."""
    if job.scheme in FILE_TYPES:
        write_gguf(job.weights, job.tokenizer, job.folder / target, job.scheme)
        return
    plain = job.folder / ".plain.gguf"
    write_gguf(job.weights, job.tokenizer, plain, stored_type(job.weights))
    command = [sys.executable, "-m", "tuneutils.shared.engines.llama_cpp", "quantize"]
    command += [str(plain), str(target), job.scheme, *(["pure"] if job.params.pure else [])]
    done = subprocess.run(
        command, env={**os.environ, **job.environment}, capture_output=True, text=True, check=False
    )
    plain.unlink()
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"]
        known = done.returncode in list(ExitCode)
        raise ToolError(
            f"llama.cpp cannot quantize to {job.scheme}: {lines[-1]}",
            code=ExitCode(done.returncode) if known else ExitCode.RETRYABLE,
        )
