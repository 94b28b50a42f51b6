"""How closely a package follows its source, token by token, in the package's own runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

# isort: split
import torch

from tuneutils.shared.engines.client import EngineProcess
from tuneutils.shared.errors import GateFailed, ToolError
from tuneutils.shared.evaluate import ratio_estimate
from tuneutils.shared.evaluate_model import context_length, cut_windows, record_sequence
from tuneutils.shared.logprobs import IGNORE_INDEX
from tuneutils.shared.models import Loaded
from tuneutils.shared.records import BadRecord, Located
from tuneutils.shared.supervise import Encoded

MIN_TOKENIZED_ALIKE = 0.99
CHUNK = 64

#: Bits of a scheme → (least agreement, largest KL in nats a token) by default.
LIMITS = {
    16: (0.95, 0.02),
    8: (0.9, 0.05),
    6: (0.75, 0.2),
    5: (0.75, 0.25),
    4: (0.55, 0.6),
    3: (0.35, 2.0),
    2: (0.15, 6.0),
}


def limits(bits: int) -> tuple[float, float]:
    """The default gate of a scheme with this many nominal bits; more than 16 count as 16."""
    return LIMITS[min(bits, 16)]


@dataclass(frozen=True)
class Item:
    """Sums over one held-out record's scored tokens.

    Attributes:
        agree: tokens whose most likely next token is the source's.
        kl: KL(source ‖ package), in nats.
        nll, package_nll: of the label under either.
    """

    tokens: int
    agree: int
    kl: float
    nll: float
    package_nll: float


def windows(
    loaded: Loaded, records: Sequence[Located], *, tokens: int, max_length: int, template: str
) -> list[list[Encoded]]:
    """The scored windows of each record, until ``tokens`` are scored.

    Raises:
        BadRecord: a record that cannot be encoded.
        ToolError: no token to score.
    """
    longest = min(max_length, context_length(loaded.model) or max_length)
    made: list[list[Encoded]] = []
    left = tokens
    for located in records:
        if left <= 0:
            break
        try:
            sequence, _ = record_sequence(located.record, loaded.tokenizer, template)
        except ValueError as exc:
            raise BadRecord(located.place, str(exc)) from exc
        cut = []
        for window in cut_windows(sequence, longest - 1, longest - 1):
            if left > 0:
                cut.append(_shortened(window, left))
                left -= _scored(cut[-1])
        if sum(map(_scored, cut)):
            made.append(cut)
    if not made:
        raise ToolError("the held-out records have no token to compare on")
    return made


def _scored(window: Encoded) -> int:
    return sum(label != IGNORE_INDEX for label in window.labels[1:])


def _shortened(window: Encoded, limit: int) -> Encoded:
    """The window up to its ``limit``-th scored token."""
    seen = 0
    for i, label in enumerate(window.labels):
        seen += i > 0 and label != IGNORE_INDEX
        if seen == limit:
            return Encoded(window.input_ids[: i + 1], window.labels[: i + 1])
    return window


def compare(
    loaded: Loaded, engine: EngineProcess, texts: Sequence[Sequence[Encoded]], scratch: Path
) -> list[Item]:
    """Both models' distributions at every scored token of each record.

    Raises:
        ToolError: the package's vocabulary is narrower than the source's, or its logits are not finite.
    """
    items = []
    for cut in texts:
        sums = torch.zeros(5, dtype=torch.float64)
        for window, found in zip(cut, engine.logits([w.input_ids for w in cut], scratch), strict=True):
            sums += _window_sums(loaded, window, torch.from_numpy(found))
        tokens, agree, kl, nll, package_nll = sums.tolist()
        items.append(Item(int(tokens), int(agree), kl, nll, package_nll))
    return items


@torch.inference_mode()
def _window_sums(loaded: Loaded, window: Encoded, package: torch.Tensor) -> torch.Tensor:
    ids = torch.tensor([window.input_ids], device=loaded.device)
    labels = torch.tensor(window.labels[1:])
    rows = torch.nonzero(labels != IGNORE_INDEX)[:, 0]
    source = loaded.model(input_ids=ids, use_cache=False).logits[0].float().cpu()
    width = min(source.shape[-1], package.shape[-1])
    if package.shape[-1] < len(loaded.tokenizer):
        raise ToolError(f"the package gives {package.shape[-1]} logits for {len(loaded.tokenizer)} tokens")
    sums = torch.zeros(5, dtype=torch.float64)
    for part in rows.split(CHUNK):
        p = source[part, :width].double().log_softmax(-1)
        q = package[part, :width].double().log_softmax(-1)
        if not bool(torch.isfinite(q).all()):
            raise GateFailed("the package's logits are not finite")
        gold = labels[part, None]
        agree = (p.argmax(-1) == q.argmax(-1)).sum()
        kl = (p.exp() * (p - q)).sum()
        sums += torch.stack(
            [torch.tensor(len(part)), agree, kl, -p.gather(-1, gold).sum(), -q.gather(-1, gold).sum()]
        ).double()
    return sums


def tokenized_alike(
    loaded: Loaded, engine: EngineProcess, texts: Sequence[Sequence[Encoded]]
) -> tuple[float, str | None]:
    """The share of records that the runtime cuts into the source's tokens, and the first that it does not."""
    strings = [
        loaded.tokenizer.decode(cut[0].input_ids[1:], clean_up_tokenization_spaces=False) for cut in texts
    ]
    wanted = [list(loaded.tokenizer.encode(s, add_special_tokens=False)) for s in strings]
    found = engine.tokenize(strings, special=True)
    alike = [a == b for a, b in zip(wanted, found, strict=True)]
    first = next((s for s, same in zip(strings, alike, strict=True) if not same), None)
    return sum(alike) / len(alike), first


def metrics(items: Sequence[Item], seed: int) -> dict[str, Any]:
    """Agreement, KL and both perplexities, with 95 % bootstrap intervals over records."""
    import numpy as np

    tokens = [i.tokens for i in items]

    def rounded(values: Sequence[float], transform: Any = lambda r: r) -> dict[str, Any]:
        made = ratio_estimate(values, tokens, transform=transform, seed=seed).as_json()
        return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in made.items()}

    return {
        "agreement": rounded([i.agree for i in items]),
        "kl": rounded([max(i.kl, 0.0) for i in items]),
        "source_perplexity": rounded([i.nll for i in items], np.exp),
        "package_perplexity": rounded([i.package_nll for i in items], np.exp),
        "tokens": sum(tokens),
    }


def check_gate(found: dict[str, Any], min_agreement: float, max_kl: float, first_unlike: str | None) -> None:
    """Refuse a package that does not follow its source.

    Raises:
        GateFailed: by how much, and which option moves the threshold.
    """
    agreement, kl = found["agreement"]["value"], found["kl"]["value"]
    if not kl <= max_kl:
        raise GateFailed(
            f"refused: KL {kl:.4g} nats a token is above --max-kl {max_kl:g} (agreement {agreement:.4g})"
        )
    if not agreement >= min_agreement:
        raise GateFailed(
            f"refused: agreement {agreement:.4g} is below --min-agreement {min_agreement:g} (KL {kl:.4g})"
        )
    if found["tokenized_alike"] < MIN_TOKENIZED_ALIKE:
        raise GateFailed(
            f"refused: the runtime tokenizes {1 - found['tokenized_alike']:.1%} of the texts otherwise, "
            f"such as {(first_unlike or '')[:60]!r}"
        )
