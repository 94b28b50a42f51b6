"""The resumable trainer (TRL's SFTTrainer under it) on preferences: what a batch is, and its loss.

A pair's loss is divided by the pairs of the whole accumulation window, so that any split into micro-batches
and processes gives the same gradient. KTO's z₀ is the one exception: as in the paper's own code it is of one
micro-batch, over all processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import SFTConfig

from tuneutils.shared.supervise import IGNORE, Encoded
from tuneutils.shared.texts import Text
from tuneutils.shared.training import LOGGED, BucketSampler, ResumableTrainer
from tuneutils.tools.pref_tune.batches import Reader, Sides, packed_length, pair_batch, stack
from tuneutils.tools.pref_tune.losses import Objective, kto_baseline, kto_losses, pair_losses
from tuneutils.tools.pref_tune.reference import Floats


@dataclass
class Lesson:
    """What is learnt, with all that does not change while it is: of pairs, or of single answers.

    Attributes:
        reference: ``(n, 2)`` log-probabilities of chosen and rejected; of single answers, of the answer and
            of the mismatched one.
        targets, margins: of each pair.
        desirable, mismatched: of each single answer.
        packs: pairs share a row.
    """

    objective: Objective
    pad_id: int
    reference: Floats
    pairs: Sequence[Sides] = ()
    targets: Sequence[float] = ()
    margins: Sequence[float] = ()
    singles: Sequence[Text] = ()
    desirable: Sequence[bool] = ()
    mismatched: Sequence[Text] = field(default_factory=list)
    packs: bool = False

    def __len__(self) -> int:
        return len(self.pairs) or len(self.singles)

    @property
    def lengths(self) -> list[int]:
        """Tokens that decide how much work an example is."""
        if self.packs:
            return [packed_length(p) for p in self.pairs]
        if self.pairs:
            return [max(len(c.ids), len(r.ids)) for c, r in self.pairs]
        return [len(t.ids) for t in self.singles]

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch of the examples whose indices are in ``rows``; one past the last is a filler."""
        counts = torch.tensor([row["index"] < len(self) for row in rows])
        at = [min(row["index"], len(self) - 1) for row in rows]
        made = {"labels": torch.where(counts, 0, IGNORE), "reference": torch.from_numpy(self.reference[at])}
        if self.pairs:
            made |= pair_batch([self.pairs[i] for i in at], self.pad_id, self.packs)
            made["tokens"] = torch.tensor(
                [[len(t.ids) - t.prompt for t in self.pairs[i]] for i in at], dtype=torch.float32
            )
            made["target"] = torch.tensor([self.targets[i] for i in at], dtype=torch.float32)
            made["margin"] = torch.tensor([self.margins[i] for i in at], dtype=torch.float32)
            return made
        made |= stack([self.singles[i] for i in at], self.pad_id)
        other = stack([self.mismatched[i] for i in at], self.pad_id)
        made |= {f"mismatched_{name}": tensor for name, tensor in other.items()}
        made["desirable"] = torch.tensor([self.desirable[i] for i in at])
        return made


def sampler(lengths: Sequence[int], config: SFTConfig) -> BucketSampler:
    """The order of examples, as ``ResumableTrainer`` has it."""
    micro = config.per_device_train_batch_size * config.world_size
    return BucketSampler(
        lengths,
        micro * config.gradient_accumulation_steps,
        config.seed,
        multiple=micro if config.world_size > 1 else 1,
        filler=len(lengths),
    )


def first_used(lengths: Sequence[int], config: SFTConfig) -> list[int]:
    """The examples that a run will see, in their order: all, unless it ends within its first pass."""
    order = sampler(lengths, config)
    if config.max_steps * order.step_size >= len(lengths):
        return list(range(len(lengths)))
    return sorted(set(islice(order, config.max_steps * order.step_size)))


class PreferenceTrainer(ResumableTrainer):
    """``ResumableTrainer`` whose loss is a :class:`Lesson`'s."""

    logged = (*LOGGED, "accuracy", "margin", "reward_chosen", "reward_rejected", "kl")

    def __init__(
        self,
        model: nn.Module,
        args: SFTConfig,
        tokenizer: Any,
        lesson: Lesson,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        empty = Encoded([tokenizer.eos_token_id], [IGNORE])
        super().__init__(model, args, tokenizer, [empty] * len(lesson), callbacks=callbacks)
        self.lesson = lesson
        self._lengths = lesson.lengths
        self.train_dataset = Dataset.from_dict({"index": list(range(len(lesson) + 1))})
        self.data_collator = lesson
        self._loss_shifts_labels = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,  # noqa: ARG002 - the trainer's own signature
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        counts = inputs["labels"] != IGNORE
        losses = (self._of_pairs if self.lesson.pairs else self._of_singles)(Reader(model), inputs, counts)
        count = counts.sum() if num_items_in_batch is None else num_items_in_batch
        # DDP averages gradients over processes, and the count is over all of them.
        return (losses * counts).sum() / torch.as_tensor(count).clamp(min=1) * self.accelerator.num_processes

    def _of_pairs(self, reader: Reader, inputs: dict[str, Tensor], counts: Tensor) -> Tensor:
        objective, reference, tokens = self.lesson.objective, inputs["reference"], inputs["tokens"]
        logprobs = reader.pairs(inputs)
        scores = [objective.score(logprobs[i], reference[:, i], tokens[:, i]) for i in (0, 1)]
        chosen, rejected = (objective.beta * score.detach()[counts] for score in scores)
        self._measure(chosen=chosen, rejected=rejected)
        return pair_losses(objective, scores[0], scores[1], inputs["target"], inputs["margin"])

    def _of_singles(self, reader: Reader, inputs: dict[str, Tensor], counts: Tensor) -> Tensor:
        objective, reference = self.lesson.objective, inputs["reference"]
        with torch.no_grad():
            names = ("input_ids", "completion_mask", "lengths")
            other = reader.texts({name: inputs[f"mismatched_{name}"] for name in names}) - reference[:, 1]
        others = self.accelerator.gather(other)[self.accelerator.gather(counts)]
        baseline = kto_baseline(others)
        logratio = reader.texts(inputs) - reference[:, 0]
        rewards, desirable = objective.beta * logratio.detach(), inputs["desirable"]
        self._measure(chosen=rewards[counts & desirable], rejected=rewards[counts & ~desirable])
        self._metrics["train"]["kl"].append(baseline.item())
        return kto_losses(objective, logratio, desirable, baseline)

    def _measure(self, chosen: Tensor, rejected: Tensor) -> None:
        """This process's micro-batch in numbers that the trainer averages into its log."""
        found = {"reward_chosen": chosen, "reward_rejected": rejected}
        if len(chosen) == len(rejected) and self.lesson.pairs:
            found |= {"accuracy": (chosen > rejected).float(), "margin": chosen - rejected}
        for name, values in found.items():
            if len(values):
                self._metrics["train"][name].append(values.mean().item())
