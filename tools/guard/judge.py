"""Exchanges that are there whole, judged just as if they were being written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from tuneutils.shared.guarding import Guard, Watch, decode, hidden_states, project
from tuneutils.shared.models import Loaded
from tuneutils.tools.guard.exchanges import Exchange

#: Padded tokens of one forward pass.
BATCH_TOKENS = 4096


def batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices by length, longest first, at most ``most`` together and ``BATCH_TOKENS`` with padding."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) == most or lengths[batch[0]] * (len(batch) + 1) > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def reply_states(loaded: Loaded, batch: Sequence[Exchange], layers: Sequence[int]) -> list[dict[int, Tensor]]:
    """For each exchange and layer ``(n + 1, H)``: the prompt's last token, then the reply's."""
    found = hidden_states(loaded, [e.ids for e in batch], layers)
    return [
        {layer: found[layer][i][len(e.prompt_ids) - 1 :] for layer in layers} for i, e in enumerate(batch)
    ]


def judge(
    loaded: Loaded,
    guard: Guard,
    exchanges: Sequence[Exchange],
    batch_size: int,
    *,
    progress: Callable[[int], None] | None = None,
) -> list[Watch]:
    """A watch for each exchange that has seen all of it; ``verdict()`` says what it found."""
    layer = guard.settings.layer
    made: list[Watch | None] = [None] * len(exchanges)
    for batch in batches([len(e.ids) for e in exchanges], batch_size):
        chosen = [exchanges[i] for i in batch]
        for i, exchange, states in zip(batch, chosen, reply_states(loaded, chosen, [layer]), strict=True):
            made[i] = watched(guard, loaded, exchange, project(guard, states[layer]))
        if progress is not None:
            progress(len(batch))
    return [watch for watch in made if watch is not None]


def watched(guard: Guard, loaded: Loaded, exchange: Exchange, projections: Tensor) -> Watch:
    """A watch over an exchange with projections ``(n + 1, P + C)``, up to where it is flagged."""
    watch = Watch(guard, exchange.prompt)
    for t, values in enumerate(projections.tolist()):

        def text(end: int = t) -> str:
            return decode(loaded.tokenizer, exchange.reply_ids[:end])

        if watch.see(values, text):
            return watch
    watch.finish(exchange.reply)
    return watch
