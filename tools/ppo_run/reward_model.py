"""A reward model as a reward, and as what a value model starts from.

Its files are those of ``shared.reward_model``. The score is read at EOS, the last real token, which is
appended where a response lacks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from torch import Tensor, nn

from tuneutils.shared.errors import ToolError
from tuneutils.shared.models import load_tokenizer, resolve
from tuneutils.shared.reward_model import load_scorer, normalisation
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
    theirs = load_tokenizer(ref, trust_remote_code=trust_remote_code)
    pad_id = int(theirs.pad_token_id)
    model = load_scorer(ref, where, dtype, pad_id, trust_remote_code=trust_remote_code)
    check_same_tokenizer(given, theirs, tokenizer)
    if ref.kind == "adapter":
        model = model.merge_and_unload()
    model.requires_grad_(False)
    trunk = getattr(model, model.base_model_prefix)
    mean, std = normalisation(ref)
    return RewardModel(trunk, model.score, mean, std, int(tokenizer.eos_token_id), batch_size)


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
