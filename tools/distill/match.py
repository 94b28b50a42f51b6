"""Matching what is inside: hidden states and attention of paired layers, across widths and numbers of heads.

Hidden states: ``|| P h_student - h_teacher ||² / || h_teacher ||²`` for each token (after FitNets, Romero et
al. 2015, arXiv 1412.6550, equation 3, and TinyBERT, Jiao et al. 2020, arXiv 1909.10351, equation 8; divided
by the teacher's size, since a few tokens of a decoder are a hundred times longer than the others).
Attention: KL(teacher ‖ student) for each query and head (MiniLM, Wang et al. 2020, arXiv 2002.10957,
equation 5). Where the sizes differ, ``P`` is a learned linear map, and each teacher head is compared with a
learned mixture of the student's heads; where they agree there is none, so that a student equal to its
teacher has loss 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from torch import Tensor, nn  # isort: skip

from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.layerwise import decoder_of
from tuneutils.shared.supervise import IGNORE

#: Where the projections live while the student is trained; they are not part of what is saved.
ATTRIBUTE = "distill_projections"


class Projections(nn.Module):
    """The learned maps between layers of unequal size, one of each kind for each pair."""

    def __init__(self, pairs: int, student: tuple[int, int], teacher: tuple[int, int]) -> None:
        super().__init__()
        widths = (student[0], teacher[0])
        heads = (student[1], teacher[1])
        self.hidden = nn.ModuleList(_linear(*widths) for _ in range(pairs) if widths[0] != widths[1])
        self.heads = nn.ParameterList(
            nn.Parameter(_mixture(*heads)) for _ in range(pairs) if heads[0] != heads[1]
        )


def _linear(inputs: int, outputs: int) -> nn.Linear:
    made = nn.Linear(inputs, outputs, bias=False)
    nn.init.eye_(made.weight)
    return made


def _mixture(student: int, teacher: int) -> Tensor:
    """Logits ``(teacher, student)``: each teacher head starts at the student head in its place."""
    place = torch.arange(teacher) * student // teacher
    return 3.0 * torch.nn.functional.one_hot(place, student).float()


class Matcher:
    """Captures paired layers of both models while they run, and compares them.

    Args:
        pairs: the teacher layer for each student layer.
        hidden_weight, attention_weight: of the two losses; 0 leaves one out.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        pairs: Sequence[int],
        *,
        hidden_weight: float,
        attention_weight: float,
    ) -> None:
        self.pairs = list(pairs)
        self.weights = (hidden_weight, attention_weight)
        self.layers = (decoder_of(student).layers, decoder_of(teacher).layers)
        sizes = [_sizes(m.config.get_text_config()) for m in (student, teacher)]
        self.projections = Projections(len(self.pairs), sizes[0], sizes[1])
        setattr(student, ATTRIBUTE, self.projections)
        if attention_weight:
            for model in (student, teacher):
                model.set_attn_implementation("eager")
        self._seen: tuple[dict[int, Tensor], ...] = ({}, {})
        self._attention: tuple[dict[int, Tensor], ...] = ({}, {})

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Capture what the layers give while the block runs."""
        handles = []
        for side, indices in ((0, range(len(self.pairs))), (1, self.pairs)):
            for index in indices:
                layer = self.layers[side][index]
                handles.append(layer.register_forward_hook(_keep(self._seen[side], index, 0)))
                if self.weights[1]:
                    attention = layer.get_submodule("self_attn")
                    handles.append(attention.register_forward_hook(_keep(self._attention[side], index, 1)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def loss(self, labels: Tensor) -> Tensor:
        """Both losses, weighted, meaned over layers and summed over the tokens that are learnt."""
        kept = labels[:, 1:] != IGNORE
        total = torch.zeros((), device=labels.device)
        for number, index in enumerate(self.pairs):
            if self.weights[0]:
                pair = (self._seen[0][number], self._seen[1][index])
                total = total + self.weights[0] * self._hidden(number, *pair, kept)
            if self.weights[1]:
                pair = (self._attention[0][number], self._attention[1][index])
                total = total + self.weights[1] * self._heads(number, *pair, kept)
        for seen in (*self._seen, *self._attention):
            seen.clear()
        return total / len(self.pairs)

    def _hidden(self, number: int, student: Tensor, teacher: Tensor, kept: Tensor) -> Tensor:
        ours, theirs = student[:, :-1][kept].float(), teacher[:, :-1][kept].float()
        if len(self.projections.hidden):
            ours = self.projections.hidden[number](ours).float()
        error = (ours - theirs).square().sum(-1)
        return (error / theirs.square().sum(-1)).sum()

    def _heads(self, number: int, student: Tensor, teacher: Tensor, kept: Tensor) -> Tensor:
        ours, theirs = (a[:, :, :-1].transpose(1, 2)[kept].float() for a in (student, teacher))
        if len(self.projections.heads):
            ours = self.projections.heads[number].softmax(-1) @ ours
        tiny = torch.finfo(torch.float32).tiny
        ratio = theirs.clamp(min=tiny).log() - ours.clamp(min=tiny).log()
        return (theirs * ratio).sum(-1).mean(-1).sum()


def _sizes(config: Any) -> tuple[int, int]:
    return int(config.hidden_size), int(config.num_attention_heads)


def _keep(into: dict[int, Tensor], index: int, which: int) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        value = output[which] if isinstance(output, tuple) else output
        if value is None:
            raise ToolError(
                "--attention-weight: the model gives no attention weights; leave it at 0", code=ExitCode.USAGE
            )
        into[index] = value

    return hook


def drop_projections(student: Any) -> None:
    """Take the projections off a student again."""
    if hasattr(student, ATTRIBUTE):
        delattr(student, ATTRIBUTE)
