"""The loss against its closed form and against TRL's; batches, windows and the head's start."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tuneutils.shared import device  # noqa: F401

import torch  # isort: skip
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from tuneutils.shared.models import load_tokenizer, resolve
from tuneutils.shared.pairs import Pair
from tuneutils.shared.reward_model import load_classifier, start_head
from tuneutils.shared.texts import encode_text
from tuneutils.tools.rm_train.loss import bradley_terry
from tuneutils.tools.rm_train.trainer import PairTrainer, rows_of

from .conftest import preferences

CPU = torch.device("cpu")


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


class TestBradleyTerry:
    def test_closed_form(self) -> None:
        found = bradley_terry(
            tensor(1.0, 0.0, -2.0), tensor(0.5, 3.0, -2.0), tensor(1, 1, 1), tensor(0, 0, 0)
        )
        expected = [math.log1p(math.exp(-d)) for d in (0.5, -3.0, 0.0)]
        assert found.tolist() == pytest.approx(expected)

    def test_margin_is_taken_from_the_difference(self) -> None:
        found = bradley_terry(tensor(1.0), tensor(0.5), tensor(1), tensor(2.0))
        assert found.item() == pytest.approx(math.log1p(math.exp(1.5)))

    def test_soft_label_is_a_cross_entropy(self) -> None:
        found = bradley_terry(tensor(1.0), tensor(0.2), tensor(0.7), tensor(0.0))
        p = 1 / (1 + math.exp(-0.8))
        assert found.item() == pytest.approx(-0.7 * math.log(p) - 0.3 * math.log(1 - p))

    def test_soft_label_is_least_at_its_own_log_odds(self) -> None:
        difference = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([difference], line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = bradley_terry(difference, torch.zeros_like(difference), tensor(0.8)[0], tensor(0.5)[0])
            loss.backward()
            return loss

        optimizer.step(closure)
        assert difference.item() == pytest.approx(math.log(0.8 / 0.2) + 0.5, abs=1e-4)

    def test_centring(self) -> None:
        found = bradley_terry(tensor(1.0), tensor(0.5), tensor(1), tensor(0), centre=0.1)
        assert found.item() == pytest.approx(math.log1p(math.exp(-0.5)) + 0.1 * 1.5**2)


def pairs_of(tokenizer: Any, count: int, **changes: Any) -> list[Pair]:
    made = []
    for i, record in enumerate(preferences(count)):
        texts = [encode_text(record["prompt"], record[s], tokenizer) for s in ("chosen", "rejected")]
        margin = changes.get("margin", 0.0) * (i % 3)
        made.append(Pair(f"x:{i}", str(i), *texts, margin=margin))
    return made


def trainer_of(folder: Path, model: Path, pairs: list[Pair], *, centre: float = 0.0, **config: Any) -> Any:
    tokenizer = load_tokenizer(str(model))
    classifier = load_classifier(
        resolve(str(model)), CPU, torch.float32, tokenizer.pad_token_id, new_head_seed=3
    )
    given = {"per_device_train_batch_size": 4, "max_steps": 1, "bf16": False, **config}
    args = RewardConfig(
        output_dir=str(folder), use_cpu=True, report_to=[], max_length=None, remove_unused_columns=False,
        gradient_checkpointing=False, save_strategy="no", logging_steps=1, disable_tqdm=True, **given,
    )  # fmt: skip
    return PairTrainer(classifier, args, tokenizer, pairs, centre=centre)


@pytest.mark.parametrize("margin", [0.0, 0.7])
@pytest.mark.parametrize("centre", [0.0, 0.05])
def test_is_trl_s_loss(tiny_model: Path, tmp_path: Path, margin: float, centre: float) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    pairs = pairs_of(tokenizer, 6, margin=margin)
    ours = trainer_of(tmp_path / "ours", tiny_model, pairs, centre=centre)
    rows = [ours.train_dataset[i] for i in range(6)]
    found = ours.compute_loss(ours.model, ours.data_collator(rows))

    columns = {"chosen_ids": [p.chosen.ids for p in pairs], "rejected_ids": [p.rejected.ids for p in pairs]}
    if margin:
        columns["margin"] = [p.margin for p in pairs]  # type: ignore[misc]
    args = RewardConfig(
        output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to=[], max_length=None,
        gradient_checkpointing=False, center_rewards_coefficient=centre or None,
    )  # fmt: skip
    trl = RewardTrainer(
        model=ours.model, args=args, processing_class=tokenizer, train_dataset=Dataset.from_dict(columns)
    )
    theirs = trl.compute_loss(trl.model, trl.data_collator([trl.train_dataset[i] for i in range(6)]))
    assert found.item() == pytest.approx(theirs.item(), rel=1e-6)


def test_the_split_into_micro_batches_does_not_change_the_gradient(tiny_model: Path, tmp_path: Path) -> None:
    pairs = pairs_of(load_tokenizer(str(tiny_model)), 7)
    norms = []
    for name, size, steps in (("one", 7, 1), ("several", 2, 4)):  # windows of 2, 2, 2 and 1 pairs
        trainer = trainer_of(
            tmp_path / name, tiny_model, pairs,
            per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_grad_norm=1e9,
        )  # fmt: skip
        trainer.train()
        norms.append(next(e for e in trainer.state.log_history if "grad_norm" in e))
    assert norms[0]["grad_norm"] == pytest.approx(norms[1]["grad_norm"], rel=1e-5)
    assert norms[0]["loss"] == pytest.approx(norms[1]["loss"], rel=1e-5)


def test_head_starts_as_row_6_says() -> None:
    """Standard deviation 1/√(d + 1): the chi-square of all draws within five of its own deviations."""
    d, seeds = 48, 200
    head = torch.nn.Linear(d, 1, bias=False)
    drawn = []
    for seed in range(seeds):
        start_head(head, seed)
        drawn.append(head.weight.detach().flatten().clone())
    values = torch.stack(drawn).double() * math.sqrt(d + 1)
    n = values.numel()
    assert abs(values.square().sum().item() - n) < 5 * math.sqrt(2 * n)
    assert abs(values.mean().item()) < 5 / math.sqrt(n)
    assert len({tuple(v.tolist()) for v in drawn}) == seeds


def test_new_heads_have_no_bias_and_no_dropout(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path)
    made = load_classifier(resolve(str(tmp_path)), CPU, torch.float32, 1, new_head_seed=0).train()
    ids = torch.arange(10, 30)[None]
    assert made.score.bias is None
    assert torch.equal(made(input_ids=ids).logits, made(input_ids=ids).logits)


def test_votes_stand_without_the_margin(tiny_model: Path) -> None:
    """Both say how far apart the scores are: the optimum of a pair with votes is logit(share), margin or not."""
    first, *_ = pairs_of(load_tokenizer(resolve(str(tiny_model))), 1)
    voted = replace(first, margin=1.5, target=0.75, has_share=True)
    stated = replace(first, margin=1.5)
    tied = replace(first, margin=1.5, target=0.5)
    assert rows_of([voted, stated, tied], 1.0, True, 2)["margin"][:3] == [0.0, 1.5, 0.0]
    assert rows_of([voted], 1.0, False, 2)["margin"][:1] == [1.5]
