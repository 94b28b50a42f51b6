"""The resumable trainer with a float teacher, and a rate of their own for learnt scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tuneutils.shared.divergences import Objective
from tuneutils.shared.divergences_model import distillation_loss, teacher_rows
from tuneutils.shared.supervise import IGNORE
from tuneutils.shared.training import ResumableTrainer


class QatTrainer(ResumableTrainer):
    """``ResumableTrainer`` whose loss compares the model with a float one.

    Args:
        objective: None for the labels alone.
        scale_rate: peak learning rate of the parameters named ``stretch``.
    """

    def __init__(
        self,
        model: nn.Module,
        *args: Any,
        teacher: Any,
        objective: Objective | None,
        scale_rate: float,
        **kw: Any,
    ) -> None:
        super().__init__(model, *args, **kw)
        self.teacher, self.objective, self.scale_rate = teacher, objective, scale_rate

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if self.objective is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        ids, labels = inputs["input_ids"], inputs["labels"]
        teacher = teacher_rows(self.teacher, ids, None, labels)
        total = distillation_loss(model, ids, None, labels, teacher, self.objective)
        count = (labels[:, 1:] != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
        return total / torch.as_tensor(count).clamp(min=1)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
            for name, parameter in (model or self.model).named_parameters():
                if parameter.requires_grad:
                    groups[name.endswith(".stretch")].append(parameter)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model or self.model)
            given = [{"params": groups[False], "weight_decay": self.args.weight_decay}]
            if groups[True]:
                given.append({"params": groups[True], "weight_decay": 0.0, "lr": self.scale_rate})
            self.optimizer = kind(given, **options)
        return super().create_optimizer(model)
