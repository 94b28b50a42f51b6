"""Documents packed into a row learn what they would alone: losses and gradients by plain Transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tuneutils.shared import device  # noqa: F401

import torch  # isort: skip
from transformers import AutoModelForCausalLM

from tuneutils.shared.adapters.fused_lora import fused
from tuneutils.tools.cpt_run.documents import Piece
from tuneutils.tools.cpt_run.trainer import collate, hides_documents, row_nll


def pieces(lengths: list[int]) -> list[Piece]:
    rng = np.random.default_rng(0)
    made = []
    for length in lengths:
        ids = rng.integers(4, 380, length).astype(np.int32)
        labels = ids.copy()
        labels[0] = -100
        made.append(Piece(ids, labels))
    return made


@pytest.mark.parametrize("with_fused", [False, True])
def test_a_packed_row_is_its_documents(tiny_model: Path, with_fused: bool) -> None:
    rows = [pieces([9, 1, 17, 4]), pieces([30]), []]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)

    alone = torch.zeros((), dtype=torch.float64)
    for piece in (p for row in rows for p in row if len(p.ids) > 1):
        ids = torch.from_numpy(piece.ids).long()[None]
        alone = alone + model(ids, labels=ids).loss.double() * (len(piece.ids) - 1)
    alone.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()

    batch = collate(rows, pad_id=1)
    assert batch["input_ids"].shape == (3, 31)
    where = torch.device("cuda" if not with_fused else "cpu")  # elsewhere nothing is replaced
    with fused(model, where, causal_masks=True, learning_norms=True):
        packed = row_nll(model, batch, packed=True)
        packed.backward()
    assert packed.item() == pytest.approx(alone.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_a_model_that_ignores_positions_is_found_out(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert hides_documents(model, torch.device("cpu"))
    forward = type(model).forward

    class Leaky(type(model)):  # type: ignore[misc]
        def forward(self, *args, position_ids=None, **kwargs):  # type: ignore[no-untyped-def]
            return forward(self, *args, **kwargs)

    model.__class__ = Leaky
    assert not hides_documents(model, torch.device("cpu"))
