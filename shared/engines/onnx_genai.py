"""ONNX Runtime GenAI: ``python -m tuneutils.shared.engines.onnx_genai FOLDER`` serves the protocol."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from tuneutils.shared.device import usable_cpus
from tuneutils.shared.engines.protocol import Logits, private_stdout, serve


class OnnxGenai:
    """A folder with ``genai_config.json``, the ONNX model and its tokenizer."""

    def __init__(self, folder: str) -> None:
        import onnxruntime_genai as og

        self._og = og
        self._threads = int(os.environ.get("OMP_NUM_THREADS") or usable_cpus())
        config = og.Config(folder)
        options = {"intra_op_num_threads": self._threads, "session.intra_op.allow_spinning": "0"}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = og.Model(config)
        self._tokenizer = og.Tokenizer(self._model)
        with open(os.path.join(folder, "genai_config.json"), encoding="utf-8") as stream:
            described = json.load(stream)["model"]
        self.vocabulary = int(described["vocab_size"])
        self._context = int(described["context_length"])
        self._generator: Any = None
        self._fed = False

    def describe(self) -> dict[str, Any]:
        return {"engine": "onnxruntime-genai", "version": self._og.__version__, "threads": self._threads}

    def tokenize(self, text: str, special: bool) -> list[int]:  # noqa: ARG002 - always parsed
        return [int(i) for i in self._tokenizer.encode(text)]

    def begin(self, batch: int, length: int) -> None:
        params = self._og.GeneratorParams(self._model)
        longest = min(length + 1, self._context)
        # Several sequences go on together to the end, past any EOS: only speed is measured on them.
        least = longest if batch > 1 else 0
        params.set_search_options(batch_size=batch, max_length=longest, min_length=least, do_sample=False)
        self._generator = self._og.Generator(self._model, params)
        self._fed = False

    def logits(self, ids: Sequence[int]) -> Logits:
        self.begin(1, len(ids))
        self._generator.append_tokens(np.array([ids], np.int32))
        found: Logits = np.asarray(self._generator.get_output("logits"), np.float32)[0]
        if len(found) != len(ids):
            raise RuntimeError(f"the model gives {len(found)} rows of logits for {len(ids)} tokens")
        return found

    def feed(self, rows: Sequence[Sequence[int]]) -> list[int]:
        if len(rows) > 1 and self._fed:
            self._generator.generate_next_token()  # appends what feed returned; a batch takes no others
        else:
            self._generator.append_tokens(np.array(rows, np.int32))
        self._fed = True
        last = self._generator.get_logits().reshape(len(rows), -1)
        return [int(i) for i in last.argmax(-1)]


def main(arguments: Sequence[str]) -> int:
    out = private_stdout()
    started = time.perf_counter()
    try:
        engine = OnnxGenai(arguments[0])
    except RuntimeError as exc:
        print(" ".join(str(exc).split())[:300], file=sys.stderr)
        return 65
    serve(engine, time.perf_counter() - started, out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
