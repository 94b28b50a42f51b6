"""Models whose output is a prediction: classifiers, reward models, language models that choose an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip

from tuneutils.shared.errors import ToolError
from tuneutils.shared.models import Loaded
from tuneutils.shared.reward_model import RewardModel, load_reward_model
from tuneutils.shared.streams import Record
from tuneutils.shared.texts import encode_record, encode_text, shortened
from tuneutils.tools.bias_scan.models.scorers import Scorer, _batches, padded

REWARD_BATCH = 16


@dataclass
class Classifier:
    """A sequence classifier of two labels or more."""

    loaded: Loaded
    batch_tokens: int = 4096
    kind: str = "classifier"

    @torch.inference_mode()
    def predict(self, records: Sequence[Record]) -> list[Any]:
        """The likeliest label of each record's ``text``."""
        limit = getattr(self.loaded.model.config, "max_position_embeddings", None)
        texts = [r["text"] for r in records]
        rows = [
            list(self.loaded.tokenizer(t, truncation=bool(limit), max_length=limit)["input_ids"])
            for t in texts
        ]
        made: list[Any] = [None] * len(rows)
        names = self.loaded.model.config.id2label
        for batch in _batches([len(r) for r in rows], self.batch_tokens):
            ids = padded([rows[i] for i in batch], self.loaded.pad_id).to(self.loaded.device)
            mask = padded([(1,) * len(rows[i]) for i in batch], 0).to(self.loaded.device)
            found = self.loaded.model(input_ids=ids, attention_mask=mask).logits.argmax(-1).tolist()
            for i, label in zip(batch, found, strict=True):
                made[i] = names[label]
        return made


@dataclass
class Reward:
    """A reward model: scores of answers; of a preference, whether it prefers the chosen one."""

    model: RewardModel
    kind: str = "reward"

    def scores(self, records: Sequence[Record]) -> list[float]:
        """Score of each ``prompt``+``completion`` or ``messages`` record."""
        return self._of([encode_record(r, self.model.tokenizer, self.model.template) for r in records])

    def predict(self, records: Sequence[Record]) -> list[Any]:
        """Whether the chosen answer of each preference scores above the rejected one."""
        sides = [
            encode_text(r["prompt"], r[side], self.model.tokenizer, self.model.template)
            for r in records
            for side in ("chosen", "rejected")
        ]
        scores = self._of(sides)
        return [a > b for a, b in zip(scores[::2], scores[1::2], strict=True)]

    def _of(self, texts: Sequence[Any]) -> list[float]:
        rows = [shortened(t, self.model.max_length).ids for t in texts]
        return self.model.scores(rows, REWARD_BATCH)


def load_reward(path: str, where: str, dtype: str, trust_remote_code: bool) -> Reward:
    """An artifact of ``rm-train``, or another sequence classifier with one label."""
    return Reward(load_reward_model(path, where, dtype, trust_remote_code=trust_remote_code))


def choose(scorer: Scorer, records: Sequence[Record]) -> list[Any]:
    """Which answer a language model finds likeliest after each prompt: its place among the choices.

    The summed log-probability of the answer decides; the first of equals.
    """
    pairs, counts = [], []
    for record in records:
        answers = record.get("choices") or [record["chosen"], record["rejected"]]
        if not isinstance(record["prompt"], str) or not all(isinstance(a, str) for a in answers):
            raise ToolError("a language model chooses between strings; flatten messages first")
        pairs += [(record["prompt"], a if a[:1].isspace() else f" {a}") for a in answers]
        counts.append(len(answers))
    scored = [s.total for s in scorer.continuations(pairs)]
    made, start = [], 0
    for count in counts:
        part = scored[start : start + count]
        made.append(part.index(max(part)))
        start += count
    return made
