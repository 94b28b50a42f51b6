"""The engine's side of the protocol: one JSON request a line on stdin, one JSON answer a line on stdout.

An engine loads one model and answers ``logits``, ``greedy``, ``tokenize``, ``speed`` and ``close``. Logits
are written as raw float32 to the file that the request names. Only the standard library and NumPy.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]


class Engine(Protocol):
    """One model in one runtime.

    Attributes:
        vocabulary: width of the logits.
    """

    vocabulary: int

    def describe(self) -> dict[str, Any]:
        """Runtime, version and threads."""

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Token ids without BOS; ``special``: control tokens in the text are parsed."""

    def logits(self, ids: Sequence[int]) -> Logits:
        """``(len(ids), vocabulary)``: after each token, in one pass."""

    def begin(self, batch: int, length: int) -> None:
        """Forget everything; room for ``batch`` sequences of ``length`` tokens."""

    def feed(self, rows: Sequence[Sequence[int]]) -> list[int]:
        """Append equally many tokens to each sequence; the most likely next token of each."""


def serve(engine: Engine, load_s: float, stdout: int) -> None:
    """Answer requests until stdin ends. ``stdout`` is a descriptor that libraries do not write to."""
    with os.fdopen(stdout, "w", encoding="utf-8") as out:

        def answer(value: dict[str, Any]) -> None:
            out.write(json.dumps(value) + "\n")
            out.flush()

        answer({"load_s": load_s, "vocabulary": engine.vocabulary, **engine.describe()})
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer(_handle(engine, request))
            except (RuntimeError, ValueError, OSError) as exc:
                answer({"error": " ".join(str(exc).split())[:300]})


def _handle(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    kind = request["do"]
    if kind == "logits":
        with open(request["out"], "wb") as sink:
            for ids in request["ids"]:
                sink.write(np.ascontiguousarray(engine.logits(ids), dtype=np.float32).tobytes())
        return {}
    if kind == "greedy":
        return {"ids": greedy(engine, request["ids"], request["max_new_tokens"], set(request["stop"]))}
    if kind == "tokenize":
        return {"ids": [engine.tokenize(text, request["special"]) for text in request["texts"]]}
    if kind == "speed":
        return speed(engine, request)
    if kind == "memory":
        return {"peak_rss_bytes": peak_rss_bytes()}
    raise ValueError(f"unknown request {kind!r}")


def greedy(engine: Engine, ids: Sequence[int], max_new_tokens: int, stop: set[int]) -> list[int]:
    """The most likely continuation, the stop token included."""
    engine.begin(1, len(ids) + max_new_tokens)
    made = engine.feed([ids])
    while len(made) < max_new_tokens and made[-1] not in stop:
        made += engine.feed([made[-1:]])
    return made


def speed(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """Seconds of prefill and of one decoding step, after one repeat that warms up."""
    prompt, batch, tokens = request["prompt"], request["batch"], request["tokens"]
    generator = np.random.default_rng(request["seed"])
    rows = generator.integers(0, request["vocabulary"], (batch, prompt)).tolist()
    prefill_s, steps_s = [], []
    for _ in range(request["repeats"] + 1):
        engine.begin(batch, prompt + tokens)
        started = time.perf_counter()
        made = engine.feed(rows)
        first = time.perf_counter()
        for _ in range(tokens - 1):
            made = engine.feed([[token] for token in made])
        prefill_s.append(first - started)
        steps_s.append((time.perf_counter() - first) / (tokens - 1))
    return {
        "prefill_s": prefill_s[1:],
        "step_s": steps_s[1:],
        "prefill_median_s": statistics.median(prefill_s[1:]),
        "step_median_s": statistics.median(steps_s[1:]),
    }


def peak_rss_bytes() -> int:
    """Highest resident size of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def private_stdout() -> int:
    """A descriptor of the real stdout; the number 1 becomes stderr, where libraries may print."""
    kept = os.dup(1)
    os.dup2(2, 1)
    return kept
