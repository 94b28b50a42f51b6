"""Logits before and after a merge, one model in memory at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from tuneutils.shared.errors import GateFailed
from tuneutils.shared.records import Reader

PROMPTS = (
    "The capital of France is Paris, and the capital of Japan is",
    "Water boils at 100 degrees Celsius because",
    "def add(a, b):\n    return a",
    "Once upon a time, in a small village by the sea, there lived",
    "Question: What is 7 times 8?\nAnswer:",
    "The three primary colours are red,",
    "Dear Sir or Madam,\n\nI am writing to",
    "In 1969, two astronauts landed on the Moon. The first of them",
)
MAX_RECORDS = 32
MAX_TOKENS = 128
#: What the order of sums alone can make of the mean KL, by the precision of the computation.
NUMERICAL_KL = {torch.float32: 1e-8, torch.bfloat16: 1e-3, torch.float16: 1e-5}

Logits = list[torch.Tensor]


def check_texts(path: str | None, on_error: str) -> list[str]:
    """The texts to compare on: the built-in prompts, or the first 32 records of a stream."""
    if path is None:
        return list(PROMPTS)
    texts = []
    for record in Reader([path], on_error="skip" if on_error == "skip" else "stop"):
        texts.append("\n".join(_strings(record)))
        if len(texts) == MAX_RECORDS:
            break
    return texts


def _strings(record: dict[str, Any]) -> Iterator[str]:
    if "messages" in record:
        yield from (str(m["content"]) for m in record["messages"])
        return
    for name in ("text", "prompt", "completion", "chosen", "src", "tgt"):
        value = record.get(name)
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield from (str(m["content"]) for m in value)


def encode(tokenizer: Any, texts: Sequence[str], vocab_size: int) -> list[torch.Tensor]:
    """Token ids of each text, (1, T), at most 128 each; empty ones left out."""
    encoded = [tokenizer(t, return_tensors="pt").input_ids[:, :MAX_TOKENS] for t in texts]
    kept = [ids for ids in encoded if ids.shape[1] and int(ids.max()) < vocab_size]
    return kept


@torch.no_grad()
def logits_of(model: Any, batches: Sequence[torch.Tensor]) -> Logits:
    """float32 logits on the CPU, one (T, V) tensor a text."""
    return [model(ids.to(model.device)).logits[0].float().cpu() for ids in batches]


def compare(before: Logits, after: Logits) -> dict[str, float]:
    """Largest absolute difference of logits, mean KL(before ‖ after) in nats a token, top-1 agreement.

    Rounded to what does not depend on the order of float32 sums.
    """
    largest, kl, agree, count = 0.0, 0.0, 0, 0
    for x, y in zip(before, after, strict=True):
        width = min(x.shape[1], y.shape[1])
        x, y = x[:, :width], y[:, :width]
        largest = max(float((x - y).abs().max()), largest)
        p, q = x.double().log_softmax(-1), y.double().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        agree += int((x.argmax(-1) == y.argmax(-1)).sum())
        count += x.shape[0]
    mean = kl / count
    return {
        "max_abs_logit_difference": round(largest, 5),
        "mean_kl": 0.0 if mean < 0 else round(mean, 10),
        "top1_agreement": agree / count,
        "n_tokens": count,
        "n_texts": len(before),
    }


def measured(load: Callable[[], Any], use: Callable[[Any], Any]) -> Any:
    """Load a model, use it, and give its memory back."""
    model = load()
    try:
        return use(model)
    finally:
        del model
        gc.collect()


def gate(found: dict[str, Any], max_kl: float, max_share: float, dtype: torch.dtype = torch.float32) -> None:
    """Refuse a merge whose logits moved.

    Args:
        found: from ``compare``, with ``effect_kl``: the same between the adapted model and its base.
        dtype: in which the logits were computed.

    Raises:
        GateFailed: mean KL above ``max_kl``, or above ``max_share`` of what the adapter itself does to the
            base (``effect_kl``), as when the rounding of the stored weights outweighs the adapter.
    """
    kl, effect = found["mean_kl"], found["effect_kl"]
    if not kl <= max_kl:
        raise GateFailed(
            f"the merged model is not the adapted one: mean KL {kl:.3g} nats a token is above --max-kl "
            f"{max_kl:g} (top-1 agreement {found['top1_agreement']:.3f}); nothing was written"
        )
    if not kl <= max_share * effect + NUMERICAL_KL[dtype]:
        raise GateFailed(
            f"the merge lost the adapter: mean KL {kl:.3g} is above {max_share:g} of the adapter's own "
            f"effect {effect:.3g}; store in float32 (--dtype-stored float32) or raise --max-kl-share; "
            "nothing was written"
        )
