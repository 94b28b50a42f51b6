"""Perplexity on the domain and on general text through a run, and what was gained and forgotten."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneutils.shared.command import Run
from tuneutils.shared.errors import ToolError
from tuneutils.shared.evaluate import Estimate, paired_difference, ratio_estimate, score_windows
from tuneutils.shared.files import atomic_file
from tuneutils.shared.record_source import Source
from tuneutils.shared.supervise import Encoded
from tuneutils.tools.cpt_run.params import Params

Items = list[dict[str, float]]
LN2 = math.log(2)


@dataclass
class Tracker:
    """Measures texts at steps of a run. What was measured is kept, so that a resumed run need not again.

    Attributes:
        texts: ``domain`` and ``general``, as far as given → encoded documents with their bytes.
        max_length: tokens that the model sees at once.
        folder: where measurements are kept; that of the run's checkpoints.
        history: step → text → ``nll``, ``tokens`` and ``bytes`` of each document.
    """

    texts: Mapping[str, Sequence[tuple[Encoded, int]]]
    max_length: int
    folder: Path
    history: dict[int, dict[str, Items]] = field(default_factory=dict)

    @property
    def windows(self) -> int:
        """Stretches of at most ``max_length`` tokens that one measurement scores."""
        size = self.max_length
        lengths = [len(sequence) for texts in self.texts.values() for sequence, _ in texts]
        return sum(len(list(score_windows(length, size, size))) for length in lengths)

    def measure(
        self, step: int, loaded: Any, *, writes: bool = True, progress: Callable[[int], None] | None = None
    ) -> dict[str, Items]:
        """Score all texts with a loaded model, or read what an earlier start of this run found."""
        from tuneutils.shared.evaluate_model import perplexity_items

        path = self.folder / f"measured-{step}.json"
        if path.is_file():
            self.history[step] = json.loads(path.read_text(encoding="utf-8"))
            return self.history[step]
        self.history[step] = {
            name: perplexity_items(loaded, texts, max_length=self.max_length, progress=progress)
            for name, texts in self.texts.items()
        }
        if writes:
            with atomic_file(path) as temporary:
                temporary.write_text(json.dumps(self.history[step]), encoding="utf-8")
        return self.history[step]


def mixed_precision(loaded: Any) -> AbstractContextManager[Any]:
    """What the trainer computes in: autocast to the precision asked for, unless that is float32."""
    import torch

    if loaded.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(loaded.device.type, loaded.dtype)


def read_texts(
    run: Run[Params], sources: Mapping[str, Source], tokenizer: Any
) -> dict[str, list[tuple[Encoded, int]]]:
    """Documents to measure on, encoded as ``lm-bench`` does.

    Raises:
        ToolError: (65) a record that cannot be encoded, or none at all.
    """
    from tuneutils.shared.evaluate_model import record_sequence

    made: dict[str, list[tuple[Encoded, int]]] = {}
    for name, source in sources.items():
        made[name] = []
        for item in source.located:
            if run.params.eval_limit and len(made[name]) == run.params.eval_limit:
                break
            try:
                sequence, size = record_sequence(item.record, tokenizer, run.params.template)
                if not size or len(sequence) < 2:
                    raise ValueError("has no text to score")
            except ValueError as exc:
                source.reader.refuse(item, str(exc))
                continue
            made[name].append((sequence, size))
        if not made[name]:
            raise ToolError(f"no document left to measure on ({source.reader.stats.refused} refused)")
    return made


def _column(items: Items, name: str) -> NDArray[np.float64]:
    return np.array([item[name] for item in items])


def bits_per_byte(items: Items, seed: int) -> Estimate:
    """``sum nll / (ln 2 * sum bytes)``; documents are resampled."""
    return ratio_estimate(_column(items, "nll"), LN2 * _column(items, "bytes"), seed=seed)


def perplexity(items: Items, seed: int) -> Estimate:
    """``exp(sum nll / sum tokens)``."""
    return ratio_estimate(_column(items, "nll"), _column(items, "tokens"), transform=np.exp, seed=seed)


def relative_change(before: Items, after: Items, seed: int) -> Estimate:
    """Perplexity after over before, less one; the same documents are resampled on both sides.

    Both have the same tokens, so it is ``exp((sum nll after - sum nll before) / sum tokens) - 1``.
    """
    difference = _column(after, "nll") - _column(before, "nll")
    return ratio_estimate(difference, _column(before, "tokens"), transform=np.expm1, seed=seed)


def bits_change(before: Items, after: Items, seed: int) -> Estimate:
    """Bits per byte after less before, paired by document."""
    sizes = LN2 * _column(before, "bytes")
    return paired_difference(_column(after, "nll"), _column(before, "nll"), sizes, sizes, seed=seed)
