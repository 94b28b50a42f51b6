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


class Original:
    """The model of ``--reference``, and its distributions on each window once they have been asked for.

    It is loaded once and let go again, unless a model with a shorter context asks for shorter windows; what
    is kept is ``(labelled tokens, vocabulary)`` log-probabilities in float32.
    """

    def __init__(self, label: str, ref: ModelRef) -> None:
        self.label, self.ref = label, ref
        self._vocabulary: dict[str, int] = {}
        self._context: int | None = None
        self._longest: int | None = None
        self._windows: list[list[tuple[Encoded, torch.Tensor]]] = []

    def windows(
        self, run: Run[Params], exam: Exam, other: Loaded | EdgeModel
    ) -> list[list[tuple[Encoded, torch.Tensor]]]:
        """For each record, its windows and this model's log-probabilities at their labelled positions.

        Raises:
            ToolError: the other model has another vocabulary.
        """
        params = run.params
        contexts = [context_length(other.model), self._context]
        longest = min([params.max_length, *(c - 1 for c in contexts if c is not None)])
        if longest != self._longest:
            loaded = load_model(
                self.ref.given,
                device=run.device,
                dtype=run.dtype,
                trust_remote_code=params.trust_remote_code,
            )
            self._vocabulary = loaded.tokenizer.get_vocab()
            self._context = context_length(loaded.model)
            self._longest = longest if self._context is None else min(longest, self._context - 1)
            self._windows = self._read(loaded, exam, params, self._longest)
        if self._vocabulary != other.tokenizer.get_vocab():
            raise ToolError("its vocabulary is not the original's; KL is not defined")
        return self._windows

    def _read(
        self, loaded: Loaded, exam: Exam, params: Params, longest: int
    ) -> list[list[tuple[Encoded, torch.Tensor]]]:
        left, found = params.reference_tokens, []
        for located in exam.source:  # type: ignore[union-attr]
            if left <= 0:
                break
            sequence, _ = record_sequence(located.record, loaded.tokenizer, params.template)
            cut = cut_windows(sequence, longest, longest)
            found.append([(window, labelled_logprobs(loaded, window)) for window in cut])
            left -= sum(len(rows) for _, rows in found[-1])
        return found


def add(
    run: Run[Params],
    measured: Measured,
    loaded: Loaded | EdgeModel,
    original: Original,
    exams: Sequence[Exam],
) -> None:
    """Put the exam ``fidelity`` into a measurement: an item for each record of the first record stream.

    The original runs in ``--dtype``, the same as when it is measured itself.
    """
    params, ref = run.params, original.ref
    exam = next(e for e in exams if e.kind == "text" and e.name != "general")
    items: list[Item] = []
    for record in original.windows(run, exam, loaded):
        item: Item = {"kl": 0.0, "agree": 0, "tokens": 0}
        for window, wanted in record:
            kl, agree = compare(wanted, labelled_logprobs(loaded, window))
            item = {
                "kl": item["kl"] + kl,
                "agree": item["agree"] + agree,
                "tokens": item["tokens"] + len(wanted),
            }
        items.append(item)
    settings = {
        **{k: exam.settings[k] for k in ("sha256", "max_length", "template")},
        "tokens": params.reference_tokens,
        "original": describe_input("model", ref.given).sha256 if ref.kind != "hub" else ref.given,
    }
    measured.exams[NAME] = {"kind": NAME, "metrics": list(KINDS[NAME]), "settings": settings}
    measured.items[NAME] = items


@torch.inference_mode()
def labelled_logprobs(model: Loaded | EdgeModel, window: Encoded) -> torch.Tensor:
    """``(labelled positions, V)``: log-probabilities in float32 of what stands at each labelled position."""
    rows = torch.nonzero(torch.tensor(window.labels[1:]) != IGNORE_INDEX)[:, 0]
    return _logits(model, window.input_ids)[rows].log_softmax(-1)


def compare(wanted: torch.Tensor, found: torch.Tensor) -> tuple[float, int]:
    """Summed KL(original ‖ other) and matching argmaxes over the rows of two ``(T, V)`` log-probabilities."""
    width = min(wanted.shape[-1], found.shape[-1])
    kl, agree = 0.0, 0
    for p, q in zip(wanted[:, :width].split(CHUNK), found[:, :width].split(CHUNK), strict=True):
        p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
    return max(kl, 0.0), agree


def _logits(model: Loaded | EdgeModel, ids: Sequence[int]) -> torch.Tensor:
    if isinstance(model, EdgeModel):
        return model.logits(ids)
    found: Any = model.model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    made: torch.Tensor = found.logits[0].float().cpu()
    return made
