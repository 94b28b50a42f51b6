"""A reward model as a reward, and as what a value model starts from.

The artifact is a folder that ``AutoModelForSequenceClassification`` loads, with one label and a linear
head named ``score`` over a decoder, or a PEFT adapter of one; its ``artifact.json`` may hold
``"reward_normalisation": {"mean": m, "std": s}``, and the reward is then ``(score - m) / s``. The
score is read at EOS, the last real token, which is appended where a response lacks it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from torch import Tensor, nn

from tuneutils.shared.errors import ToolError
from tuneutils.shared.models import ModelRef, load_adapter, load_tokenizer, resolve
from tuneutils.tools.ppo_run.rewards import Episode, checked
from tuneutils.tools.ppo_run.workers import Workers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class RewardModel:
    """A frozen scorer of token sequences.

    Attributes:
        trunk: the decoder, without its head; an adapter that was put on it later is off while scoring.
        head: ``(hidden,) → (1,)``.
        mean, std: of the normalisation.
        eos_id: appended to a response that lacks it.
        autocast: a context in which to compute.
        workers: threads that share the batches.
    """

    trunk: Any
    head: nn.Linear
    mean: float
    std: float
    eos_id: int
    batch_size: int = 8
    autocast: Any = nullcontext
    workers: Workers = field(default_factory=Workers)

    def __call__(self, episodes: Sequence[Episode]) -> list[float]:
        rows = [[*e.prompt.ids, *e.response_ids] for e in episodes]
        return checked(episodes, self.scores(rows).tolist())

    def scores(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Normalised scores ``(n,)`` of sequences of token ids."""
        closed = [[*row] if row[-1] == self.eos_id else [*row, self.eos_id] for row in rows]
        order = sorted(range(len(closed)), key=lambda i: (len(closed[i]), i))
        made = torch.empty(len(closed))
        bypass = getattr(self.trunk, "disable_adapter", nullcontext)
        size = max(1, self.batch_size // self.workers.size)
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        with bypass():
            found = self.workers.map(lambda rows: self._read_out([closed[i] for i in rows]), batches)
        for rows, scores in zip(batches, found, strict=True):
            made[rows] = scores
        return (made - self.mean) / self.std

    @torch.no_grad()
    def _read_out(self, rows: list[list[int]]) -> Tensor:
        """Raw scores at each row's last token. Padding is on the right, where a causal model never looks."""
        width = max(map(len, rows))
        where = self.head.weight.device
        ids = torch.tensor([row + [self.eos_id] * (width - len(row)) for row in rows], device=where)
        last = torch.tensor([len(row) - 1 for row in rows], device=where)
        with self.autocast():
            hidden = self.trunk(input_ids=ids, use_cache=False).last_hidden_state
        at_end = hidden[torch.arange(len(rows), device=where), last]
        made: Tensor = self.head(at_end.to(self.head.weight.dtype))[:, 0].float().cpu()
        return made

    def value_head(self) -> nn.Linear:
        """A trainable copy of the head whose output is the normalised score."""
        made = nn.Linear(self.head.in_features, 1, device=self.head.weight.device, dtype=torch.float32)
        with torch.no_grad():
            made.weight.copy_(self.head.weight / self.std)
            bias = 0.0 if self.head.bias is None else float(self.head.bias)
            made.bias.fill_((bias - self.mean) / self.std)
        return made


def load_reward_model(
    given: str,
    tokenizer: PreTrainedTokenizerBase,
    where: torch.device,
    dtype: torch.dtype,
    *,
    batch_size: int = 8,
    trust_remote_code: bool = False,
) -> RewardModel:
    """Load a reward model and check that it reads what the policy writes.

    Raises:
        ToolError: exit 65: another tokenizer, more than one label, or no linear head over a decoder.
    """
    ref = resolve(given)
    model = _load(ref, dtype, trust_remote_code).eval().requires_grad_(False).to(where)
    check_same_tokenizer(given, load_tokenizer(ref, trust_remote_code=trust_remote_code), tokenizer)
    head = getattr(model, "score", None)
    trunk = getattr(model, model.base_model_prefix, None)
    if not isinstance(head, nn.Linear) or head.out_features != 1 or trunk is None:
        raise ToolError(
            f"{given}: {type(model).__name__} with {model.config.num_labels} labels is no reward model; "
            "train one with rm-train"
        )
    mean, std = normalisation(ref)
    eos_id = int(tokenizer.eos_token_id)
    return RewardModel(trunk, head, mean, std, eos_id, batch_size)


def _load(ref: ModelRef, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    root = ref.root
    kwargs: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, "use_safetensors": True}
    if ref.kind == "adapter":
        kwargs["num_labels"] = 1
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            root.path, revision=root.revision, **kwargs
        )
    except (OSError, ValueError, KeyError) as exc:
        raise ToolError(f"{ref.given}: no reward model: {' '.join(str(exc).split())[:300]}") from exc
    return load_adapter(model, ref.path).merge_and_unload() if ref.kind == "adapter" else model


def normalisation(ref: ModelRef) -> tuple[float, float]:
    """Mean and standard deviation of the artifact's normalisation; 0 and 1 where it has none."""
    found = ref.manifest.get("reward_normalisation") or {}
    mean, std = float(found.get("mean", 0.0)), float(found.get("std", 1.0))
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ToolError(
            f"{ref.given}: its reward_normalisation has mean {mean} and std {std}; train it again"
        )
    return mean, std


def check_same_tokenizer(given: str, theirs: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase) -> None:
    """Refuse a reward model that reads token ids differently from the policy.

    Raises:
        ToolError: exit 65, with the first token that differs.
    """
    reward, policy = theirs.get_vocab(), ours.get_vocab()
    differing = [t for t, i in sorted(policy.items(), key=lambda x: x[1]) if reward.get(t) != i]
    if not differing and theirs.eos_token_id == ours.eos_token_id:
        return
    token = differing[0] if differing else str(ours.eos_token)
    raise ToolError(
        f"{given}: a reward model for another tokenizer: {token!r} is {policy[token]} for the policy and "
        f"{reward.get(token, 'absent')} for it; train one on the policy's base with rm-train"
    )
