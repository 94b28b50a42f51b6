"""Both sides of a pair in one row, so that what they share is computed once.

A row is the shared start, the rest of chosen, the rest of rejected; the rest of rejected has positions as if
it came right after the shared start, and does not see the rest of chosen. Each side's score is then the same
as in a row of its own, at the cost of the shared start less: with long prompts nearly half.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from torch import Tensor

from tuneutils.shared.reward_model import Head, padded, read_out


def shared_start(chosen: Sequence[int], rejected: Sequence[int]) -> int:
    """Tokens at the start that both sides have; each side keeps at least its last one for itself."""
    longest = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(longest) if chosen[i] != rejected[i]), longest)


def packed_length(chosen: Sequence[int], rejected: Sequence[int]) -> int:
    return len(chosen) + len(rejected) - shared_start(chosen, rejected)


def pack(
    chosen: Sequence[Sequence[int]], rejected: Sequence[Sequence[int]], pad_id: int
) -> dict[str, Tensor]:
    """Model inputs of pairs.

    Returns:
        ``input_ids`` and ``position_ids`` ``(n, T)``, ``attention_mask`` ``(n, 1, T, T)`` of booleans, and
        ``ends`` ``(2, n)``: where chosen and rejected end.
    """
    starts = [shared_start(c, r) for c, r in zip(chosen, rejected, strict=True)]
    ids = padded([[*c, *r[k:]] for c, r, k in zip(chosen, rejected, starts, strict=True)], pad_id)
    at = torch.arange(ids.shape[1])
    first = torch.tensor([len(c) for c in chosen])[:, None]  # where the rest of rejected begins
    shared = torch.tensor(starts)[:, None]
    lengths = torch.tensor([packed_length(c, r) for c, r in zip(chosen, rejected, strict=True)])
    is_rest = at >= first
    positions = torch.where(is_rest, at - first + shared, at).where(at < lengths[:, None], 0)
    own = (at >= shared) & ~is_rest  # the rest of chosen
    hidden = is_rest[:, :, None] & own[:, None, :]
    mask = (at[:, None] >= at) & ~hidden
    ends = torch.stack([first[:, 0] - 1, lengths - 1])
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask[:, None], "ends": ends}


class PairReader:
    """Scores of packed pairs, read from all positions that the model's head has seen.

    As a context manager it lets go of the model at the end.
    """

    def __init__(self, model: Any) -> None:
        self._seen: list[Tensor] = []
        heads = [m for m in model.modules() if isinstance(m, Head)]
        self._hooks = [head.register_forward_hook(self._keep) for head in heads]

    def __enter__(self) -> PairReader:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, _module: Any, _args: Any, output: Tensor) -> None:
        self._seen.append(output)

    def __call__(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Scores of chosen and rejected, each ``(n,)``."""
        self._seen.clear()
        inputs = {k: batch[k] for k in ("input_ids", "position_ids", "attention_mask")}
        model(**inputs, use_cache=False)
        (scores,) = self._seen
        self._seen.clear()
        rows = torch.arange(scores.shape[0], device=scores.device)
        chosen, rejected = batch["ends"]
        return scores[rows, chosen, 0], scores[rows, rejected, 0]

    def agrees(self, model: Any, longest: int) -> bool:
        """Whether this model takes such masks and positions, tried on one made-up pair.

        Its scores must be those of rows of their own, and rejected's must not depend on chosen by a bit.
        A mask replaces a window of attention that the model may have, so rows must fit into it.

        Args:
            longest: tokens of the longest row.
        """
        inner = model.config.get_text_config()
        windows = (getattr(inner, name, None) for name in ("sliding_window", "attention_chunk_size"))
        if any(window is not None and window < longest for window in windows):
            return False
        parameter = next(model.parameters())
        where = parameter.device
        chosen, rejected = [5, 6, 7, 8, 9, 10, 11, 4], [5, 6, 7, 12, 13, 4]
        batch = {k: v.to(where) for k, v in pack([chosen], [rejected], 0).items()}
        other = {**batch, "input_ids": batch["input_ids"].clone()}
        other["input_ids"][:, 3:8] = torch.tensor([14, 15, 16, 17, 18])
        with torch.no_grad(), suppress(ValueError, TypeError, RuntimeError, NotImplementedError, IndexError):
            plain = [read_out(model, torch.tensor([side], device=where)) for side in (chosen, rejected)]
            packed = self(model, batch)
            rounded = torch.is_autocast_enabled(where.type) or parameter.dtype != torch.float32
            tolerance = {"rtol": 0.05, "atol": 0.05} if rounded else {"rtol": 1e-4, "atol": 1e-5}
            close = (torch.allclose(a, b, **tolerance) for a, b in zip(plain, packed, strict=True))
            return all(close) and torch.equal(self(model, other)[1], packed[1])
        return False
