"""Matching hidden states and attention, across sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import build_tiny_model

from tuneutils.shared.supervise import IGNORE
from tuneutils.tools.distill.match import Matcher, drop_projections

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

IDS = torch.randint(4, 380, (2, 9), generator=torch.Generator().manual_seed(0))
LABELS = IDS.clone()
LABELS[:, :3] = IGNORE
KEPT = (LABELS != IGNORE)[:, 1:]


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def matched(student: Any, teacher: Any, pairs: list[int], hidden: float, attention: float) -> Tensor:
    matcher = Matcher(student, teacher, pairs, hidden_weight=hidden, attention_weight=attention)
    with matcher.watching():
        with torch.no_grad():
            teacher(input_ids=IDS)
        student(input_ids=IDS)
    return matcher.loss(LABELS)


@pytest.fixture
def narrow(tmp_path: Path) -> Any:
    path = build_tiny_model(
        tmp_path / "narrow", seed=3, hidden_size=24, num_attention_heads=3, num_key_value_heads=1
    )
    return load(path)


def test_equals_lose_nothing(teacher: Path) -> None:
    assert matched(load(teacher), load(teacher), [0, 1, 2, 3], 1.0, 1.0).item() == 0


def test_losses_are_those_of_the_models_own_outputs(teacher: Path, tmp_path: Path) -> None:
    """Against the hidden states and attention that transformers itself gives out."""
    big, small = load(teacher), load(build_tiny_model(tmp_path / "small", seed=5))
    pairs = [1, 3]
    with torch.no_grad():
        theirs, ours = (
            m(input_ids=IDS, output_hidden_states=True, output_attentions=True) for m in (big, small)
        )
        last = big.model.layers[3].register_forward_hook(lambda _m, _a, out: setattr(big, "raw", out))
        last_small = small.model.layers[1].register_forward_hook(
            lambda _m, _a, out: setattr(small, "raw", out)
        )
        big(input_ids=IDS)
        small(input_ids=IDS)
        last.remove()
        last_small.remove()
    hidden = [(ours.hidden_states[1], theirs.hidden_states[2]), (small.raw, big.raw)]
    expected = sum(
        (((a - b)[:, :-1][KEPT] ** 2).sum(-1) / (b[:, :-1][KEPT] ** 2).sum(-1)).sum() for a, b in hidden
    )
    torch.testing.assert_close(
        matched(small, big, pairs, 2.0, 0.0), torch.as_tensor(expected)
    )  # 2 / 2 layers
    attention = 0.0
    for a, b in ((ours.attentions[0], theirs.attentions[1]), (ours.attentions[1], theirs.attentions[3])):
        for row, position in KEPT.nonzero().tolist():
            seen = position + 1
            p, q = b[row, :, position, :seen], a[row, :, position, :seen]
            attention += F.kl_div(q.log(), p, reduction="sum") / 4  # heads
    torch.testing.assert_close(matched(small, big, pairs, 0.0, 2.0), torch.as_tensor(attention))


def test_projections_are_learned_where_sizes_differ(teacher: Path, narrow: Any) -> None:
    loss = matched(narrow, load(teacher), [1, 3], 1.0, 1.0)
    loss.backward()
    named = dict(narrow.distill_projections.named_parameters())
    assert {n: tuple(p.shape) for n, p in named.items()} == {
        "hidden.0.weight": (32, 24),
        "hidden.1.weight": (32, 24),
        "heads.0": (4, 3),
        "heads.1": (4, 3),
    }
    assert all(p.grad is not None and p.grad.any() for p in named.values())
    assert narrow.model.layers[0].mlp.up_proj.weight.grad.any()
    drop_projections(narrow)
    assert not any("distill" in name for name, _ in narrow.named_parameters())


def test_the_best_linear_map_leaves_nothing(teacher: Path, narrow: Any) -> None:
    """Twelve tokens of 24 columns: least squares finds a map that is exact."""
    big = load(teacher)
    matcher = Matcher(narrow, big, [3], hidden_weight=1.0, attention_weight=0.0)
    seen: list[Tensor] = []
    for model, layer in ((narrow, 0), (big, 3)):
        handle = model.model.layers[layer].register_forward_hook(lambda _m, _a, out: seen.append(out))
        with torch.no_grad():
            model(input_ids=IDS)
        handle.remove()
    ours, theirs = (x[:, :-1][KEPT].double() for x in seen)
    best = torch.linalg.lstsq(ours, theirs, driver="gelsd").solution
    with torch.no_grad():
        matcher.projections.hidden[0].weight.copy_(best.T)
        with matcher.watching():
            big(input_ids=IDS)
            narrow(input_ids=IDS)
        assert matcher.loss(LABELS).item() < 1e-4
