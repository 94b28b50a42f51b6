"""A resumable trainer on packed rows: documents in a row do not see each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from tuneutils.shared.logprobs_model import causal_nll
from tuneutils.shared.supervise import IGNORE
from tuneutils.shared.training import Resumable
from tuneutils.tools.cpt_run.documents import Corpus, Piece


class Rows(Dataset[list[Piece]]):
    """The rows of a run in their order; a row without pieces teaches nothing.

    Args:
        order: ``(corpus, row)`` of each; None for an empty row.
    """

    def __init__(self, corpora: Sequence[Corpus], order: Sequence[tuple[int, int] | None]) -> None:
        self.corpora, self.order = corpora, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> list[Piece]:
        place = self.order[index]
        if place is None:
            return []
        corpus = self.corpora[place[0]]
        return [corpus.pieces[i] for i in corpus.rows[place[1]]]


def collate(rows: Sequence[Sequence[Piece]], pad_id: int) -> dict[str, Tensor]:
    """``input_ids``, ``labels`` and ``position_ids``, each ``(B, T)``.

    Positions start at 0 with each document; Transformers makes the mask that hides the other documents of
    the row from them. Padding is one more document without labels.
    """
    width = max(2, *(sum(len(piece.ids) for piece in row) for row in rows))
    ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), IGNORE)
    positions = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        start = 0
        for piece in row:
            end = start + len(piece.ids)
            ids[i, start:end] = torch.from_numpy(piece.ids)
            labels[i, start:end] = torch.from_numpy(piece.labels)
            positions[i, start:end] = torch.arange(end - start)
            start = end
        positions[i, start:] = torch.arange(width - start)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def row_nll(model: nn.Module, batch: dict[str, Tensor], packed: bool) -> Tensor:
    """Summed negative log-likelihood of a batch's labels, in nats."""
    positions = batch["position_ids"] if packed else None
    return causal_nll(model, batch["input_ids"], None, batch["labels"], positions, reduction="sum")


@torch.no_grad()
def hides_documents(model: nn.Module, where: torch.device) -> bool:
    """Whether a document's loss is the same packed behind another as it is alone.

    Models without attention, or with a mask of their own, may ignore the positions.
    """
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    given = torch.randint(vocabulary, (24,), generator=torch.Generator().manual_seed(0)).to(where)
    positions = torch.cat([torch.arange(12), torch.arange(12)]).to(where)
    was_training = model.training
    model.eval()
    packed = causal_nll(model, given[None], None, given[None], positions[None], reduction="none")
    alone = causal_nll(model, given[None, 12:], None, given[None, 12:], reduction="none")
    model.train(was_training)
    tolerance = 1e-3 if packed.dtype == torch.float32 else 5e-2
    return torch.allclose(packed[0, 13:].float(), alone[0, 1:].float(), rtol=tolerance, atol=tolerance)


class PackedTrainer(Resumable):
    """``Resumable`` on rows whose order was planned beforehand.

    Args:
        rate: ``f(update)`` → the learning rate of the update, counted from 1, over its peak.
        measure: ``f(step)``, called where an evaluation is due; gives numbers for the log.
    """

    optimizer: Any
    control: Any

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        rows: Rows,
        *,
        pad_id: int,
        packed: bool,
        rate: Callable[[int], float],
        measure: Callable[[int], dict[str, float]],
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self._packed, self._rate, self._measure = packed, rate, measure
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=lambda batch: collate(batch, pad_id),
            callbacks=list(callbacks),
        )
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:  # noqa: ARG002
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda done: self._rate(done + 1)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,  # noqa: ARG002 - the trainer's own signature
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        total = row_nll(model, inputs, self._packed)
        count = (inputs["labels"] != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
        # DDP averages gradients over processes, and the count is over all of them.
        return total / torch.as_tensor(count).clamp(min=1) * self.accelerator.num_processes

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The tracked perplexities at this step; see ``track``."""
        metrics = self._measure(self.state.global_step)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
