"""Calibration data: rows of token ids, all of one length, drawn from record streams by a seed."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

# isort: split
import torch
from torch import Tensor

from tuneutils.shared.errors import ToolError
from tuneutils.shared.records import Reader, format_of
from tuneutils.shared.supervise import LEARNABLE, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens encoded for each token used, so that rows come from many places of a large stream.
OVERSAMPLE = 8


def calibration_ids(
    paths: Sequence[str | os.PathLike[str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: int = 128,
    length: int = 512,
    seed: int = 0,
    template: str = "auto",
    on_error: str = "stop",
    quarantine: str | os.PathLike[str] | None = None,
) -> Tensor:
    """``(rows, length)`` token ids, without padding.

    The records are shuffled, encoded as in training (chat template, closing EOS), joined and cut into rows,
    of which ``rows`` are drawn. Joining is what GPTQ's authors do (arXiv 2210.17323, section 5): a row may
    hold the end of one text and the start of another.

    Args:
        paths: records that training takes: ``text``, ``prompt``+``completion``, ``messages``, ...
        template: as of :func:`supervise.encode`.

    Raises:
        ToolError: records of another kind, or fewer than ``rows * length`` tokens in all (65).
    """
    reader = Reader(paths, formats=LEARNABLE, on_error=on_error, quarantine=quarantine)
    located = list(reader.located())
    random.Random(seed).shuffle(located)
    needed = rows * length
    stream: list[int] = []
    used: set[str] = set()
    for item in located:
        try:
            stream += encode(item.record, tokenizer, template=template).input_ids
        except ValueError as exc:
            reader.refuse(item, str(exc))
            continue
        used.add(str(format_of(item.record)))
        if len(stream) >= OVERSAMPLE * needed:
            break
    found = len(stream) // length
    if found < rows:
        names = ", ".join(map(str, paths))
        fit = f"--calibration-rows {found}" if found else f"a --calibration-length of at most {len(stream)}"
        raise ToolError(
            f"{names}: {len(stream)} tokens are too few to calibrate on {rows} rows of {length}; "
            f"add records, or use {fit}"
        )
    table = torch.tensor(stream[: found * length]).view(found, length)
    chosen = torch.randperm(found, generator=torch.Generator().manual_seed(seed))[:rows]
    return table[chosen]
