"""A tiny model extended by the words of a made-up language, once with tied embeddings and once without."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import build_tiny_model, invoke, load_tool, write_jsonl

CPU = ("--device", "cpu", "--dtype", "float32")
SYLLABLES = ("ku", "wa", "mbo", "ni", "tza", "lé", "ho", "ngu", "si", "pa")


def made_up_texts(count: int, seed: int) -> list[str]:
    """Sentences of words from a small lexicon, with a structure for static embeddings to find."""
    lexicon = random.Random(0)
    words = ["".join(lexicon.choices(SYLLABLES, k=lexicon.randint(2, 4))) for _ in range(60)]
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        start = rng.randrange(50)
        made.append(" ".join(words[start + rng.randrange(10)] for _ in range(12)) + ".")
    return made


@dataclass(frozen=True)
class Extended:
    """A base, what was made of it, and the texts that it was made with."""

    base: Path
    made: Path
    texts: list[str]
    heldout: list[str]
    report: dict[str, Any]


@pytest.fixture(scope="module", params=["tied", "untied"])
def extended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Extended:
    import json

    folder = tmp_path_factory.mktemp(request.param)
    base = build_tiny_model(folder / "base", tie_word_embeddings=request.param == "tied")
    texts, heldout = made_up_texts(80, 1), made_up_texts(6, 2)
    records = write_jsonl(folder / "records.jsonl", [{"text": t} for t in texts])
    held = write_jsonl(folder / "heldout.jsonl", [{"text": t} for t in heldout])
    args = ("-m", base, records, "--heldout", held, "--new-tokens", "40", "-o", folder / "out", *CPU)
    done = invoke(load_tool("vocab-extend"), *args)
    assert done.code == 0, done.stderr
    report = json.loads((folder / "out" / "report.json").read_text())
    return Extended(base, folder / "out", texts, heldout, report)
