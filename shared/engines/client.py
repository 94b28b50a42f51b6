"""A running engine, from the side of the tool: starts the process, sends requests, ends it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tuneutils.shared.engines.protocol import Logits
from tuneutils.shared.engines.runtimes import require_engine
from tuneutils.shared.errors import ExitCode, ToolError

MODULES = {
    "llama.cpp": "tuneutils.shared.engines.llama_cpp",
    "onnxruntime-genai": "tuneutils.shared.engines.onnx_genai",
    "openvino-genai": "tuneutils.shared.engines.openvino_genai",
    "executorch": "tuneutils.shared.engines.executorch_pte",
}


class EngineProcess:
    """One model in one runtime, in a process of its own.

    Args:
        engine: a key of ``MODULES``.
        model: the file or folder that the runtime loads.
        environment: added to this process's own.

    Attributes:
        info: what the engine said of itself: ``vocabulary``, ``load_s``, ``version``, ``threads``.

    Raises:
        ToolError: the runtime is absent (69), or does not load the model (65).
    """

    def __init__(self, engine: str, model: Path, environment: Mapping[str, str] | None = None) -> None:
        require_engine(engine)
        self.engine, self.model = engine, model
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULES[engine], str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **(environment or {})},
        )
        self.info = self._receive()

    @property
    def vocabulary(self) -> int:
        return int(self.info["vocabulary"])

    def logits(self, sequences: Sequence[Sequence[int]], scratch: Path) -> list[Logits]:
        """``(len(ids), vocabulary)`` of each sequence, through a file in ``scratch``."""
        path = scratch / f"logits-{os.getpid()}.f32"
        try:
            self.ask("logits", ids=[list(s) for s in sequences], out=str(path))
            flat = np.fromfile(path, np.float32).reshape(-1, self.vocabulary)
        finally:
            path.unlink(missing_ok=True)
        return np.split(flat, np.cumsum([len(s) for s in sequences])[:-1].tolist())

    def greedy(self, ids: Sequence[int], max_new_tokens: int, stop: Sequence[int]) -> list[int]:
        """The most likely continuation, the stop token included."""
        found = self.ask("greedy", ids=list(ids), max_new_tokens=max_new_tokens, stop=list(stop))
        return [int(i) for i in found["ids"]]

    def tokenize(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Token ids by the runtime's own tokenizer, without BOS."""
        found: list[list[int]] = self.ask("tokenize", texts=list(texts), special=special)["ids"]
        return found

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """One request and its answer.

        Raises:
            ToolError: the engine refused (65) or died (75).
        """
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError as exc:
            raise self._died() from exc
        answer = self._receive()
        if "error" in answer:
            raise ToolError(f"{self.model}: {self.engine}: {answer['error']}")
        return answer

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _died(self) -> ToolError:
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        known = code in list(ExitCode)
        why = said[-1].strip() if said else f"ended by signal {-code}" if code < 0 else f"exit code {code}"
        return ToolError(
            f"{self.model}: {self.engine}: {why}", code=ExitCode(code) if known else ExitCode.RETRYABLE
        )

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
