"""Log-probabilities under the reference, computed once before anything is trained, and kept on disk.

The reference is the model as it was given: before its adapter is put on, or its weights are trained. One
forward pass over the records replaces one in every step, and no second model is held.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from torch import Tensor

from tuneutils.tools.pref_tune.batches import Reader, Sides, pair_batch, stack

Floats = NDArray[np.float32]
Progress = Callable[[int], None]


def by_length(lengths: Sequence[int], size: int) -> Iterable[list[int]]:
    """Indices in batches of like length, the longest first, so that memory runs out at once or never."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return (order[start : start + size] for start in range(0, len(order), size))


@torch.no_grad()
def of_pairs(
    reader: Reader, pairs: Sequence[Sides], pad_id: int, size: int, packs: bool, where: Any
) -> Floats:
    """``(n, 2)``: log-probabilities of chosen and rejected."""
    made = np.zeros((len(pairs), 2), dtype=np.float32)
    for rows in by_length([max(len(c.ids), len(r.ids)) for c, r in pairs], size):
        batch = _on(pair_batch([pairs[i] for i in rows], pad_id, packs), where)
        made[rows] = torch.stack(reader.pairs(batch), 1).float().cpu().numpy()
    return made


@torch.no_grad()
def of_texts(
    reader: Reader, texts: Sequence[Any], pad_id: int, size: int, where: Any, temperature: float = 1.0
) -> Floats:
    """``(n,)``: log-probabilities of completions."""
    made = np.zeros(len(texts), dtype=np.float32)
    for rows in by_length([len(t.ids) for t in texts], size):
        batch = _on(stack([texts[i] for i in rows], pad_id), where)
        made[rows] = reader.texts(batch, temperature).float().cpu().numpy()
    return made


def _on(batch: dict[str, Tensor], where: Any) -> dict[str, Tensor]:
    return {name: tensor.to(where) for name, tensor in batch.items()}


def cached(folder: Path, identity: Sequence[str], compute: Callable[[], Floats]) -> Floats:
    """What was computed before for the same ``identity``, else computed now and kept in ``folder``."""
    name = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:32]
    path = folder / f"reference-{name}.npy"
    try:
        found: Floats = np.load(path, allow_pickle=False)
        return found
    except (OSError, ValueError, EOFError):  # not there, or cut off
        made = compute()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}.{os.getpid()}.npy"
    np.save(temporary, made)
    os.replace(temporary, path)
    return made
