"""The losses against the papers' closed forms, and against TRL's on the same tensors and batches."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tuneutils.shared import device  # noqa: F401

import torch  # isort: skip
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from tuneutils.shared.models import load_tokenizer
from tuneutils.shared.texts import Text, encode_text
from tuneutils.tools.pref_tune.batches import Reader
from tuneutils.tools.pref_tune.losses import (
    KINDS,
    Objective,
    kto_baseline,
    kto_losses,
    log1mexp,
    pair_losses,
)
from tuneutils.tools.pref_tune.params import LOSSES
from tuneutils.tools.pref_tune.reference import of_pairs, of_texts
from tuneutils.tools.pref_tune.trainer import Lesson, PreferenceTrainer

from .conftest import preferences

PAIRED = [name for name in LOSSES if name != "kto"]


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def loss_of(
    name: str, chosen: float, rejected: float, target: float = 1.0, margin: float = 0.0, **given: Any
) -> float:
    objective = Objective(name, given.pop("beta", KINDS[name].beta), **given)
    return float(pair_losses(objective, tensor(chosen), tensor(rejected), tensor(target), tensor(margin))[0])


class TestClosedForms:
    def test_dpo_equation_7(self) -> None:
        """−log σ(β log π(y_w)/π_ref(y_w) − β log π(y_l)/π_ref(y_l))."""
        pw, pl, rw, rl, beta = 0.3, 0.2, 0.1, 0.4, 0.25
        expected = -math.log(sigmoid(beta * math.log(pw / rw) - beta * math.log(pl / rl)))
        assert loss_of("dpo", math.log(pw / rw), math.log(pl / rl), beta=beta) == pytest.approx(expected)

    def test_cdpo(self) -> None:
        h, epsilon = 0.1 * (2.0 + 1.5), 0.2
        expected = -(1 - epsilon) * math.log(sigmoid(h)) - epsilon * math.log(sigmoid(-h))
        assert loss_of("cdpo", 2.0, -1.5, smoothing=epsilon) == pytest.approx(expected)

    def test_cdpo_is_least_where_the_model_is_as_sure_as_the_labels(self) -> None:
        """The optimum of a cross-entropy: σ(h) = 1 − ε."""
        epsilon = 0.2
        best = math.log((1 - epsilon) / epsilon) / 0.1
        values = [loss_of("cdpo", best + d, 0.0, smoothing=epsilon) for d in (-0.1, 0.0, 0.1)]
        assert min(values) == values[1]

    def test_robust_is_unbiased_under_flips(self) -> None:
        """The mean over labels flipped with probability ε is the clean loss (Chowdhury et al., lemma 3.1)."""
        epsilon = 0.3
        right, wrong = (loss_of("robust", *sides, smoothing=epsilon) for sides in ((2.0, -1.5), (-1.5, 2.0)))
        assert (1 - epsilon) * right + epsilon * wrong == pytest.approx(loss_of("dpo", 2.0, -1.5))

    def test_ipo_equation_17(self) -> None:
        tau = 0.2
        assert loss_of("ipo", 0.9, -0.4, beta=tau) == pytest.approx((0.9 + 0.4 - 1 / (2 * tau)) ** 2)

    def test_simpo_equation_6(self) -> None:
        expected = -math.log(sigmoid(2.5 * -0.7 - 2.5 * -1.1 - 1.25))
        assert loss_of("simpo", -0.7, -1.1, beta=2.5, gamma=1.25) == pytest.approx(expected)

    def test_simpo_of_the_other_label(self) -> None:
        assert loss_of("simpo", -0.7, -1.1, 0.0, gamma=0.5) == pytest.approx(
            loss_of("simpo", -1.1, -0.7, 1.0, gamma=0.5)
        )

    def test_orpo_equations_4_6_7(self) -> None:
        pw, pl, coefficient = 0.6, 0.3, 0.25
        odds = (pw / (1 - pw)) / (pl / (1 - pl))
        expected = -math.log(pw) - coefficient * math.log(sigmoid(math.log(odds)))
        assert loss_of("orpo", math.log(pw), math.log(pl), beta=coefficient) == pytest.approx(expected)

    def test_odpo_margin_is_taken_from_the_reward(self) -> None:
        expected = -math.log(sigmoid(0.1 * 3.5 - 0.7))
        assert loss_of("dpo", 2.0, -1.5, margin=0.7) == pytest.approx(expected)

    @pytest.mark.parametrize("name", PAIRED)
    def test_soft_label_is_the_mean_over_labels(self, name: str) -> None:
        p, given = 0.7, {"smoothing": 0.1, "gamma": 0.5}
        both = [loss_of(name, -0.5, -1.5, label, **given) for label in (1.0, 0.0)]
        found = loss_of(name, -0.5, -1.5, p, **given)
        assert found == pytest.approx(p * both[0] + (1 - p) * both[1])

    @pytest.mark.parametrize("name", ["dpo", "cdpo", "robust", "dpo-norm"])
    def test_is_ln_2_where_nothing_was_learnt(self, name: str) -> None:
        assert loss_of(name, 0.0, 0.0, smoothing=0.2) == pytest.approx(math.log(2))

    def test_kto_equation_8(self) -> None:
        """λ_D (1 − σ(β(r − z₀))) of a good answer, λ_U (1 − σ(β(z₀ − r))) of a bad one."""
        objective = Objective("kto", 0.1, desirable_weight=1.2, undesirable_weight=0.8)
        found = kto_losses(objective, tensor(3.0, 3.0), torch.tensor([True, False]), tensor(0.5)[0])
        expected = [1.2 * (1 - sigmoid(0.1 * 2.5)), 0.8 * (1 - sigmoid(-0.1 * 2.5))]
        assert found.tolist() == pytest.approx(expected)

    def test_kto_baseline_is_never_negative_and_takes_no_gradient(self) -> None:
        ratios = tensor(1.0, 4.0).requires_grad_()
        assert kto_baseline(ratios).item() == 2.5
        assert not kto_baseline(ratios).requires_grad
        assert kto_baseline(tensor(-1.0, -4.0)).item() == 0.0

    @pytest.mark.parametrize("x", [-1e-12, -1e-3, -0.69, -0.7, -5.0, -50.0])
    def test_log1mexp(self, x: float) -> None:
        from decimal import Decimal, getcontext

        getcontext().prec = 60
        expected = float((1 - Decimal(x).exp()).ln())
        assert log1mexp(tensor(x)).item() == pytest.approx(expected, rel=1e-12)

    def test_orpo_of_a_certain_answer_is_finite_and_so_is_its_gradient(self) -> None:
        chosen = torch.tensor([-1e-9, 0.0], requires_grad=True)
        objective, ones = Objective("orpo", 0.1), torch.ones(2)
        pair_losses(objective, chosen, torch.tensor([-1.0, -1.0]), ones, 0 * ones).sum().backward()
        assert chosen.grad is not None
        assert bool(chosen.grad.isfinite().all())


class TestSameTensorsAsTRL:
    def test_orpo_odds_ratio(self) -> None:
        chosen, rejected = torch.tensor([-0.3, -1.2, -2.0]), torch.tensor([-0.9, -0.4, -2.5])
        theirs = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
        penalty, *_ = ORPOTrainer.odds_ratio_loss(theirs, chosen, rejected)
        ones = torch.ones(3)
        ours = pair_losses(Objective("orpo", 0.3), chosen, rejected, ones, 0 * ones)
        assert ours.tolist() == pytest.approx((-chosen - penalty).tolist(), rel=1e-5)

    def test_simpo(self) -> None:
        chosen, rejected = torch.tensor([-0.3, -1.2, -2.0]), torch.tensor([-0.9, -0.4, -2.5])
        theirs = SimpleNamespace(
            beta=2.5, alpha=0.0, simpo_gamma=0.8, loss_type="simpo", label_smoothing=0.0,
            accelerator=SimpleNamespace(device="cpu"),
        )  # fmt: skip
        losses, *_ = CPOTrainer.cpo_loss(theirs, chosen, rejected)
        ones = torch.ones(3)
        ours = pair_losses(Objective("simpo", 2.5, gamma=0.8), chosen, rejected, ones, 0 * ones)
        assert ours.tolist() == pytest.approx(losses.tolist(), rel=1e-6)


# Whole batches: loss and gradients of TRL's own trainers.


def texts_of(tokenizer: Any, count: int) -> list[tuple[Text, Text]]:
    return [
        (encode_text(r["prompt"], r["chosen"], tokenizer), encode_text(r["prompt"], r["rejected"], tokenizer))
        for r in preferences(count)
    ]


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def models(tiny_model: Path) -> tuple[Any, Any, Any]:
    """Policy (the reference, moved a little), reference and tokenizer."""
    reference = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    policy = AutoModelForCausalLM.from_pretrained(tiny_model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.03 * torch.randn(p.shape, generator=generator))
    return policy, reference, load_tokenizer(str(tiny_model))


def common(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": [], "max_length": None,
        "gradient_checkpointing": False, "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip


def ours_on(
    lesson: Lesson, policy: Any, tokenizer: Any, folder: Path
) -> tuple[float, dict[str, torch.Tensor]]:
    from trl import SFTConfig

    args = SFTConfig(
        **common(folder),
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
    )
    trainer = PreferenceTrainer(policy, args, tokenizer, lesson)
    loss = trainer.compute_loss(policy, lesson([{"index": i} for i in range(len(lesson))]))
    return loss.item(), gradients(policy, loss)


#: TRL's trainers want a data set of text to start; the batches below are given to their collators.
PLAIN = (
    Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2),
    Dataset.from_list([{"prompt": "a", "completion": "b", "label": good} for good in (True, False)]),
)
TRL_NAMES = {"dpo": "sigmoid", "robust": "robust", "ipo": "ipo", "dpo-norm": "sigmoid_norm"}


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("name", TRL_NAMES)
def test_dpo_and_its_kin_are_trl_s(name: str, packs: bool, models: Any, tmp_path: Path) -> None:
    policy, reference, tokenizer = models
    pairs = texts_of(tokenizer, 7)
    smoothing = 0.2 if name == "robust" else 0.0
    args = DPOConfig(**common(tmp_path), loss_type=[TRL_NAMES[name]], beta=0.3, label_smoothing=smoothing)
    rows = [
        {"prompt_ids": c.ids[: c.prompt], "chosen_ids": c.ids[c.prompt :], "rejected_ids": r.ids[r.prompt :]}
        for c, r in pairs
    ]
    trl = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=args,
        processing_class=tokenizer,
        train_dataset=PLAIN[0],
    )
    loss = trl.compute_loss(policy, trl.data_collator(rows))
    expected = loss.item(), gradients(policy, loss)
    policy.__dict__.pop("forward", None)
    reference.__dict__.pop("forward", None)

    lesson = Lesson(
        Objective(name, 0.3, smoothing=smoothing),
        tokenizer.pad_token_id,
        of_pairs(Reader(reference), pairs, tokenizer.pad_token_id, 3, packs, "cpu"),
        pairs=pairs,
        targets=[1.0] * 7,
        margins=[0.0] * 7,
        packs=packs,
    )
    found = ours_on(lesson, policy, tokenizer, tmp_path)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for n, gradient in found[1].items():
        assert torch.allclose(gradient, expected[1][n], rtol=1e-3, atol=1e-6), n


def test_kto_is_trl_s(models: Any, tmp_path: Path) -> None:
    policy, reference, tokenizer = models
    singles = [(c if i % 3 else r, bool(i % 3)) for i, (c, r) in enumerate(texts_of(tokenizer, 7))]
    texts = [t for t, _ in singles]
    other = [
        Text([*t.ids[: t.prompt], *u.ids[u.prompt :]], t.prompt)
        for t, u in zip(texts, [texts[-1], *texts[:-1]])
    ]
    rows = [
        {
            "prompt_ids": t.ids[: t.prompt],
            "completion_ids": t.ids[t.prompt :],
            "KL_completion_ids": m.ids[m.prompt :],
            "label": good,
        }
        for (t, good), m in zip(singles, other)
    ]
    args = KTOConfig(
        **common(tmp_path), beta=0.3, desirable_weight=1.1, undesirable_weight=0.7,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trl = KTOTrainer(
        model=policy,
        ref_model=reference,
        args=args,
        processing_class=tokenizer,
        train_dataset=PLAIN[1],
    )
    loss = trl.compute_loss(policy, trl.data_collator(rows))
    expected = loss.item(), gradients(policy, loss)
    policy.__dict__.pop("forward", None)
    reference.__dict__.pop("forward", None)

    pad = tokenizer.pad_token_id
    lesson = Lesson(
        Objective("kto", 0.3, desirable_weight=1.1, undesirable_weight=0.7),
        pad,
        np.stack([of_texts(Reader(reference), some, pad, 3, "cpu") for some in (texts, other)], 1),
        singles=texts,
        desirable=[good for _, good in singles],
        mismatched=other,
    )
    found = ours_on(lesson, policy, tokenizer, tmp_path)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for n, gradient in found[1].items():
        assert torch.allclose(gradient, expected[1][n], rtol=1e-3, atol=1e-6), n
