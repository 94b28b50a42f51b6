"""Embeddings for new tokens, made of the old ones.

Each way gives the weights of a new row over old rows; input and output embeddings take the same weights. A
token of which a way knows nothing is drawn from a normal distribution with the old rows' mean and variance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

# isort: split
import numpy as np
import torch
from torch import Tensor

CHUNK = 256
NEIGHBOURS = 10  # WECHSEL's k and temperature: Minixhofer et al. 2022, section 3
TEMPERATURE = 0.1


@dataclass
class Weights:
    """How new rows are mixed from old ones.

    Attributes:
        known: ``(new,)``, whether a row is mixed at all.
        rows: ``f(start, end)`` → ``(end - start, len(old))`` weights, each known row summing to 1.
        old: ids of the old tokens that are mixed.
    """

    known: Tensor
    rows: Callable[[int, int], Tensor]
    old: Tensor


def sparsemax(scores: Tensor) -> Tensor:
    """The Euclidean projection of each row onto the probability simplex.

    Martins and Astudillo 2016 (arXiv 1602.02068), algorithm 1.
    """
    ordered = scores.sort(dim=-1, descending=True).values
    sums = ordered.cumsum(-1)
    places = torch.arange(1, scores.shape[-1] + 1, dtype=scores.dtype, device=scores.device)
    support = (1 + places * ordered > sums).sum(-1, keepdim=True)
    threshold = (sums.gather(-1, support - 1) - 1) / support
    return (scores - threshold).clamp(min=0)


def mean_weights(pieces: Sequence[Sequence[int]]) -> Weights:
    """The mean of the old tokens that a new one is made of."""
    old = sorted({i for piece in pieces for i in piece})
    place = {token: i for i, token in enumerate(old)}

    def rows(start: int, end: int) -> Tensor:
        made = torch.zeros(end - start, len(old))
        for row, piece in enumerate(pieces[start:end]):
            for token in piece:
                made[row, place[token]] += 1 / len(piece)
        return made

    known = torch.tensor([bool(piece) for piece in pieces], dtype=torch.bool)
    return Weights(known, rows, torch.tensor(old, dtype=torch.long))


def focus_weights(auxiliary: Tensor, first: int) -> Weights:
    """FOCUS: sparsemax over cosines with the tokens that both vocabularies have.

    Dobler and de Melo 2023 (arXiv 2305.14481), section 3.

    Args:
        auxiliary: ``(vocabulary, d)`` of unit length or zero: static embeddings of the extended vocabulary,
            from text cut by it.
        first: the first new id.
    """
    present = auxiliary.norm(dim=1) > 0
    old = present[:first].nonzero()[:, 0]
    shared, new = auxiliary[old], auxiliary[first:]

    def rows(start: int, end: int) -> Tensor:
        return sparsemax(new[start:end] @ shared.T).float()

    return Weights(present[first:], rows, old)


def wechsel_weights(source: Tensor, target: Tensor, first: int) -> Weights:
    """WECHSEL: softmax of cosine over temperature among the nearest old tokens.

    Minixhofer et al. 2022 (arXiv 2112.06598), equation 3.

    Args:
        source: ``(old, d)`` static embeddings of the old vocabulary in the known language.
        target: ``(vocabulary, d)`` of the extended one in the new language, aligned to ``source``; both of
            unit length or zero.
    """
    old = (source.norm(dim=1) > 0).nonzero()[:, 0]
    new = target[first:]

    def rows(start: int, end: int) -> Tensor:
        cosines = new[start:end] @ source[old].T
        best, places = cosines.topk(min(NEIGHBOURS, len(old)), dim=1)
        weights = torch.softmax(best / TEMPERATURE, dim=1)
        return torch.zeros(cosines.shape, dtype=weights.dtype).scatter_(1, places, weights).float()

    return Weights(new.norm(dim=1) > 0, rows, old)


def new_rows(table: Tensor, count: int, weights: Weights | None, seed: int) -> Tensor:
    """``(count, H)`` rows to put behind ``table``, in float32; all drawn where there are no weights.

    Args:
        table: ``(old, H)``.
    """
    mean, std = table.float().mean(0), table.float().std(0)
    noise = np.random.default_rng(seed).standard_normal((count, table.shape[1]), dtype=np.float32)
    made = mean + std * torch.from_numpy(noise)
    if weights is None:
        return made
    mixed = table[weights.old].float()
    for start in range(0, count, CHUNK):
        end = min(count, start + CHUNK)
        known = weights.known[start:end, None]
        made[start:end] = torch.where(known, weights.rows(start, end) @ mixed, made[start:end])
    return made
