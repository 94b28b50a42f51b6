"""The resumable trainer with a teacher: what the loss is, and on whose words it is taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tuneutils.shared.divergences import Objective, Teacher
from tuneutils.shared.divergences_model import distillation_loss, teacher_rows
from tuneutils.shared.sample import Sampling, generate
from tuneutils.shared.supervise import IGNORE, Encoded
from tuneutils.shared.training import Collator, ResumableTrainer
from tuneutils.tools.distill.cache import TopKCache
from tuneutils.tools.distill.match import Matcher


@dataclass
class Lesson:
    """What a student is taught from, besides its examples.

    Attributes:
        objective: None for the labels alone.
        teacher: a live model; None where all it says is cached.
        cache: its distributions on disk.
        teacher_examples: the examples as the teacher's own tokenizer gives them.
        matcher: of what is inside both.
        sampling: how the student answers, when it learns from its own answers (GKD, Agarwal et al. 2024,
            arXiv 2306.13649, algorithm 1).
        student_fraction: the share of the steps in which it does (lambda there).
    """

    objective: Objective | None
    teacher: Any = None
    cache: TopKCache | None = None
    teacher_examples: Sequence[Encoded] = ()
    matcher: Matcher | None = None
    sampling: Sampling | None = None
    student_fraction: float = 0.0
    seed: int = 0
    collate: Collator = field(default_factory=lambda: Collator(0))


class IndexedCollator(Collator):
    """The shared collator, with each example's index kept."""

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = super().__call__(examples)
        batch["index"] = torch.tensor([e["index"] for e in examples])
        return batch


class DistillTrainer(ResumableTrainer):
    """``ResumableTrainer`` whose loss is a :class:`Lesson`'s; the held-out loss stays the labels'."""

    def __init__(self, lesson: Lesson, model: nn.Module, args: Any, tokenizer: Any, *rest: Any, **kw: Any):
        super().__init__(model, args, tokenizer, *rest, **kw)
        self.lesson = lesson
        self.tokenizer = tokenizer
        self.train_dataset = self.train_dataset.add_column("index", list(range(len(self.train_dataset))))
        self.data_collator = IndexedCollator(tokenizer.pad_token_id)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        lesson, labels = self.lesson, inputs["labels"]
        if lesson.objective is None and lesson.matcher is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with lesson.matcher.watching() if lesson.matcher else nullcontext():
            teacher = self._teacher(inputs)
            assert lesson.objective is not None
            total = distillation_loss(model, inputs["input_ids"], None, labels, teacher, lesson.objective)
        if lesson.matcher is not None:
            total = total + lesson.matcher.loss(labels)
        count = (labels[:, 1:] != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
        return total / torch.as_tensor(count).clamp(min=1)

    def _teacher(self, inputs: dict[str, Tensor]) -> Teacher:
        lesson = self.lesson
        where = inputs["input_ids"].device
        if lesson.cache is not None:
            return lesson.cache.rows(inputs["index"].tolist(), where)
        if lesson.teacher_examples:
            theirs = [lesson.teacher_examples[i] for i in inputs["index"].tolist() if i < len(self._lengths)]
            inputs = {n: t.to(where) for n, t in lesson.collate([vars(e) for e in theirs]).items()}
        # The matcher reads whole layers, so the teacher must run on the student's very batch.
        return teacher_rows(lesson.teacher, inputs["input_ids"], None, inputs["labels"])

    # ---- the student's own answers

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        lesson = self.lesson
        if lesson.sampling is None or not batches:
            return batches, count
        step = self.state.global_step
        dice = torch.Generator().manual_seed(lesson.seed * 1_000_003 + step)
        if torch.rand((), generator=dice).item() >= lesson.student_fraction:
            return batches, count
        batches = [self._answered(b, (step * num_batches + i)) for i, b in enumerate(batches)]
        return batches, self._get_num_items_in_batch(batches, device)

    def _answered(self, batch: dict[str, Tensor], number: int) -> dict[str, Tensor]:
        """The batch's prompts with answers that the student has just sampled."""
        sampling = self.lesson.sampling
        assert sampling is not None
        prompts = [p for p in map(prompt_of, batch["input_ids"].tolist(), batch["labels"].tolist()) if p]
        if not prompts:
            return batch
        model = self.accelerator.unwrap_model(self.model)
        with self.compute_loss_context_manager():
            answers = generate(
                model,
                prompts,
                sampling,
                batch_size=len(prompts),
                pad_token_id=self.tokenizer.pad_token_id,
                row_ids=[number * 65_536 + i for i in range(len(prompts))],
            )
        made = [
            {
                "input_ids": p + a.token_ids,
                "labels": [IGNORE] * len(p) + a.token_ids,
                "index": 0,
            }
            for p, a in zip(prompts, answers, strict=True)
        ]
        return {n: t.to(batch["input_ids"].device) for n, t in self.data_collator(made).items()}


def prompt_of(ids: Sequence[int], labels: Sequence[int]) -> list[int]:
    """The tokens before the first that is learnt; none for an example without labels."""
    first = next((i for i, label in enumerate(labels) if label != IGNORE), 0)
    return list(ids[:first])
