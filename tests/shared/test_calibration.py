"""Calibration rows: whole, seeded, and refused when there is too little or the wrong kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import PROVERBS, tiny_records, tiny_tokenizer, write_jsonl

from tuneutils.shared.calibration import calibration_ids
from tuneutils.shared.errors import ToolError


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "text.jsonl", [{"text": p} for p in PROVERBS * 4])


def test_rows_have_the_asked_shape_and_hold_the_texts(texts: Path, tokenizer) -> None:
    ids = calibration_ids([texts], tokenizer, rows=6, length=16)
    assert (ids.shape, ids.dtype) == ((6, 16), torch.int64)
    closed = "".join(p + tokenizer.eos_token for p in PROVERBS)
    pieces = {tokenizer.decode(row).split(tokenizer.eos_token)[0] for row in ids}
    assert all(piece in closed for piece in pieces)


def test_the_seed_decides(texts: Path, tokenizer) -> None:
    first, again, other = (calibration_ids([texts], tokenizer, rows=6, length=16, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", ["messages", "prompt-completion"])
def test_records_that_training_takes(kind: str, tmp_path: Path, tokenizer) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", tiny_records(kind))
    assert calibration_ids([path], tokenizer, rows=2, length=16).shape == (2, 16)


def test_too_short(texts: Path, tokenizer) -> None:
    total = sum(len(tokenizer(p).input_ids) + 1 for p in PROVERBS * 4)
    with pytest.raises(
        ToolError, match=rf"{total} tokens are too few .* 1000 rows of 16; .*rows {total // 16}"
    ):
        calibration_ids([texts], tokenizer, rows=1000, length=16)
    with pytest.raises(ToolError, match=f"length of at most {total}"):
        calibration_ids([texts], tokenizer, rows=1, length=total + 1)


def test_wrong_kind(tmp_path: Path, tokenizer) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", tiny_records("parallel"))
    with pytest.raises(ToolError, match=r"p\.jsonl:1: needs the fields"):
        calibration_ids([path], tokenizer, rows=1, length=4)
