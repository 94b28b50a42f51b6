"""Order, padding, accumulation and checkpoints of the trainer, against loops written in plain PyTorch."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support import tiny_tokenizer

from tuneutils.shared import device  # noqa: F401

import torch  # isort: skip
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig

from tuneutils.shared.checkpoints import last_checkpoint, run_identity
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.supervise import IGNORE, Encoded
from tuneutils.shared.training import (
    BucketSampler,
    Collator,
    MarkComplete,
    ResumableTrainer,
    StopOnNaN,
)


def uneven_examples(count: int, vocabulary: int = 384) -> list[Encoded]:
    """Random tokens; label counts from 1 to about 40."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for i in range(count):
        learnt = 1 + (i * i * 7) % 40
        ids = torch.randint(4, vocabulary, (3 + i % 5 + learnt,), generator=generator).tolist()
        made.append(Encoded(ids, [IGNORE] * (len(ids) - learnt) + ids[-learnt:]))
    return made


def trainer_of(
    model: Any,
    folder: Path,
    examples: list[Encoded],
    heldout: Sequence[Encoded] = (),
    **config: Any,
) -> ResumableTrainer:
    fields: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        "report_to": [],
        "disable_tqdm": True,
    }
    return ResumableTrainer(
        model,
        SFTConfig(**{**fields, **config}),
        tiny_tokenizer(),
        examples,
        heldout,
        callbacks=[MarkComplete(), StopOnNaN()],
    )


def fresh(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def mean_loss(model: Any, examples: list[Encoded]) -> torch.Tensor:
    """The mean over all labels, each example run by itself, without padding."""
    total = torch.zeros(())
    labels_seen = 0
    for example in examples:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels)
        logits = model(ids).logits[0, :-1]
        total = total + F.cross_entropy(logits, labels[1:], ignore_index=IGNORE, reduction="sum")
        labels_seen += int((labels[1:] != IGNORE).sum())
    return total / labels_seen


@pytest.mark.parametrize("count", [1, 5, 8, 37])
def test_each_epoch_gives_every_index_once_in_another_order(count: int) -> None:
    lengths = [len(e) for e in uneven_examples(count)]
    sampler = BucketSampler(lengths, 8, seed=3)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(count))
        assert len(order) == len(sampler)
        orders.append(order)
        assert list(sampler) == order
    assert count < 16 or orders[0] != orders[1] != orders[2]  # fewer make one step, sorted by length


@pytest.mark.parametrize(("micro", "processes"), [(8, 1), (4, 1), (1, 1), (4, 2), (2, 2), (1, 4)])
def test_steps_are_the_same_however_they_are_split(micro: int, processes: int) -> None:
    lengths = [len(e) for e in uneven_examples(37)]
    multiple = micro * processes if processes > 1 else 1
    plain = list(BucketSampler(lengths, 8, seed=3))
    split = BucketSampler(lengths, 8, seed=3, multiple=multiple, filler=37)
    padded = list(split)
    assert padded[:37] == plain
    assert set(padded[37:]) <= {37}
    assert len(padded) == len(split)
    assert len(padded) % multiple == 0
    assert len(padded) - 37 < max(multiple, 1)


def test_a_step_takes_examples_of_like_length() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 500, (512,), generator=generator).tolist()
    order = list(BucketSampler(lengths, 8, seed=0))
    padding = [
        max(lengths[i] for i in order[s : s + 8]) * 8 - sum(lengths[i] for i in order[s : s + 8])
        for s in range(0, 512, 8)
    ]
    shuffled = torch.randperm(512, generator=generator).tolist()
    random_padding = [
        max(lengths[i] for i in shuffled[s : s + 8]) * 8 - sum(lengths[i] for i in shuffled[s : s + 8])
        for s in range(0, 512, 8)
    ]
    assert sum(padding) < 0.25 * sum(random_padding)


def test_the_collator_pads_on_the_right_and_never_asks_for_the_first_token() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = Collator(1)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7], [IGNORE] * 3]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(("micro", "accumulation"), [(8, 1), (4, 2), (1, 8)])
def test_accumulation_equals_a_plain_loop_over_whole_steps(
    micro: int, accumulation: int, tiny_model: Path, tmp_path: Path
) -> None:
    """Steps of 8 and then 3 examples: the last window of an epoch is shorter, in any split."""
    examples = uneven_examples(11)
    trainer = trainer_of(
        fresh(tiny_model),
        tmp_path,
        examples,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
    )
    trainer.train()
    model = fresh(tiny_model).train()
    sampler = BucketSampler([len(e) for e in examples], 8, seed=42)
    decayed = [p for n, p in model.named_parameters() if "norm" not in n]
    plain = [p for n, p in model.named_parameters() if "norm" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=1e-3
    )
    step = 0
    log = trainer.log_lines()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        for start in (0, 8):
            if step == 5:
                break
            rate = 1e-3 * (step if step < 1 else 0.5 * (1 + math.cos(math.pi * (step - 1) / 4)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = mean_loss(model, [examples[i] for i in order[start : start + 8]])
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            assert log[step]["loss"] == pytest.approx(loss.item(), rel=1e-6)
            assert log[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
            assert log[step]["learning_rate"] == pytest.approx(rate, rel=1e-6)
            step += 1
    start_weights = dict(fresh(tiny_model).named_parameters())
    for name, parameter in trainer.model.named_parameters():
        expected = dict(model.named_parameters())[name]
        change = (expected - start_weights[name]).norm()
        assert (parameter - expected).norm() <= 1e-4 * change, name


class KeepGradients(TrainerCallback):  # type: ignore[misc]
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.checkpointing = model.is_gradient_checkpointing
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters()}


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model: Path, tmp_path: Path) -> None:
    kept = []
    for on in (False, True):
        kwargs = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if on else {}
        trainer = trainer_of(
            fresh(tiny_model), tmp_path, uneven_examples(8), gradient_checkpointing=on, max_steps=1, **kwargs
        )
        kept.append(KeepGradients())
        trainer.add_callback(kept[-1])
        trainer.train()
        assert kept[-1].checkpointing == on
    for name, gradient in kept[0].gradients.items():
        assert torch.allclose(kept[1].gradients[name], gradient, rtol=1e-6, atol=1e-9), name


def test_the_heldout_loss_is_a_mean_over_tokens(tiny_model: Path, tmp_path: Path) -> None:
    heldout = uneven_examples(7)
    trainer = trainer_of(fresh(tiny_model), tmp_path, uneven_examples(3), heldout)
    trainer.model.train()
    with torch.no_grad():
        expected = mean_loss(fresh(tiny_model).eval(), heldout).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.model.training


def test_a_loss_that_is_no_number_ends_the_run_with_advice(tiny_model: Path, tmp_path: Path) -> None:
    model = fresh(tiny_model)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(ToolError, match=r"step 1: loss is nan; try a lower --learning-rate") as caught:
        trainer_of(model, tmp_path, uneven_examples(4)).train()
    assert caught.value.code == ExitCode.GATE_FAILED


def whole_checkpoint(folder: Path, step: int) -> Path:
    from transformers import TrainerControl, TrainerState

    made = folder / f"checkpoint-{step}"
    made.mkdir()
    (made / "trainable.safetensors").write_bytes(b"x" * 10)
    (made / "optimizer.pt").write_bytes(b"y" * 10)
    state = TrainerState(global_step=step)
    MarkComplete().on_save(
        SFTConfig(output_dir=str(folder), use_cpu=True, bf16=False), state, TrainerControl()
    )
    return made


def test_only_whole_checkpoints_of_the_same_run_count(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    same = run_identity({"rank": 8}, 0)
    assert same != run_identity({"rank": 9}, 0)
    assert last_checkpoint(folder, same) is None
    kept = [whole_checkpoint(folder, step) for step in (2, 4, 10, 12, 14, 16)]
    (kept[3] / "optimizer.pt").write_bytes(b"y" * 9)  # cut off
    (kept[4] / "complete").write_text(json.dumps({})[:1])  # its mark cut off
    (kept[5] / "trainable.safetensors").unlink()  # half removed
    assert last_checkpoint(folder, same) == kept[2]
    assert [p.exists() for p in kept] == [True, True, True, False, False, False]
    assert last_checkpoint(folder, run_identity({"rank": 9}, 0)) is None
    assert not kept[2].exists()


def test_a_checkpoint_of_other_parameters_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    trainer = trainer_of(fresh(tiny_model), tmp_path, uneven_examples(3))
    save_file({"other": torch.zeros(1)}, tmp_path / "trainable.safetensors")
    with pytest.raises(ToolError, match="other parameters"):
        trainer.load_trainable(str(tmp_path))


def test_the_log_holds_nothing_of_clock_or_machine(tiny_model: Path, tmp_path: Path) -> None:
    trainer = trainer_of(fresh(tiny_model), tmp_path, uneven_examples(8), uneven_examples(2), max_steps=2)
    trainer.train()
    trainer.evaluate()
    assert Counter(key for line in trainer.log_lines() for key in line) == {
        "step": 3,
        "loss": 2,
        "learning_rate": 2,
        "grad_norm": 2,
        "eval_loss": 1,
    }
