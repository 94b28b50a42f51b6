"""Scoring of texts by a loaded model: log-likelihoods, perplexity items, multiple choice.

Sequences are batched by length under a budget of padded tokens, and only labelled positions are projected
to the vocabulary (``logprobs_model``), so that no batch x time x vocabulary tensor is ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tuneutils.shared import logprobs_model
from tuneutils.shared.evaluate import encode_pair, prefix_token, score_windows
from tuneutils.shared.logprobs import IGNORE_INDEX, accumulation_dtype
from tuneutils.shared.logprobs_model import unwrap
from tuneutils.shared.models import Loaded
from tuneutils.shared.records import format_of
from tuneutils.shared.streams import Record
from tuneutils.shared.supervise import Encoded, encode

BATCH_TOKENS = 4096
GREEDY_BATCH_TOKENS = 1024
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Score:
    """What a model thinks of the labelled tokens of a sequence.

    Attributes:
        logprob: their summed log-probability, in nats.
        tokens: how many they are.
        greedy: each is the most likely one; only where asked for, else False.
    """

    logprob: float
    tokens: int
    greedy: bool


def context_length(model: Any) -> int | None:
    """Tokens that the model takes, less the virtual ones of its prompt-learning adapter; None: no limit."""
    limit = getattr(unwrap(model).config, "max_position_embeddings", None)
    if not limit:
        return None
    configs = getattr(model, "peft_config", {}).values()
    return int(limit) - sum(int(getattr(c, "num_virtual_tokens", 0) or 0) for c in configs)


def score_sequences(
    loaded: Loaded,
    sequences: Sequence[Encoded],
    *,
    batch_tokens: int = BATCH_TOKENS,
    greedy: bool = False,
    progress: Progress | None = None,
) -> list[Score]:
    """Score the labelled tokens of each sequence; the first token of a sequence is never scored.

    Args:
        batch_tokens: padded tokens of one forward pass.
        greedy: also compare each label with the most likely token; for short stretches of labels, whose
            logits are held whole.
        progress: called with the number of sequences done since the last call.
    """
    own = getattr(loaded, "score_sequences", None)  # a model in another runtime scores by itself
    if own is not None:
        return list(own(sequences, progress=progress))
    scores: list[Score | None] = [None] * len(sequences)
    if greedy:
        batch_tokens = min(batch_tokens, GREEDY_BATCH_TOKENS)
    for batch in _batches([len(s) for s in sequences], batch_tokens, equal=greedy):
        for i, score in zip(batch, _score_batch(loaded, [sequences[i] for i in batch], greedy), strict=True):
            scores[i] = score
        if progress is not None:
            progress(len(batch))
    return [score for score in scores if score is not None]


def _batches(lengths: Sequence[int], batch_tokens: int, *, equal: bool) -> Iterator[list[int]]:
    """Indices, longest first, so that memory runs out at once or not at all; ``equal``: of one length."""
    batch: list[int] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and (longest * (len(batch) + 1) > batch_tokens or (equal and lengths[i] != longest)):
            yield batch
            batch = []
        longest = longest if batch else lengths[i]
        batch.append(i)
    if batch:
        yield batch


@torch.inference_mode()
def _score_batch(loaded: Loaded, batch: Sequence[Encoded], greedy: bool) -> list[Score]:
    longest = max(len(s) for s in batch)
    ids = torch.full((len(batch), longest), loaded.pad_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row, sequence in enumerate(batch):
        ids[row, : len(sequence)] = torch.tensor(sequence.input_ids)
        mask[row, : len(sequence)] = 1
        labels[row, : len(sequence)] = torch.tensor(sequence.labels)
    ids, mask, labels = (t.to(loaded.device) for t in (ids, mask, labels))
    if greedy:
        logprobs, hits = _logprobs_and_hits(loaded.model, ids, labels)
    else:
        logprobs = -logprobs_model.causal_nll(loaded.model, ids, mask, labels, reduction="none")
        hits = torch.zeros_like(logprobs)
    sums = logprobs.double().sum(1).tolist()
    counts = (labels[:, 1:] != IGNORE_INDEX).sum(1)
    all_hit = (hits.sum(1) == counts).tolist() if greedy else [False] * len(batch)
    return [Score(*values) for values in zip(sums, counts.tolist(), all_hit, strict=True)]


def _logprobs_and_hits(model: nn.Module, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``(B, k)`` log-probabilities of the last ``k`` tokens and whether each is the argmax; 0 where ignored.

    ``k`` reaches back to the first label. The rows are equally long, so there is no padding to place.
    """
    scored = (labels[:, 1:] != IGNORE_INDEX).any(0)
    count = len(scored) - int(scored.long().argmax())
    keep = {"logits_to_keep": count + 1} if logprobs_model.accepts(unwrap(model), "logits_to_keep") else {}
    raw = model(input_ids=ids, use_cache=False, **keep).logits[:, -count - 1 : -1]
    logits = raw.to(accumulation_dtype(raw.dtype))
    targets = labels[:, -count:, None]
    chosen = targets.clamp(min=0)
    logprobs = logits.gather(-1, chosen) - logits.logsumexp(-1, keepdim=True)
    kept = (targets != IGNORE_INDEX)[..., 0]
    hits = (logits.argmax(-1, keepdim=True) == chosen)[..., 0]
    return logprobs[..., 0] * kept, (hits & kept).to(logits.dtype)


def text_sequence(text: str, tokenizer: Any) -> Encoded:
    """A text after the prefix token, each of its own tokens scored."""
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    return Encoded([prefix_token(tokenizer), *ids], [IGNORE_INDEX, *ids])


def record_sequence(record: Record, tokenizer: Any, template: str = "auto") -> tuple[Encoded, int]:
    """A record as it is scored, and the UTF-8 bytes of what is scored.

    ``text``: every token, the first from the prefix token. Other records: the completions as training sees
    them, closing EOS included; special tokens count as tokens but have no bytes.

    Raises:
        ValueError: the record cannot be encoded; the caller places it.
    """
    if format_of(record) == "text":
        return text_sequence(record["text"], tokenizer), len(record["text"].encode("utf-8", "surrogatepass"))
    encoded = encode(record, tokenizer, template=template)
    scored = [label for label in encoded.labels[1:] if label != IGNORE_INDEX]
    text = tokenizer.decode(scored, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    size = len(text.encode("utf-8"))
    if not size:
        raise ValueError("has no text to score")
    return encoded, size


def cut_windows(sequence: Encoded, max_length: int, stride: int) -> list[Encoded]:
    """A sequence in windows that score each label once, with context before them (``score_windows``)."""
    pieces = []
    for start, first, end in score_windows(len(sequence), max_length, stride):
        labels = [IGNORE_INDEX] * (first - start) + sequence.labels[first:end]
        if any(label != IGNORE_INDEX for label in labels):
            pieces.append(Encoded(sequence.input_ids[start:end], labels))
    return pieces


def perplexity_items(
    loaded: Loaded,
    sequences: Sequence[tuple[Encoded, int]],
    *,
    max_length: int,
    stride: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> list[dict[str, float]]:
    """``{"nll": nats, "tokens": …, "bytes": …}`` of each ``(sequence, bytes)``.

    Perplexity is ``exp(sum nll / sum tokens)``, bits per byte ``sum nll / (ln 2 * sum bytes)``.

    Args:
        max_length: tokens that the model sees at once; longer sequences are scored in windows.
        stride: new tokens of each further window; ``max_length`` by default.
    """
    pieces: list[Encoded] = []
    owners: list[int] = []
    for i, (sequence, _) in enumerate(sequences):
        cut = cut_windows(sequence, max_length, stride or max_length)
        pieces += cut
        owners += [i] * len(cut)
    scores = score_sequences(loaded, pieces, batch_tokens=batch_tokens, progress=progress)
    items: list[dict[str, float]] = [{"nll": 0.0, "tokens": 0, "bytes": size} for _, size in sequences]
    for owner, score in zip(owners, scores, strict=True):
        items[owner]["nll"] -= score.logprob
        items[owner]["tokens"] += score.tokens
    return items


def continuation_scores(
    loaded: Loaded,
    pairs: Sequence[tuple[str, str]],
    *,
    max_length: int,
    batch_tokens: int = BATCH_TOKENS,
    greedy: bool = False,
    progress: Progress | None = None,
) -> list[Score]:
    """Log-likelihood of each continuation after its context, the context cut from the left where too long.

    Raises:
        ValueError: a continuation without tokens, or longer than ``max_length``.
    """
    sequences = []
    for context, continuation in pairs:
        head, rest = encode_pair(loaded.tokenizer, context, continuation)
        if len(rest) > max_length:
            raise ValueError(
                f"a continuation of {len(rest)} tokens is longer than the context of {max_length}"
            )
        ids = (head + rest)[-(max_length + 1) :]
        sequences.append(Encoded(ids, [IGNORE_INDEX] * (len(ids) - len(rest)) + rest))
    return score_sequences(loaded, sequences, batch_tokens=batch_tokens, greedy=greedy, progress=progress)


def pick(logprobs: Sequence[float], choices: Sequence[str]) -> dict[str, int]:
    """The choice picked by each rule: raw, per character (``norm``) and per UTF-8 byte (``bytes``).

    The names and formulas are lm-evaluation-harness's ``acc``, ``acc_norm`` and ``acc_bytes``; the first of
    equals wins.
    """
    values = np.asarray(logprobs)
    characters = np.array([len(c) for c in choices], dtype=np.float64)
    sizes = np.array([len(c.encode("utf-8")) for c in choices], dtype=np.float64)
    return {
        "acc": int(np.argmax(values)),
        "acc_norm": int(np.argmax(values / characters)),
        "acc_bytes": int(np.argmax(values / sizes)),
    }
