"""An edge package as a model that can be scored: the runtime computes, in a process of its own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

# isort: split
import torch
from torch import nn

from tuneutils.shared.artifact import MANIFEST, load_manifest
from tuneutils.shared.engines.client import EngineProcess
from tuneutils.shared.evaluate_model import Score
from tuneutils.shared.logprobs import IGNORE_INDEX
from tuneutils.shared.models import ModelRef, load_tokenizer, resolve
from tuneutils.shared.supervise import Encoded


def is_edge(path: str) -> bool:
    """Whether a path is a package that ``edge-export`` wrote."""
    folder = Path(path)
    return (folder / MANIFEST).is_file() and load_manifest(folder).get("kind") == "edge"


def resolve_any(path: str) -> ModelRef:
    """``models.resolve``, with packages as kind ``edge``."""
    if is_edge(path):
        return ModelRef(path, "edge", path, manifest=load_manifest(Path(path)))
    return resolve(path)


class Shell(nn.Module):
    """Stands where scoring asks a model for its limits; it computes nothing."""

    def __init__(self, context: int | None, eos: list[int]) -> None:
        super().__init__()
        self.config = type("Config", (), {"max_position_embeddings": context})()
        self.generation_config = type("GenerationConfig", (), {"eos_token_id": eos})()


class EdgeModel:
    """A running package, in the place of ``models.Loaded``.

    Attributes:
        model: a shell with the context length and the end tokens.
        tokenizer: the package's, by Transformers.
    """

    def __init__(self, folder: Path, engine: EngineProcess) -> None:
        self.folder, self.engine = folder, engine
        self.manifest = load_manifest(folder)
        chat = json.loads((folder / "chat.json").read_text(encoding="utf-8"))
        self.model = Shell(chat["context"], chat["stop"])
        self.tokenizer = load_tokenizer(ModelRef(str(folder), "folder", str(folder)))

    @classmethod
    def start(cls, path: str) -> EdgeModel:
        """Load a package in its runtime.

        Raises:
            ToolError: the runtime is absent (69), or refuses it (65).
        """
        folder = Path(path)
        edge = load_manifest(folder)["edge"]
        return cls(folder, EngineProcess(edge["engine"], folder / edge["model"]))

    def describe(self) -> dict[str, Any]:
        """The same keys as of any other model."""
        metrics, edge = self.manifest["metrics"], self.manifest["edge"]
        return {
            "path": str(self.folder),
            "kind": "edge",
            "method": edge["engine"],
            "base": None,
            "trainable_parameters": None,
            "total_parameters": metrics["parameters"],
            "bytes": sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file()),
            "bits_per_weight": metrics["bits_per_weight"],
            "base_bytes": None,
            "dtype": edge["scheme"],
            "quantization": edge["scheme"],
        }

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """``(T, V)``, float32."""
        with tempfile.TemporaryDirectory(prefix="tuneutils-") as scratch:
            (found,) = self.engine.logits([ids], Path(scratch))
        return torch.from_numpy(found)

    def score_sequences(
        self, sequences: Sequence[Encoded], *, progress: Callable[[int], None] | None = None
    ) -> list[Score]:
        """What ``evaluate_model.score_sequences`` gives, greedy matches always included."""
        scores = []
        for sequence in sequences:
            scores.append(_score(self.logits(sequence.input_ids), sequence))
            if progress is not None:
                progress(1)
        return scores

    def greedy(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: set[int]
    ) -> list[tuple[list[int], bool]]:
        """The most likely continuation of each prompt, and whether it ended by itself."""
        made = [self.engine.greedy(p, max_new_tokens, sorted(stop)) for p in prompts]
        return [(ids[:-1], True) if ids[-1] in stop else (ids, False) for ids in made]

    def close(self) -> None:
        self.engine.close()


def _score(logits: torch.Tensor, sequence: Encoded) -> Score:
    labels = torch.tensor(sequence.labels[1:])
    kept = torch.nonzero(labels != IGNORE_INDEX)[:, 0]
    rows = logits[kept]
    gold = labels[kept, None]
    logprobs = rows.gather(-1, gold)[:, 0] - rows.logsumexp(-1)
    hits = rows.argmax(-1) == gold[:, 0]
    return Score(float(logprobs.double().sum()), len(kept), bool(hits.all()))
