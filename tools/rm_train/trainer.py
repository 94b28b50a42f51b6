"""TRL's RewardTrainer with its loss, its batches and its checkpoints replaced by ours.

- the loss takes soft labels beside margins and centring, and is divided by the pairs of the whole
  accumulation window, so that any split into micro-batches and processes gives the same gradient;
- a pair's sides are in one row, of a batch of pairs of like length (see ``packed`` and
  ``shared.training.BucketSampler``);
- a killed run goes on and ends in the same bytes (``shared.training.Resumable``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from datasets import Dataset
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback
from trl import RewardConfig, RewardTrainer

from tuneutils.shared.pairs import Pair
from tuneutils.shared.reward_model import padded, read_out
from tuneutils.shared.supervise import IGNORE
from tuneutils.shared.training import LOGGED, BucketSampler, Resumable
from tuneutils.tools.rm_train.loss import bradley_terry
from tuneutils.tools.rm_train.packed import PairReader, pack, packed_length


@dataclass
class Collator:
    """Pairs packed into a row each, or chosen texts above rejected ones, ``(2n, T)``.

    A pair's label only says that it counts.
    """

    pad_id: int
    packs: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        chosen, rejected = ([row[side] for row in rows] for side in ("chosen_ids", "rejected_ids"))
        if self.packs:
            inputs = pack(chosen, rejected, self.pad_id)
        else:
            inputs = {"input_ids": padded([*chosen, *rejected], self.pad_id)}
        return {
            **inputs,
            "target": torch.tensor([row["target"] for row in rows], dtype=torch.float32),
            "margin": torch.tensor([row["margin"] for row in rows], dtype=torch.float32),
            "labels": torch.tensor([row["label"] for row in rows]),
        }


def rows_of(
    pairs: Sequence[Pair], margin_scale: float, soft_labels: bool, eos_id: int
) -> dict[str, list[Any]]:
    """Columns of the data set; the last row is a filler that does not count."""
    rows: dict[str, list[Any]] = {k: [] for k in ("chosen_ids", "rejected_ids", "target", "margin", "label")}
    for pair in pairs:
        hard = 1.0 if pair.target > 0.5 else 0.5 if pair.target == 0.5 else 0.0
        rows["chosen_ids"].append(pair.chosen.ids)
        rows["rejected_ids"].append(pair.rejected.ids)
        rows["target"].append(pair.target if soft_labels else hard)
        # A share of votes says by itself how far apart the scores are, and a tie that they are not.
        plain = hard != 0.5 and not (soft_labels and pair.has_share)
        rows["margin"].append(margin_scale * pair.margin if plain else 0.0)
        rows["label"].append(0)
    for name, value in zip(rows, ([eos_id], [eos_id], 1.0, 0.0, IGNORE), strict=True):
        rows[name].append(value)
    return rows


class PairTrainer(Resumable, RewardTrainer):  # type: ignore[misc]
    """RewardTrainer on encoded pairs; see the module's description for what is replaced."""

    logged = (*LOGGED, "accuracy", "margin", "mean_reward")
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: RewardConfig,
        tokenizer: Any,
        pairs: Sequence[Pair],
        *,
        margin_scale: float = 1.0,
        soft_labels: bool = True,
        centre: float = 0.0,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self._centre = centre
        rows = rows_of(pairs, margin_scale, soft_labels, tokenizer.eos_token_id)
        super().__init__(
            model=model,
            args=args,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict(rows),
            data_collator=Collator(tokenizer.pad_token_id),
            callbacks=list(callbacks),
        )
        self._reader = PairReader(model)
        lengths = [packed_length(p.chosen.ids, p.rejected.ids) for p in pairs]
        with self.accelerator.autocast():
            packs = self._reader.agrees(model, max(lengths))
        self.data_collator.packs = packs
        self._lengths = lengths if packs else [p.length for p in pairs]
        self.model_accepts_loss_kwargs = True  # so that the pairs of the whole window are counted
        self._loss_shifts_labels = False
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, *_: Any) -> BucketSampler:
        micro = self.args.per_device_train_batch_size * self.args.world_size
        return BucketSampler(
            self._lengths,
            micro * self.args.gradient_accumulation_steps,
            self.args.seed,
            multiple=micro if self.args.world_size > 1 else 1,
            filler=len(self._lengths),
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,  # noqa: ARG002 - the trainer's own signature
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        counts = inputs["labels"] != IGNORE
        if self.data_collator.packs:
            chosen, rejected = self._reader(model, inputs)
        else:
            chosen, rejected = read_out(model, inputs["input_ids"]).chunk(2)
        losses = bradley_terry(chosen, rejected, inputs["target"], inputs["margin"], self._centre)
        total = (losses * counts).sum()
        self._measure(chosen.detach()[counts], rejected.detach()[counts], inputs["target"][counts])
        count = counts.sum() if num_items_in_batch is None else num_items_in_batch
        # DDP averages gradients over processes, and the count is over all of them.
        return total / torch.as_tensor(count).clamp(min=1) * self.accelerator.num_processes

    def _measure(self, chosen: Tensor, rejected: Tensor, target: Tensor) -> None:
        """This process's micro-batch in numbers that RewardTrainer averages into its log."""
        if not len(chosen):
            return
        right = ((chosen > rejected) == (target >= 0.5)).float()
        found = {"accuracy": right, "margin": chosen - rejected, "mean_reward": (chosen + rejected) / 2}
        for name, values in found.items():
            self._metrics["train"][name].append(values.mean().item())
