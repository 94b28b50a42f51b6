"""A teacher's top-k distributions on disk: made once, found again by what they depend on, checked by hash."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from torch import Tensor, nn  # isort: skip

from tuneutils.shared.artifact import sha256_file, write_json
from tuneutils.shared.divergences import TopK, top_k
from tuneutils.shared.divergences_model import teacher_rows
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.logprobs import default_chunk_tokens
from tuneutils.shared.supervise import Encoded
from tuneutils.shared.training import Collator

INDEX = "index.json"
FILE = "top_k.safetensors"


@dataclass(frozen=True)
class TopKCache:
    """The distributions of all learnt tokens, example after example.

    Attributes:
        ids, logprobs: ``(tokens, k)``.
        tail: ``(tokens,)``.
        spans: for each example asked about, by its index, where its tokens are.
        folder: where it is kept.
        reused: it was there already.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tensor
    spans: dict[int, slice]
    folder: Path
    reused: bool

    def rows(self, examples: Sequence[int], where: torch.device) -> TopK:
        """The teacher of a batch of examples, in the batch's order."""
        spans = [self.spans[i] for i in examples]
        parts = [torch.cat([t[s] for s in spans]).to(where) for t in (self.ids, self.logprobs, self.tail)]
        return TopK(parts[0].long(), parts[1], parts[2])


def open_cache(
    parent: Path,
    identity: dict[str, Any],
    model: Callable[[], nn.Module],
    examples: Mapping[int, Encoded],
    *,
    k: int,
    temperature: float,
    pad_id: int,
    batch_tokens: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> TopKCache:
    """The cache of this teacher on these examples, made if it is not there.

    Args:
        parent: the folder of all caches; one cache is a folder named by ``identity``.
        identity: all that decides the numbers besides ``k``, temperature and examples.
        model: gives the teacher; not called when the cache is there.
        examples: by the index that :meth:`TopKCache.rows` is asked for.

    Raises:
        ToolError: (65) a file differs from the hash that was written beside it; (73) no room to write.
    """
    digest = hashlib.sha256()
    for example in examples.values():
        digest.update(repr((example.input_ids, example.labels)).encode())
    identity = {**identity, "k": k, "temperature": temperature, "examples": digest.hexdigest()}
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    folder = parent / name
    reused = (folder / INDEX).is_file()
    if not reused:
        temporary = parent / f".{name}.{os.getpid()}.tmp"
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            asked = list(examples.values())
            _write(temporary, identity, model(), asked, k, temperature, pad_id, batch_tokens, progress)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        except OSError as exc:
            raise ToolError(f"{folder}: cannot write: {exc.strerror}", code=ExitCode.CANNOT_WRITE) from exc
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return _read(folder, examples, reused)


def _read(folder: Path, examples: Mapping[int, Encoded], reused: bool) -> TopKCache:
    from safetensors.torch import load_file

    expected = json.loads((folder / INDEX).read_text(encoding="utf-8"))["sha256"]
    if sha256_file(folder / FILE) != expected:
        raise ToolError(f"{folder / FILE}: differs from its hash in {INDEX}; remove the folder")
    tensors = load_file(folder / FILE)
    spans: dict[int, slice] = {}
    start = 0
    for index, example in examples.items():
        spans[index] = slice(start, start + example.learnt)
        start += example.learnt
    return TopKCache(tensors["ids"], tensors["logprobs"], tensors["tail"], spans, folder, reused)


@torch.inference_mode()
def _write(
    folder: Path,
    identity: dict[str, Any],
    model: nn.Module,
    examples: Sequence[Encoded],
    k: int,
    temperature: float,
    pad_id: int,
    batch_tokens: int,
    progress: Callable[[int], None] | None,
) -> None:
    from safetensors.torch import save_file

    collate = Collator(pad_id)
    where = next(model.parameters()).device
    parts: list[list[TopK] | None] = [None] * len(examples)
    for batch in _batches(examples, batch_tokens):
        inputs = {n: t.to(where) for n, t in collate([vars(examples[i]) for i in batch]).items()}
        rows = teacher_rows(model, inputs["input_ids"], None, inputs["labels"])
        chunk = default_chunk_tokens(int(getattr(rows.head, "out_features", 1 << 17)), where)
        pieces = [
            top_k(rows.chunk(slice(start, start + chunk)), k, temperature)
            for start in range(0, len(rows), chunk)
        ]
        whole = _joined(pieces)
        start = 0
        for i in batch:
            end = start + examples[i].learnt
            parts[i] = [whole.chunk(slice(start, end))]
            start = end
        if progress is not None:
            progress(len(batch))
    found = _joined([piece for part in parts if part is not None for piece in part])
    tensors = {
        "ids": found.ids.int().contiguous(),
        "logprobs": found.logprobs.float().contiguous(),
        "tail": found.tail.float().contiguous(),
    }
    save_file(tensors, folder / FILE)
    write_json(folder / INDEX, {"identity": identity, "sha256": sha256_file(folder / FILE)})


def _joined(pieces: Sequence[TopK]) -> TopK:
    columns = zip(*((p.ids.cpu(), p.logprobs.cpu(), p.tail.cpu()) for p in pieces), strict=True)
    ids, logprobs, tail = (torch.cat(column) for column in columns)
    return TopK(ids, logprobs, tail)


def _batches(examples: Sequence[Encoded], batch_tokens: int) -> list[list[int]]:
    """Indices by length, the longest first."""
    made: list[list[int]] = []
    for i in sorted(range(len(examples)), key=lambda i: (-len(examples[i]), i)):
        if made and len(examples[made[-1][0]]) * (len(made[-1]) + 1) <= batch_tokens:
            made[-1].append(i)
        else:
            made.append([i])
    return made
