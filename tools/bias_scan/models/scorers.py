"""Models as scorers of texts: causal and masked language models behind one interface.

Both give log-probabilities in nats of the tokens of a text, in batches of texts of like length; equal texts
are scored once. A causal model predicts each token from those before it, the first from BOS (EOS without
one). A masked model gives each token's pseudo-log-probability, that token alone masked (Salazar et al.
2020, arXiv 1910.14659); its masks are rows of one batch, and only masked positions are projected to the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from numpy.typing import NDArray
from torch import Tensor

from tuneutils.shared.errors import ToolError
from tuneutils.shared.evaluate import encode_pair, prefix_token
from tuneutils.shared.evaluate_model import context_length
from tuneutils.shared.logprobs import IGNORE_INDEX, accumulation_dtype
from tuneutils.shared.logprobs_model import causal_nll
from tuneutils.shared.models import Loaded

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """The scored tokens of a text: ids ``(n,)`` and their log-probabilities ``(n,)``."""

    ids: tuple[int, ...]
    logprobs: Floats

    @property
    def total(self) -> float:
        return float(self.logprobs.sum())

    @property
    def mean(self) -> float:
        return float(self.logprobs.mean())


class Scorer(Protocol):
    """What the test sets ask of a language model; ``kind`` is ``causal`` or ``masked``."""

    kind: str
    loaded: Loaded

    def texts(self, texts: Sequence[str], /) -> list[Scored]:
        """Every token of each text, special tokens left out."""
        ...

    def continuations(self, pairs: Sequence[tuple[str, str]], /) -> list[Scored]:
        """The tokens of each continuation after its context."""
        ...

    def vectors(self, texts: Sequence[str], /) -> Floats:
        """``(n, hidden)``: the last layer at the last token (causal) or the first (masked)."""
        ...


@dataclass
class Causal:
    """A causal language model, plain or with an adapter."""

    loaded: Loaded
    batch_tokens: int = 4096
    kind: str = "causal"

    def texts(self, texts: Sequence[str]) -> list[Scored]:
        prefix = prefix_token(self.loaded.tokenizer)
        rows = [self.loaded.tokenizer.encode(t, add_special_tokens=False) for t in texts]
        return self._score([([prefix], list(ids)) for ids in rows], texts)

    def continuations(self, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        split = [encode_pair(self.loaded.tokenizer, context, rest) for context, rest in pairs]
        return self._score(split, ["".join(p) for p in pairs])

    def vectors(self, texts: Sequence[str]) -> Floats:
        prefix = prefix_token(self.loaded.tokenizer)
        rows = [[prefix, *self.loaded.tokenizer.encode(t, add_special_tokens=False)] for t in texts]
        _check_lengths(rows, texts, context_length(self.loaded.model))
        return _hidden(self.loaded, rows, self.batch_tokens, last=True)

    def _score(self, rows: Sequence[tuple[list[int], list[int]]], shown: Sequence[str]) -> list[Scored]:
        """The second part of each row, after the first."""
        _check_lengths([head + rest for head, rest in rows], shown, context_length(self.loaded.model))
        distinct = list(dict.fromkeys((tuple(head), tuple(rest)) for head, rest in rows))
        found: dict[tuple[tuple[int, ...], tuple[int, ...]], Scored] = {}
        for batch in _batches([len(h) + len(r) for h, r in distinct], self.batch_tokens):
            part = [distinct[i] for i in batch]
            for key, logprobs in zip(part, self._batch(part), strict=True):
                found[key] = Scored(key[1], logprobs)
        return [found[tuple(head), tuple(rest)] for head, rest in rows]

    @torch.inference_mode()
    def _batch(self, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[Floats]:
        ids = padded([h + r for h, r in rows], self.loaded.pad_id)
        labels = padded([(IGNORE_INDEX,) * len(h) + r for h, r in rows], IGNORE_INDEX)
        mask = padded([(1,) * (len(h) + len(r)) for h, r in rows], 0)
        ids, labels, mask = (t.to(self.loaded.device) for t in (ids, labels, mask))
        nll = causal_nll(self.loaded.model, ids, mask, labels, reduction="none").double().cpu().numpy()
        return [-row[len(h) : len(h) + len(r)] for row, (h, r) in zip(nll, rows, strict=True)]


@dataclass
class Masked:
    """A masked language model."""

    loaded: Loaded
    batch_tokens: int = 4096
    kind: str = "masked"

    def texts(self, texts: Sequence[str]) -> list[Scored]:
        encoded = [self.encode(t) for t in texts]
        return self.at([(ids, [i for i, own in enumerate(plain) if own]) for ids, plain, _ in encoded], texts)

    def continuations(self, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        asked = []
        for context, rest in pairs:
            head = context.rstrip()
            ids, plain, starts = self.encode(context + rest)
            at = [i for i, own in enumerate(plain) if own and starts[i] >= len(head)]
            if not at:
                raise ValueError(f"the continuation {rest!r} has no token of its own")
            asked.append((ids, at))
        return self.at(asked, ["".join(p) for p in pairs])

    def vectors(self, texts: Sequence[str]) -> Floats:
        rows = [self.encode(t)[0] for t in texts]
        _check_lengths(rows, texts, self.limit)
        return _hidden(self.loaded, rows, self.batch_tokens, last=False)

    @property
    def limit(self) -> int | None:
        """Tokens that fit; RoBERTa's positions start after its padding index."""
        config = self.loaded.model.config
        limit = getattr(config, "max_position_embeddings", None)
        offset = self.loaded.pad_id + 1 if getattr(config, "model_type", "") in ROBERTA else 0
        return limit and int(limit) - offset

    def encode(self, text: str) -> tuple[list[int], list[bool], list[int]]:
        """Ids, which of them are the text's own, and the character where each starts."""
        made = self.loaded.tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
        starts = []
        for (start, end), special in zip(made["offset_mapping"], made["special_tokens_mask"], strict=True):
            while start < end and text[start].isspace():  # byte-level tokenizers count the space before
                start += 1
            starts.append(-1 if special else start)
        return list(made["input_ids"]), [not s for s in made["special_tokens_mask"]], starts

    def at(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], shown: Sequence[str]) -> list[Scored]:
        """Pseudo-log-probabilities at chosen positions, one mask at a time.

        Args:
            rows: ids of a text with its special tokens, and the positions.
        """
        _check_lengths([ids for ids, _ in rows], shown, self.limit)
        masks = [Fill(tuple(ids), at, (int(ids[at]),)) for ids, positions in rows for at in positions]
        logprobs = self.fill(masks)
        made, start = [], 0
        for ids, positions in rows:
            values = np.array([v[0] for v in logprobs[start : start + len(positions)]])
            made.append(Scored(tuple(int(ids[i]) for i in positions), values))
            start += len(positions)
        return made

    def fill(self, masks: Sequence[Fill]) -> list[tuple[float, ...]]:
        """Log-probabilities of each mask's candidates, in the order asked; equal masks are scored once."""
        mask_id = self.loaded.tokenizer.mask_token_id
        keys = [((*f.ids[: f.at], mask_id, *f.ids[f.at + 1 :]), f.at, f.candidates) for f in masks]
        distinct = list(dict.fromkeys(keys))
        found: dict[Any, tuple[float, ...]] = {}
        for batch in _batches([len(ids) for ids, _, _ in distinct], self.batch_tokens):
            part = [distinct[i] for i in batch]
            found.update(zip(part, self._batch(part), strict=True))
        return [found[key] for key in keys]

    @torch.inference_mode()
    def _batch(self, rows: Sequence[tuple[tuple[int, ...], int, tuple[int, ...]]]) -> list[tuple[float, ...]]:
        ids = padded([r[0] for r in rows], self.loaded.pad_id).to(self.loaded.device)
        mask = padded([(1,) * len(r[0]) for r in rows], 0).to(self.loaded.device)
        at = torch.tensor([r[1] for r in rows], device=self.loaded.device)
        logits = masked_logits(self.loaded.model, ids, mask, at)
        logprobs = logits.to(accumulation_dtype(logits.dtype)).log_softmax(-1).double().cpu()
        return [tuple(line[list(r[2])].tolist()) for line, r in zip(logprobs, rows, strict=True)]


ROBERTA = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "longformer",
    "mpnet",
    "data2vec-text",
    "esm",
)


@dataclass(frozen=True)
class Fill:
    """A masked position of a text, and the token ids whose log-probabilities there are wanted."""

    ids: tuple[int, ...]
    at: int
    candidates: tuple[int, ...] = field(default=())


def masked_logits(model: Any, ids: Tensor, mask: Tensor, at: Tensor) -> Tensor:
    """``(B, V)`` logits at one position of each row.

    The head's projection is given those positions alone, so that no ``(B, T, V)`` tensor is made.
    """
    rows = torch.arange(len(ids), device=ids.device)
    head = model.get_output_embeddings()
    if head is None:
        return model(input_ids=ids, attention_mask=mask).logits[rows, at]

    def pick(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        hidden = args[0]
        return (hidden[rows, at], *args[1:]) if hidden.dim() == 3 else None

    handle = head.register_forward_pre_hook(pick)
    try:
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    finally:
        handle.remove()
    return logits if logits.dim() == 2 else logits[rows, at]


@torch.inference_mode()
def _hidden(loaded: Loaded, rows: Sequence[Sequence[int]], batch_tokens: int, *, last: bool) -> Floats:
    made: list[Any] = [None] * len(rows)
    for batch in _batches([len(r) for r in rows], batch_tokens):
        ids = padded([rows[i] for i in batch], loaded.pad_id).to(loaded.device)
        mask = padded([(1,) * len(rows[i]) for i in batch], 0).to(loaded.device)
        states = loaded.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        for line, i in zip(states, batch, strict=True):
            made[i] = line[len(rows[i]) - 1 if last else 0].double().cpu().numpy()
    return np.stack(made)


def input_embeddings(loaded: Loaded, words: Sequence[str]) -> Floats:
    """``(n, hidden)``: the mean of the input embeddings of each word's tokens, as inside a sentence."""
    table = loaded.model.get_input_embeddings().weight.detach()
    made = []
    for word in words:
        spaced = loaded.tokenizer.encode(f" {word}", add_special_tokens=False)
        made.append(table[torch.tensor(spaced, device=table.device)].double().mean(0).cpu().numpy())
    return np.stack(made)


def padded(rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """``(n, T)``, padded on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows])


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices under a budget of padded tokens, longest first: memory runs out at once or not at all."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and lengths[batch[0]] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _check_lengths(rows: Sequence[Sequence[int]], shown: Sequence[str], limit: int | None) -> None:
    for ids, text in zip(rows, shown, strict=True):
        if limit is not None and len(ids) > limit:
            start = " ".join(text.split())[:60]
            raise ToolError(f"a text of {len(ids)} tokens is longer than the model's {limit}: {start!r}")
        if not len(ids):
            raise ToolError(f"a text without tokens: {text!r}")
