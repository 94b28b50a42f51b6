"""Both sides in one row score, and learn, as in rows of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import build_tiny_model

from tuneutils.shared import device  # noqa: F401

import torch  # isort: skip

from tuneutils.shared.models import load_tokenizer, resolve
from tuneutils.shared.reward_model import RewardModel, load_classifier, padded, read_out
from tuneutils.tools.rm_train.packed import PairReader, pack, packed_length, shared_start
from tuneutils.tools.rm_train.scored import score_pairs

from .test_loss import CPU, pairs_of, trainer_of

PAIRS = [
    ([7, 8, 9, 10, 3], [7, 8, 20, 21, 22, 23, 3]),  # parts after two
    ([30, 31, 3], [40, 3]),  # share nothing
    ([50, 51, 52, 3], [50, 51, 3]),
    ([60, 3], [60, 3, 61, 3]),  # one is the other's start
]
SIDES = [[c for c, _ in PAIRS], [r for _, r in PAIRS]]


def classifier(path: Path) -> Any:
    return load_classifier(resolve(str(path)), CPU, torch.float32, 1, new_head_seed=0)


def test_shared_start() -> None:
    assert [shared_start(c, r) for c, r in PAIRS] == [2, 0, 2, 1]
    assert [packed_length(c, r) for c, r in PAIRS] == [10, 5, 5, 5]


def test_scores_are_those_of_rows_of_their_own(tiny_model: Path) -> None:
    model = classifier(tiny_model)
    reader = PairReader(model)
    assert reader.agrees(model, 64)
    with torch.no_grad():
        packed = reader(model, pack(*SIDES, pad_id=1))
        alone = [torch.cat([read_out(model, padded([row], 1)) for row in side]) for side in SIDES]
    for ours, expected in zip(packed, alone, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packs", [True, False])
def test_scored_pairs_are_those_of_each_text(
    packs: bool, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    pairs = pairs_of(tokenizer, 11)
    rm = RewardModel(classifier(tiny_model), tokenizer, CPU, torch.float32)
    if not packs:
        monkeypatch.setattr(PairReader, "agrees", lambda *_: False)
    found = score_pairs(rm, pairs, 4)
    for side in ("chosen", "rejected"):
        alone = [rm.scores([getattr(p, side).ids], 1, raw=True)[0] for p in pairs]
        assert getattr(found, side).tolist() == pytest.approx(alone, rel=1e-5, abs=1e-6)


def test_so_are_the_gradients(tiny_model: Path, tmp_path: Path) -> None:
    pairs = pairs_of(load_tokenizer(str(tiny_model)), 5)
    grads = []
    for packs in (True, False):
        trainer = trainer_of(tmp_path / str(packs), tiny_model, pairs)
        assert trainer.data_collator.packs
        trainer.data_collator.packs = packs
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])  # the filler too
        trainer.compute_loss(trainer.model, batch).backward()
        grads.append({n: p.grad for n, p in trainer.model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("change", ["mask", "positions"])
def test_a_model_that_ignores_mask_or_positions_is_told(
    change: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = classifier(tiny_model)
    forward = model.model.forward
    given = {"mask": "attention_mask", "positions": "position_ids"}[change]
    monkeypatch.setattr(model.model, "forward", lambda *a, **k: forward(*a, **{**k, given: None}))
    with torch.no_grad():  # so that what is ignored makes a difference
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(40)
            layer.self_attn.o_proj.weight.mul_(40)
    assert not PairReader(model).agrees(model, 64)


def test_eager_attention_is_told_or_right(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "m", attn_implementation="eager")
    model = classifier(path)
    model.set_attn_implementation("eager")
    reader = PairReader(model)
    if reader.agrees(model, 64):
        with torch.no_grad():
            packed = reader(model, pack(*SIDES, pad_id=1))
            alone = [torch.cat([read_out(model, padded([row], 1)) for row in side]) for side in SIDES]
        torch.testing.assert_close(torch.stack(packed), torch.stack(alone), rtol=1e-5, atol=1e-6)


def test_a_window_of_attention_must_hold_a_row(tmp_path: Path) -> None:
    """A mask takes the place of Mistral's sliding window."""
    from transformers import MistralConfig, MistralForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MistralConfig(
        vocab_size=100, num_key_value_heads=2, sliding_window=20, num_labels=1, pad_token_id=1, **sizes
    )
    MistralForSequenceClassification(config).save_pretrained(tmp_path)
    model = classifier(tmp_path)
    assert PairReader(model).agrees(model, 20)
    assert not PairReader(model).agrees(model, 21)
