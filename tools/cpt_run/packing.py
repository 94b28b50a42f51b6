"""Documents into rows of bounded length, and rows of two streams into one order. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack pieces into rows of at most ``capacity``: best-fit decreasing (Ding et al. 2024, algorithm 1).

    Longest first, each piece goes into the row that it fills most; no piece is cut. Gives indices by row.

    Args:
        lengths: at most ``capacity`` each.
    """
    rows: list[list[int]] = []
    with_space: dict[int, list[int]] = {}  # free tokens -> rows
    spaces = 0  # bit s: some row has s tokens free
    for piece in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[piece]
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1  # the least that is enough
            row = with_space[space].pop()
            if not with_space[space]:
                spaces &= ~(1 << space)
            rows[row].append(piece)
        else:
            row, space = len(rows), capacity
            rows.append([piece])
        left = space - length
        with_space.setdefault(left, []).append(row)
        spaces |= 1 << left
    return rows


def endless(count: int, seed: int, stream: int) -> Iterator[int]:
    """Row numbers 0 to ``count - 1`` in a new order each epoch, for ever."""
    epoch = 0
    while True:
        yield from np.random.default_rng([seed, stream, epoch]).permutation(count).tolist()
        epoch += 1


@dataclass(frozen=True)
class Mixture:
    """The rows of a run in their order, each as ``(is_replay, row)``, and the tokens that they teach."""

    rows: list[tuple[bool, int]]
    domain_tokens: int
    replay_tokens: int

    @property
    def tokens(self) -> int:
        return self.domain_tokens + self.replay_tokens

    @property
    def replay_share(self) -> float:
        return self.replay_tokens / self.tokens


def mix(
    domain: Sequence[int],
    replay: Sequence[int],
    share: float,
    seed: int,
    *,
    tokens: int | None = None,
    epochs: float | None = None,
    rows: int | None = None,
) -> Mixture:
    """Order the rows so that replay has its share of the tokens from the first row to the last.

    The next row is one of replay's while replay is short of its share. With rows of at most ``L`` tokens
    replay is then never more than ``share * L`` tokens short of its share, nor ``(1 - share) * L`` over it.

    Args:
        domain, replay: learnt tokens of each row.
        tokens, epochs, rows: the end, one of them: at so many tokens in all, passes over the domain, or rows.
    """
    streams = endless(len(domain), seed, 0), endless(len(replay), seed, 1)
    sizes, done = (domain, replay), [0, 0]
    passes = 0
    made: list[tuple[bool, int]] = []
    wanted_rows = max(1, round((epochs or 0) * len(domain)))
    while True:
        total = sum(done)
        if tokens is not None:
            ended = total >= tokens
        elif rows is not None:
            ended = len(made) >= rows
        else:
            ended = passes >= wanted_rows and not (replay and done[1] < share * total)
        if ended and made:
            return Mixture(made, done[0], done[1])
        which = int(bool(replay) and done[1] < share * total)
        row = next(streams[which])
        done[which] += sizes[which][row]
        passes += which == 0
        made.append((bool(which), row))
