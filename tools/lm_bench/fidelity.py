"""How far a model's distributions are from the original's, token by token on the same text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

# isort: split
import torch

from tuneutils.shared.artifact import describe_input
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ToolError
from tuneutils.shared.evaluate_model import context_length, cut_windows, record_sequence
from tuneutils.shared.logprobs import IGNORE_INDEX
from tuneutils.shared.models import Loaded, ModelRef, load_model
from tuneutils.shared.supervise import Encoded
from tuneutils.tools.lm_bench.edge import EdgeModel
from tuneutils.tools.lm_bench.measured import Measured
from tuneutils.tools.lm_bench.metrics import KINDS, Item
from tuneutils.tools.lm_bench.params import Params

if TYPE_CHECKING:
    from tuneutils.tools.lm_bench.measure import Exam

NAME = "fidelity"
CHUNK = 64


def add(
    run: Run[Params], measured: Measured, loaded: Loaded | EdgeModel, ref: ModelRef, exams: Sequence[Exam]
) -> None:
    """Put the exam ``fidelity`` into a measurement: an item for each record of the first record stream.

    Both models are held in memory. The original runs in ``--dtype``, the same as when it is measured itself.
    """
    params = run.params
    exam = next(e for e in exams if e.kind == "text" and e.name != "general")
    original = load_model(
        ref.given, device=run.device, dtype=run.dtype, trust_remote_code=params.trust_remote_code
    )
    if original.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
        raise ToolError(f"{measured.label}: its vocabulary is not the original's; KL is not defined")
    limits = [context_length(m.model) or params.max_length for m in (original, loaded)]
    longest = min(params.max_length, *(limit - 1 for limit in limits))
    items: list[Item] = []
    left = params.reference_tokens
    for located in exam.source:  # type: ignore[union-attr]
        if left <= 0:
            break
        sequence, _ = record_sequence(located.record, original.tokenizer, params.template)
        item: Item = {"kl": 0.0, "agree": 0, "tokens": 0}
        for window in cut_windows(sequence, longest, longest):
            kl, agree, tokens = _compare(original, loaded, window)
            item = {"kl": item["kl"] + kl, "agree": item["agree"] + agree, "tokens": item["tokens"] + tokens}
        left -= item["tokens"]
        items.append(item)
    settings = {
        **{k: exam.settings[k] for k in ("sha256", "max_length", "template")},
        "tokens": params.reference_tokens,
        "original": describe_input("model", ref.given).sha256 if ref.kind != "hub" else ref.given,
    }
    measured.exams[NAME] = {"kind": NAME, "metrics": list(KINDS[NAME]), "settings": settings}
    measured.items[NAME] = items


@torch.inference_mode()
def _compare(original: Loaded, other: Loaded | EdgeModel, window: Encoded) -> tuple[float, int, int]:
    """Summed KL(original ‖ other), matching argmaxes and tokens over a window's labelled positions."""
    rows = torch.nonzero(torch.tensor(window.labels[1:]) != IGNORE_INDEX)[:, 0]
    first, second = _logits(original, window.input_ids), _logits(other, window.input_ids)
    width = min(first.shape[-1], second.shape[-1])
    kl, agree = 0.0, 0
    for part in rows.split(CHUNK):
        p = first[part, :width].double().log_softmax(-1)
        q = second[part, :width].double().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
    return max(kl, 0.0), agree, len(rows)


def _logits(model: Loaded | EdgeModel, ids: Sequence[int]) -> torch.Tensor:
    if isinstance(model, EdgeModel):
        return model.logits(ids)
    found: Any = model.model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    made: torch.Tensor = found.logits[0].float().cpu()
    return made
