"""ExecuTorch: ``python -m tuneutils.shared.engines.executorch_pte MODEL.pte`` serves the protocol.

``convert FOLDER MODEL.pte SCHEME CONTEXT`` in place of the file writes one from a Transformers folder, for
XNNPACK: batch 1, a static key-value cache of CONTEXT tokens, and beside it ``MODEL.types.json``, what the
weights were lowered as. int8 and int4 round the linear layers' weights (a scale for each row, for each 32
weights) and, as they come, the activations; the embedding stays in float32.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuneutils.shared.device import usable_cpus
from tuneutils.shared.engines.protocol import Logits, private_stdout, serve

GROUP = 32


class ExecutorchPte:
    """A ``.pte`` file with the methods that ExecuTorch's own language-model runner asks for."""

    def __init__(self, path: str) -> None:
        import torch
        from executorch.extension.pybindings.portable_lib import (
            _threadpool_get_thread_count,
            _unsafe_reset_threadpool,
        )
        from executorch.runtime import Runtime
        from pytorch_tokenizers import CppHFTokenizer

        _unsafe_reset_threadpool(int(os.environ.get("OMP_NUM_THREADS") or usable_cpus()))
        self._threads = int(_threadpool_get_thread_count())
        self._torch = torch
        self._program = Runtime.get().load_program(path)
        self._forward = self._program.load_method("forward")
        self.vocabulary = self._constant("get_vocab_size")
        self._context = self._constant("get_max_context_len")
        self._tokenizer = CppHFTokenizer()
        self._tokenizer.load(str(Path(path).with_name("tokenizer.json")))
        self._length = 0

    def _constant(self, name: str) -> int:
        return int(self._program.load_method(name).execute([])[0])

    def describe(self) -> dict[str, Any]:
        from importlib.metadata import version

        return {"engine": "executorch", "version": version("executorch"), "threads": self._threads}

    def tokenize(self, text: str, special: bool) -> list[int]:  # noqa: ARG002 - always parsed
        return [int(i) for i in self._tokenizer.encode(text, 0, 0)]

    def begin(self, batch: int, length: int) -> None:
        if batch > 1 or length > self._context:
            raise ValueError(f"holds 1 sequence of {self._context} tokens, not {batch} of {length}")
        self._length = 0

    def logits(self, ids: Sequence[int]) -> Logits:
        self.begin(1, len(ids))
        return self._run(ids)

    def feed(self, rows: Sequence[Sequence[int]]) -> list[int]:
        return [int(self._run(rows[0])[-1].argmax())]

    def _run(self, ids: Sequence[int]) -> Logits:
        end = self._length + len(ids)
        inputs = [self._torch.tensor([list(ids)]), self._torch.arange(self._length, end)]
        made: Logits = self._forward.execute(inputs)[0][0].float().numpy()
        self._length = end
        return made


def convert(folder: str, target: str, scheme: str, context: int) -> None:
    """Export, quantize and lower; see the module."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass
    from transformers import AutoModelForCausalLM
    from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    model.config.use_cache = model.generation_config.use_cache = True
    model.generation_config.cache_implementation = "static"
    types = _quantize(model, scheme)
    exportable = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=context)
    length = torch.export.Dim("length", min=1, max=context - 1)
    program = exportable.export(
        input_ids=torch.zeros((1, 3), dtype=torch.long),
        cache_position=torch.arange(3),
        dynamic_shapes={"input_ids": {1: length}, "cache_position": {0: length}},
        strict=True,
    )
    lowered = to_edge_transform_and_lower(
        program,
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods={
            "get_vocab_size": int(model.config.get_text_config().vocab_size),
            "get_max_seq_len": context,
            "get_max_context_len": context,
            "use_kv_cache": True,
        },
    ).to_executorch(
        ExecutorchBackendConfig(
            extract_delegate_segments=True, memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False)
        )
    )
    with open(target, "wb") as stream:
        lowered.write_to_file(stream)
    Path(target).with_suffix(".types.json").write_text(json.dumps(types), encoding="utf-8")


def _quantize(model: Any, scheme: str) -> list[tuple[str, int, int]]:
    """Quantize the linear layers in place; type, parameters and bytes of each weight as it will be stored."""
    import torch
    from torch import nn

    rows: list[tuple[str, int, int]] = []
    bits = {"int8": 8, "int4": 4}.get(scheme)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if bits and head.weight is embedding.weight:  # the head is rounded, the embedding is not
        head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    for parameter in model.parameters():
        count = parameter.numel()
        if bits and id(parameter) in linear:
            scales = len(parameter) * (parameter.shape[1] // GROUP if bits == 4 else 1)
            rows.append((f"INT{bits}", count, count * bits // 8 + 4 * scales))
        else:
            rows.append(("F32", count, 4 * count))
    if not bits and head.weight is embedding.weight:
        rows.append(("F32", 0, 4 * head.weight.numel()))  # XNNPACK packs a head of its own
    if bits:
        from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerAxis, PerGroup, quantize_

        quantize_(
            model,
            Int8DynamicActivationIntxWeightConfig(
                weight_dtype=getattr(torch, f"int{bits}"),  # torch.int4 is no name that stubs know
                weight_granularity=PerAxis(0) if bits == 8 else PerGroup(GROUP),
            ),
        )
    return rows


def main(arguments: Sequence[str]) -> int:
    out = private_stdout()
    try:
        if arguments[0] == "convert":
            convert(arguments[1], arguments[2], arguments[3], int(arguments[4]))
            return 0
        started = time.perf_counter()
        engine = ExecutorchPte(arguments[0])
    except (RuntimeError, ValueError) as exc:
        print(" ".join(str(exc).split())[:300], file=sys.stderr)
        return 65
    serve(engine, time.perf_counter() - started, out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
