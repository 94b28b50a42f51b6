"""Sentence vectors by name: an encoder that ``xl-parallel encoder`` wrote, or sentence-transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tuneutils.shared.artifact import Input, describe_input
from tuneutils.shared.errors import ExitCode, ToolError, require
from tuneutils.tools.xl_parallel.encoder import CONFIG, Encoder, normalised

Floats = NDArray[np.float32]
#: Texts of a side that are looked at to see whether the sides are swapped.
SAMPLE = 500


class Vectors(Protocol):
    """What turns texts of a language into rows: of length 1, or whose sum stands for all of them."""

    def encode(self, texts: Sequence[str], lang: str) -> Floats: ...

    def sums(self, texts: Sequence[str], lang: str) -> Floats: ...


class SentenceTransformer:
    """A sentence-transformers model; it sees no language."""

    def __init__(self, name: str, device: str | None = None) -> None:
        require("sentence_transformers", "sentence")
        import sentence_transformers

        try:
            self._model: Any = sentence_transformers.SentenceTransformer(name, device=device)
        except (OSError, ValueError) as exc:
            raise ToolError(
                f"--encoder {name}: {' '.join(str(exc).split())[:200]}", code=ExitCode.MISSING_INPUT
            ) from exc

    def encode(self, texts: Sequence[str], lang: str) -> Floats:  # noqa: ARG002
        made = self._model.encode(list(texts), convert_to_numpy=True, show_progress_bar=False)
        return normalised(np.asarray(made, np.float32).reshape(len(texts), -1))

    def sums(self, texts: Sequence[str], lang: str) -> Floats:
        """Weighted by length, as words are in a mean over tokens."""
        return self.encode(texts, lang) * np.array([[len(t)] for t in texts], np.float32)


def encoder_input(name: str) -> Input:
    """Its entry in a manifest; what is not a local folder by its name alone."""
    if Path(name).exists():
        return describe_input("encoder", name)
    return Input("encoder", name, "", source=name)


def open_encoder(name: str) -> Vectors:
    """``name``: a folder that ``xl-parallel encoder`` wrote, else what sentence-transformers takes.

    Raises:
        ToolError: a folder of neither kind, or nothing of that name (66).
    """
    folder = Path(name)
    if (folder / CONFIG).is_file():
        return Encoder.load(folder)
    if folder.exists() and not (folder / "modules.json").is_file() and not (folder / "config.json").is_file():
        raise ToolError(
            f"--encoder {name}: neither an encoder of xl-parallel nor a sentence-transformers folder",
            code=ExitCode.MISSING_INPUT,
        )
    if not folder.exists() and (name.startswith((".", "/")) or name.count("/") > 1):
        raise ToolError(
            f"--encoder {name}: no such folder; make one: xl-parallel encoder PAIRS -o {name}",
            code=ExitCode.MISSING_INPUT,
        )
    try:
        return SentenceTransformer(name)
    except ToolError as exc:
        if folder.exists():
            raise
        reason = str(exc).removeprefix(f"--encoder {name}: ")
        raise ToolError(f"--encoder {name}: no such folder; as a model: {reason}", code=exc.code) from exc


def seems_swapped(
    encoder: Vectors, src: Sequence[str], tgt: Sequence[str], src_lang: str, tgt_lang: str
) -> bool:
    """Whether an encoder learnt here knows more of the texts' beginnings with the languages exchanged."""
    if not isinstance(encoder, Encoder):
        return False

    def known(texts: Sequence[str], lang: str) -> int:
        return int(encoder.side(lang).weighted(texts[:SAMPLE]).nnz)

    return known(src, tgt_lang) + known(tgt, src_lang) > known(src, src_lang) + known(tgt, tgt_lang)
