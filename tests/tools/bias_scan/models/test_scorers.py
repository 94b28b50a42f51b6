"""Log-probabilities of tokens against plain forward passes, one text and one mask at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tuneutils.shared.errors import ToolError

from .conftest import SENTENCES, build_masked, scorer


def brute_causal(scorer: Any, head: list[int], rest: list[int]) -> list[float]:
    ids = torch.tensor([head + rest])
    with torch.no_grad():
        logprobs = scorer.loaded.model(input_ids=ids).logits[0].double().log_softmax(-1)
    return [float(logprobs[i - 1, ids[0, i]]) for i in range(len(head), ids.shape[1])]


def brute_masked(scorer: Any, ids: list[int], at: int) -> float:
    given = torch.tensor([ids])
    given[0, at] = scorer.loaded.tokenizer.mask_token_id
    with torch.no_grad():
        return float(scorer.loaded.model(input_ids=given).logits[0, at].double().log_softmax(-1)[ids[at]])


def test_texts_of_a_causal_model(causal: Any) -> None:
    tokenizer = causal.loaded.tokenizer
    for text, found in zip(SENTENCES, causal.texts(SENTENCES), strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert list(found.ids) == ids
        np.testing.assert_allclose(
            found.logprobs, brute_causal(causal, [tokenizer.bos_token_id], ids), atol=1e-4
        )


def test_continuations_of_a_causal_model(causal: Any) -> None:
    tokenizer = causal.loaded.tokenizer
    pairs = [("The early bird", " catches the worm."), ("Measure twice", " and cut once.")]
    for (context, rest), found in zip(pairs, causal.continuations(pairs), strict=True):
        head = tokenizer.encode(context)
        whole = tokenizer.encode(context + rest)
        expected = brute_causal(causal, whole[: len(head)], whole[len(head) :])
        np.testing.assert_allclose(found.logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("architecture", ["Bert", "Roberta", "DistilBert"])
def test_pseudo_logprobs_of_a_masked_model(tmp_path: Path, architecture: str) -> None:
    masked = scorer(build_masked(tmp_path / "m", architecture=architecture))
    assert masked.kind == "masked"
    for text, found in zip(SENTENCES, masked.texts(SENTENCES), strict=True):
        ids = masked.loaded.tokenizer(text)["input_ids"]
        assert list(found.ids) == ids[1:-1]
        expected = [brute_masked(masked, ids, at) for at in range(1, len(ids) - 1)]
        np.testing.assert_allclose(found.logprobs, expected, atol=1e-4)


def test_continuations_of_a_masked_model(masked: Any) -> None:
    (found,) = masked.continuations([("The doctor said that she", " was not kind.")])
    ids = masked.loaded.tokenizer("The doctor said that she was not kind.")["input_ids"]
    tail = masked.loaded.tokenizer(" was not kind.", add_special_tokens=False)["input_ids"]
    places = range(len(ids) - 1 - len(tail), len(ids) - 1)
    assert list(found.ids) == tail
    np.testing.assert_allclose(found.logprobs, [brute_masked(masked, ids, at) for at in places], atol=1e-4)


def test_vectors(causal: Any, masked: Any) -> None:
    """The last layer at a causal model's last token, at a masked one's first."""
    for model, place in ((causal, -1), (masked, 0)):
        found = model.vectors(SENTENCES)
        for text, vector in zip(SENTENCES, found, strict=True):
            tokenizer = model.loaded.tokenizer
            ids = tokenizer.encode(text)
            if model is causal:
                ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
            with torch.no_grad():
                states = model.loaded.model(
                    input_ids=torch.tensor([ids]), output_hidden_states=True
                ).hidden_states
            np.testing.assert_allclose(vector, states[-1][0, place].numpy(), atol=1e-4)


def test_a_text_that_is_too_long(causal: Any, masked: Any) -> None:
    for model, limit in ((causal, 128), (masked, 64)):
        with pytest.raises(ToolError, match=f"longer than the model's {limit}: 'he said"):
            model.texts(["he said " * 100])
