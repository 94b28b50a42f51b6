"""OpenVINO: ``python -m tuneutils.shared.engines.openvino_genai FOLDER`` serves the protocol.

The folder holds ``openvino_model.xml``, which OpenVINO GenAI makes of a GGUF file, and the tokenizer's two
models; ``convert MODEL.gguf TOKENIZER`` in place of the folder writes them beside the file.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tuneutils.shared.device import usable_cpus
from tuneutils.shared.engines.protocol import Logits, private_stdout, serve


class OpenvinoGenai:
    """A stateful OpenVINO model; its tokenizer is OpenVINO GenAI's."""

    def __init__(self, folder: str) -> None:
        import openvino
        import openvino_genai

        self._threads = int(os.environ.get("OMP_NUM_THREADS") or usable_cpus())
        self._version = openvino_genai.__version__
        core = openvino.Core()
        options = {"INFERENCE_NUM_THREADS": self._threads, "PERFORMANCE_HINT": "LATENCY"}
        self._compiled = core.compile_model(str(Path(folder) / "openvino_model.xml"), "CPU", options)
        self._request = self._compiled.create_infer_request()
        self._tokenizer = openvino_genai.Tokenizer(folder)
        self.vocabulary = int(self._compiled.output(0).partial_shape[2].get_length())
        self._length = 0

    def describe(self) -> dict[str, Any]:
        return {"engine": "openvino-genai", "version": self._version, "threads": self._threads}

    def tokenize(self, text: str, special: bool) -> list[int]:  # noqa: ARG002 - always parsed
        found = self._tokenizer.encode(text, add_special_tokens=False)
        return [int(i) for i in found.input_ids.data[0]]

    def begin(self, batch: int, length: int) -> None:  # noqa: ARG002 - its state grows
        self._request.reset_state()
        self._length = 0

    def logits(self, ids: Sequence[int]) -> Logits:
        self.begin(1, len(ids))
        found: Logits = self._infer([ids])[0]
        return found

    def feed(self, rows: Sequence[Sequence[int]]) -> list[int]:
        return [int(i) for i in self._infer(rows)[:, -1].argmax(-1)]

    def _infer(self, rows: Sequence[Sequence[int]]) -> Logits:
        ids = np.array(rows, np.int64)
        batch, width = ids.shape
        end = self._length + width
        positions = np.broadcast_to(np.arange(self._length, end, dtype=np.int64), (batch, width))
        found = self._request.infer(
            {
                "input_ids": ids,
                "attention_mask": np.ones((batch, end), np.int64),
                "position_ids": np.ascontiguousarray(positions),
                "beam_idx": np.arange(batch, dtype=np.int32),
            }
        )
        self._length = end
        made: Logits = found[0]
        return made


def convert(path: str, tokenizer: str) -> None:
    """Write the intermediate representation of a GGUF file beside it.

    The tokenizer is converted from the Transformers folder ``tokenizer``: the one that OpenVINO GenAI
    makes of a GGUF file's metadata does not split as ``tokenizer.ggml.pre`` says.
    """
    import openvino
    import openvino_genai
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    openvino_genai.LLMPipeline(path, "CPU", enable_save_ov_model=True)
    made = convert_tokenizer(AutoTokenizer.from_pretrained(tokenizer), with_detokenizer=True)
    for model, name in zip(made, ("tokenizer", "detokenizer"), strict=True):
        openvino.save_model(model, str(Path(path).with_name(f"openvino_{name}.xml")))


def main(arguments: Sequence[str]) -> int:
    out = private_stdout()
    try:
        if arguments[0] == "convert":
            convert(arguments[1], arguments[2])
            return 0
        started = time.perf_counter()
        engine = OpenvinoGenai(arguments[0])
    except RuntimeError as exc:
        print(" ".join(str(exc).split())[:300], file=sys.stderr)
        return 65
    serve(engine, time.perf_counter() - started, out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
