"""Training that repeats and resumes byte for byte: TRL's SFTTrainer with four pieces replaced.

- the loss is a chunked cross-entropy over labelled tokens only, summed and divided by the labels of the
  whole accumulation window, so that any split into micro-batches and processes gives the same gradient;
- batches are cut from length-sorted stretches of a shuffle that depends on seed and epoch alone;
- checkpoints hold the trainable tensors themselves and count only once they are complete;
- the held-out loss is a mean over tokens, not over batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from tuneutils.shared.checkpoints import mark_complete
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.logprobs_model import causal_nll
from tuneutils.shared.supervise import IGNORE, Encoded

if TYPE_CHECKING:
    from torch import Tensor, nn

TRAINABLE = "trainable.safetensors"
LOGGED = ("step", "loss", "learning_rate", "grad_norm", "eval_loss")


class BucketSampler(Sampler[int]):
    """Indices in an order in which each optimizer step takes examples of like length.

    A shuffle by ``(seed, epoch)`` is cut into stretches of ``spread`` steps, each stretch sorted by length
    and cut into steps, and the steps shuffled. The order does not depend on how a step is split into
    micro-batches and processes; the last, shorter step stays last and is filled with ``filler`` up to a
    multiple of ``multiple``, so that every process has as many batches.

    Args:
        lengths: tokens of each example.
        step_size: examples of one optimizer step, over all processes.
        multiple: examples of one micro-batch over all processes; 1 when there is one process.
        filler: the index of an example without labels.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        step_size: int,
        seed: int,
        *,
        multiple: int = 1,
        filler: int = 0,
        spread: int = 16,
    ) -> None:
        self.lengths, self.step_size, self.seed = lengths, step_size, seed
        self.multiple, self.filler, self.spread = multiple, filler, spread
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        stretch = self.step_size * self.spread
        steps: list[list[int]] = []
        for start in range(0, len(order), stretch):
            ordered = sorted(order[start : start + stretch], key=lambda i: (self.lengths[i], i))
            steps += [ordered[s : s + self.step_size] for s in range(0, len(ordered), self.step_size)]
        short = [step for step in steps if len(step) < self.step_size]
        whole = [step for step in steps if len(step) == self.step_size]
        shuffled = [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]
        if self.epoch == 0 and shuffled:
            # Memory peaks at once, not hours later, and the heap's blocks then fit every later step.
            longest = max(range(len(shuffled)), key=lambda i: self.lengths[shuffled[i][-1]])
            shuffled.insert(0, shuffled.pop(longest))
        for step in shuffled:
            yield from step
        for step in short:
            yield from step
        yield from [self.filler] * (len(self) - len(self.lengths))


@dataclass
class Collator:
    """Pads on the right to the longest example of the batch; the first token is never a label."""

    pad_id: int

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(e["input_ids"]) for e in examples)
        ids = torch.full((len(examples), width), self.pad_id)
        labels = torch.full((len(examples), width), IGNORE)
        mask = torch.zeros((len(examples), width), dtype=torch.long)
        for row, example in enumerate(examples):
            n = len(example["input_ids"])
            ids[row, :n] = torch.tensor(example["input_ids"])
            labels[row, :n] = torch.tensor(example["labels"])
            mask[row, :n] = 1
        labels[:, 0] = IGNORE
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Resumable(Trainer):  # type: ignore[misc]
    """What lets one of TRL's trainers go on from a killed run: put it before that trainer among the bases.

    Checkpoints hold the tensors that training changes, by name; a log has nothing that varies between runs.
    """

    logged = LOGGED

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed from its last checkpoint a run has nothing left to do; the trainer would do one step more.
        if self.state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def trainable_state(self) -> dict[str, Tensor]:
        """The tensors that training changes, by name, on the CPU."""
        model = self.accelerator.unwrap_model(self.model)
        return {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad}

    def load_trainable(self, folder: str) -> None:
        """Put a checkpoint's tensors back; every name must match."""
        from safetensors.torch import load_file

        saved = load_file(str(Path(folder) / TRAINABLE))
        model = self.accelerator.unwrap_model(self.model)
        ours = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if saved.keys() != ours.keys():
            raise ToolError(f"{folder}: a checkpoint of other parameters; remove it to start anew")
        with torch.no_grad():
            for name, parameter in ours.items():
                parameter.copy_(saved[name].to(parameter))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._save(output_dir, state_dict)
            return
        from safetensors.torch import save_file

        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.trainable_state(), folder / TRAINABLE)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # TRL's trainers would write a model card into each checkpoint here.
        Trainer._save_checkpoint(self, model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.load_trainable(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            super()._load_best_model()
        elif self.state.best_model_checkpoint is not None:
            self.load_trainable(self.state.best_model_checkpoint)

    def log_lines(self) -> list[dict[str, Any]]:
        """The training log without anything that depends on the clock or the machine."""
        kept = [{k: e[k] for k in self.logged if k in e} for e in self.state.log_history]
        return [e for e in kept if "loss" in e or "eval_loss" in e]


class ResumableTrainer(Resumable, SFTTrainer):  # type: ignore[misc]
    """SFTTrainer on encoded examples; see the module's description for what is replaced.

    Args:
        examples, heldout: what to learn from, and what to measure the loss on.
        lr_ratio: of LoRA's B matrices over its A matrices (LoRA+, Hayou et al. 2024); 1 for plain.
    """

    optimizer: Any
    control: Any

    def __init__(
        self,
        model: nn.Module,
        args: SFTConfig,
        tokenizer: Any,
        examples: Sequence[Encoded],
        heldout: Sequence[Encoded] = (),
        *,
        lr_ratio: float = 1.0,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self._lengths = [len(e) for e in examples]
        self._heldout = sorted(heldout, key=len)
        self._lr_ratio = lr_ratio
        self._empty = Encoded([tokenizer.eos_token_id], [IGNORE])
        rows = {"input_ids": [], "labels": []}  # type: dict[str, list[list[int]]]
        for example in [*examples, self._empty]:
            rows["input_ids"].append(example.input_ids)
            rows["labels"].append(example.labels)
        # TRL rounds a 4-bit model's adapter to bfloat16, in which small updates vanish.
        precise = {n: p.data for n, p in model.named_parameters() if p.requires_grad}
        super().__init__(
            model=model,
            args=args,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict(rows),
            eval_dataset=Dataset.from_dict(rows).select(range(1)) if heldout else None,
            data_collator=Collator(tokenizer.pad_token_id),
            callbacks=list(callbacks),
        )
        for name, parameter in model.named_parameters():
            if name in precise:
                parameter.data = precise[name].to(parameter.device)
        self.model_accepts_loss_kwargs = True
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
        total = causal_nll(model, inputs["input_ids"], self._mask(inputs), inputs["labels"], reduction="sum")
        count = (
            (inputs["labels"][:, 1:] != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
        )
        # DDP averages gradients over processes, and the count is over all of them.
        return total / torch.as_tensor(count).clamp(min=1) * self.accelerator.num_processes

    def _mask(self, inputs: dict[str, Tensor]) -> Tensor | None:
        """No mask: padding on the right is after every token, so a causal model never sees it.

        Attention then takes its causal kernels. Virtual tokens come on the left and need the mask.
        """
        configs = getattr(self.accelerator.unwrap_model(self.model), "peft_config", {}).values()
        return inputs["attention_mask"] if any(c.is_prompt_learning for c in configs) else None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self._lr_ratio != 1.0 and self.optimizer is None:
            from peft.optimizers import create_loraplus_optimizer

            kind, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model or self.model)
            self.optimizer = create_loraplus_optimizer(
                model or self.model,
                optimizer_cls=kind,
                loraplus_lr_ratio=self._lr_ratio,
                loraplus_weight_decay=self.args.weight_decay,
                **kwargs,
            )
        return super().create_optimizer(model)

    # ---- held-out loss

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Mean negative log-likelihood per held-out token, in nats; every process takes its share."""
        was_training = self.model.training
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        size, world = self.args.per_device_eval_batch_size, self.args.world_size
        batches = [self._heldout[i : i + size] for i in range(0, len(self._heldout), size)]
        # Sharded weights are gathered by all processes at once: each needs as many batches.
        batches += [[self._empty]] * (-len(batches) % world)
        wrapped = self.model_wrapped if self.is_fsdp_enabled else self.model
        for batch in batches[self.args.process_index :: world]:
            inputs = self._prepare_inputs(self.data_collator([vars(e) for e in batch]))
            with torch.no_grad(), self.compute_loss_context_manager():
                nll = causal_nll(
                    wrapped, inputs["input_ids"], self._mask(inputs), inputs["labels"], reduction="sum"
                )
            sums += torch.tensor([nll.item(), (inputs["labels"] != IGNORE).sum().item()], dtype=torch.float64)
        if world > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device)).cpu()
        self.model.train(was_training)
        metrics = {f"{metric_key_prefix}_loss": (sums[0] / sums[1]).item()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class MarkComplete(TrainerCallback):  # type: ignore[misc]
    """Marks a checkpoint as whole once all of it is written, by a list of its files and their sizes."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any
    ) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # each process writes its own random state
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            mark_complete(folder)


class StopOnNaN(TrainerCallback):  # type: ignore[misc]
    """Ends a run whose loss is no number any more, with a line that says what to try."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        # In float16 the loss scaler meets infinite gradients, and skips the step, on its way to a scale.
        for key in ("loss", "eval_loss") if args.fp16 else ("loss", "eval_loss", "grad_norm"):
            if logs and not math.isfinite(logs.get(key, 0.0)):
                raise ToolError(
                    f"step {state.global_step}: {key} is {logs[key]}; try a lower --learning-rate "
                    "or --dtype float32",
                    code=ExitCode.GATE_FAILED,
                )
