"""Token tensors of pairs and single answers, and the log-probabilities of their completions.

Both sides of a pair share a row, so that their common start is computed once. A row is the shared start, the
rest of chosen, and the last shared token again with the rest of rejected after it; that second part has
positions as if it came right after the shared start, and sees neither the rest of chosen nor the first copy
of the repeated token. Each side's log-probability is then that of a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from torch import Tensor, nn

from tuneutils.shared.logprobs_model import sequence_logprobs
from tuneutils.shared.texts import Text

Sides = tuple[Text, Text]
Batch = dict[str, Tensor]


def shared_start(chosen: Sequence[int], rejected: Sequence[int]) -> int:
    """Tokens at the start that both sides have; each side keeps at least its last one for itself."""
    longest = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(longest) if chosen[i] != rejected[i]), longest)


def packed_length(sides: Sides) -> int:
    chosen, rejected = sides
    return len(chosen.ids) + len(rejected.ids) - shared_start(chosen.ids, rejected.ids) + 1


def pack(pairs: Sequence[Sides], pad_id: int) -> Batch:
    """Pairs in a row each.

    Returns:
        ``input_ids`` and ``position_ids`` ``(n, T)``; ``attention_mask`` ``(n, 1, T, T)`` of booleans; and
        ``chosen_mask``, ``rejected_mask`` ``(n, T)``: the tokens of each completion, of which those that
        both begin with count for both.
    """
    starts = [shared_start(c.ids, r.ids) for c, r in pairs]
    rows = [[*c.ids, c.ids[k - 1], *r.ids[k:]] for (c, r), k in zip(pairs, starts, strict=True)]
    ids = padded(rows, pad_id)
    at = torch.arange(ids.shape[1])
    prompt, shared, first, end = (
        torch.tensor(column)[:, None]
        for column in (
            [c.prompt for c, _ in pairs],
            starts,
            [len(c.ids) for c, _ in pairs],
            [len(row) for row in rows],
        )
    )
    is_rest = (at >= first) & (at < end)
    positions = torch.where(is_rest, at - first + shared - 1, at).where(at < end, 0)
    hidden = is_rest[:, :, None] & ((at >= shared - 1) & (at < first))[:, None, :]
    return {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": ((at[:, None] >= at) & ~hidden)[:, None],
        "chosen_mask": (at >= prompt) & (at < first),
        "rejected_mask": ((at >= prompt) & (at < shared)) | ((at > first) & is_rest),
    }


def stack(texts: Sequence[Text], pad_id: int) -> Batch:
    """Texts in rows of their own: ``input_ids`` and ``completion_mask`` ``(n, T)``, padded on the right."""
    ids = padded([t.ids for t in texts], pad_id)
    at = torch.arange(ids.shape[1])
    prompt = torch.tensor([t.prompt for t in texts])[:, None]
    length = torch.tensor([len(t.ids) for t in texts])[:, None]
    return {"input_ids": ids, "completion_mask": (at >= prompt) & (at < length), "lengths": length[:, 0]}


def padded(rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows])


class Reader:
    """Log-probabilities of completions by one model, which needs a mask where it has virtual tokens."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        configs = getattr(model, "peft_config", {}).values()
        self.virtual = any(c.is_prompt_learning for c in configs)

    def texts(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        """Sums ``(n,)`` of a ``stack``.

        Padding on the right is after every token, so a causal model needs no mask for it; virtual tokens on
        the left do.
        """
        mask = None
        if self.virtual:
            at = torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device)
            mask = (at < batch["lengths"][:, None]).long()
        found = sequence_logprobs(self.model, batch["input_ids"], mask, batch["completion_mask"], temperature)
        return found.sum(1)

    def pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sums ``(n,)`` of chosen and of rejected, from a ``pack`` or a ``stack`` of both."""
        if "chosen_mask" not in batch:
            chosen, rejected = self.texts(batch).chunk(2)
            return chosen, rejected
        found = sequence_logprobs(
            self.model,
            batch["input_ids"],
            batch["attention_mask"],
            batch["chosen_mask"] | batch["rejected_mask"],
            position_ids=batch["position_ids"],
        )
        return (found * batch["chosen_mask"]).sum(1), (found * batch["rejected_mask"]).sum(1)


def pair_batch(pairs: Sequence[Sides], pad_id: int, packs: bool) -> Batch:
    """Pairs packed into a row each, or chosen texts above rejected ones."""
    if packs:
        return pack(pairs, pad_id)
    return stack([c for c, _ in pairs] + [r for _, r in pairs], pad_id)


def can_pack(model: nn.Module, longest: int) -> bool:
    """Whether this model takes such masks and positions, tried on one made-up pair.

    Its log-probabilities must be those of rows of their own, and rejected's must not depend on chosen by a
    bit. A mask replaces a window of attention that the model may have, so rows must fit into it.

    Args:
        longest: tokens of the longest row.
    """
    reader = Reader(model)
    inner: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    windows = (getattr(inner, name, None) for name in ("sliding_window", "attention_chunk_size"))
    if reader.virtual or any(window is not None and window < longest for window in windows):
        return False
    parameter = next(model.parameters())
    rejected = Text([5, 6, 7, 12, 13, 4], 2)
    pairs = [(Text([5, 6, 7, *middle, 4], 2), rejected) for middle in ([8, 9, 10, 11], [14, 15, 16, 17])]
    with torch.no_grad(), suppress(ValueError, TypeError, RuntimeError, NotImplementedError, IndexError):
        one, other = (
            reader.pairs({k: v.to(parameter.device) for k, v in pack([pair], 0).items()}) for pair in pairs
        )
        plain = reader.pairs({k: v.to(parameter.device) for k, v in pair_batch(pairs[:1], 0, False).items()})
        rounded = torch.is_autocast_enabled(parameter.device.type) or parameter.dtype != torch.float32
        tolerance = {"rtol": 0.05, "atol": 0.05} if rounded else {"rtol": 1e-4, "atol": 1e-5}
        close = (torch.allclose(a, b, **tolerance) for a, b in zip(plain, one, strict=True))
        return all(close) and torch.equal(one[1], other[1])
    return False
