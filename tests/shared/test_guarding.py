"""Watching an exchange: pooling, streaming against whole, stopping, refusing another model, masking."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneutils.shared import pii
from tuneutils.shared.errors import ToolError
from tuneutils.shared.guarding import (
    EMA_ALPHA,
    POOLINGS,
    Guard,
    Masker,
    Settings,
    StreamingGuard,
    Watch,
    decoder_layers,
    hidden_states,
    load_guard,
    pooled,
    project,
    read_guard,
    save_guard,
    sigmoid,
)
from tuneutils.shared.models import Loaded, load_model
from tuneutils.shared.ngrams import BUCKETS
from tuneutils.shared.sample import Sampling, generate

PROMPTS = ["Say proverb 1.", "How do I kill a Python process?", "Many hands", "x", "The early bird"]


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> Loaded:
    return load_model(str(tiny_model), device="cpu", dtype="float32")


def make_guard(hidden: int = 32, seed: int = 0, **changes: Any) -> Guard:
    """A random guard that raises everything and flags nothing, unless told otherwise."""
    generator = torch.Generator().manual_seed(seed)
    fields: dict[str, Any] = {
        "layer": 2,
        "pooling": "mean",
        "categories": ("a", "b"),
        "raise_above": -1e9,
        "flag_above": 1e9,
        "probe_scale": (1.0, 0.0),
        "joint": (0.1, 1.0, 0.5),
        "text_bias": 0.2,
        "bias": -0.1,
        "template": "auto",
        "max_length": 128,
        "budget": 0.05,
        **changes,
    }
    rows = 2 if fields["pooling"] == "prompt-mean" else 1
    return Guard(
        Settings(**fields),
        torch.randn(rows, hidden, generator=generator),
        torch.randn(2, hidden, generator=generator),
        np.array([0.1, -0.1]),
        torch.randn(BUCKETS, generator=generator).numpy(),
    )


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_token_by_token(pooling: str) -> None:
    """Each against its definition, and the running sums against the whole."""
    rng = np.random.default_rng(0)
    rows = 2 if pooling == "prompt-mean" else 1
    values = rng.normal(size=(12, rows + 2))
    guard = make_guard(pooling=pooling)
    watch = Watch(guard, "p")
    for row in values:
        watch.see(row.tolist(), lambda: "")
    expected = []
    for t in range(12):
        so_far = values[: t + 1]
        if pooling == "last":
            expected.append(so_far[-1, 0])
        elif pooling == "mean":
            expected.append(so_far[:, 0].mean())
        elif pooling == "prompt-mean":
            expected.append(values[0, 0] + so_far[:, 1].mean())
        else:
            weights = [EMA_ALPHA * (1 - EMA_ALPHA) ** (t - i) for i in range(t + 1)]
            weights[0] = (1 - EMA_ALPHA) ** t
            assert sum(weights) == pytest.approx(1)
            expected.append(np.dot(weights, so_far[:, 0]))
    np.testing.assert_allclose(watch.logits, np.array(expected) + guard.settings.bias, atol=1e-12)
    np.testing.assert_allclose(pooled(values, pooling), expected, atol=1e-12)


@pytest.mark.parametrize("layer", [1, 2])
def test_hidden_states_are_what_transformers_says(loaded: Loaded, layer: int) -> None:
    rows = [[5, 6, 7, 8, 9], [10, 11]]
    found = hidden_states(loaded, rows, [layer])[layer]
    for row, states in zip(rows, found, strict=True):
        output = loaded.model(input_ids=torch.tensor([row]), output_hidden_states=True)
        if layer < 2:  # what Transformers gives for the last block is after the final norm
            torch.testing.assert_close(states, output.hidden_states[layer][0], atol=1e-5, rtol=1e-5)
        else:
            normed = loaded.model.model.norm(states)
            torch.testing.assert_close(normed, output.hidden_states[layer][0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_streaming_scores_equal_those_of_the_whole(loaded: Loaded, pooling: str, batch_size: int) -> None:
    hooks = [len(b._forward_hooks) for b in decoder_layers(loaded.model)]
    guard = make_guard(pooling=pooling)
    ids = [loaded.tokenizer(p).input_ids for p in PROMPTS]
    sampling = Sampling(max_new_tokens=12, stop_token_ids=(7, 8, 9, 10, 11, 12, 13), seed=3)
    with StreamingGuard(guard, loaded, PROMPTS) as watching:
        made = generate(loaded.model, ids, sampling, batch_size=batch_size, pad_token_id=1, on_token=watching)
    plain = generate(loaded.model, ids, sampling, batch_size=batch_size, pad_token_id=1)
    assert made == plain  # a guard that flags nothing changes nothing
    for watch, prompt, completion in zip(watching.watches, ids, made, strict=True):
        whole = [*prompt, *completion.token_ids[:-1]]  # the last token is never fed to the model
        states = hidden_states(loaded, [whole], [2])[2][0][len(prompt) - 1 :]
        expected = pooled(project(guard, states)[:, : len(guard.probe)].numpy(), pooling)
        np.testing.assert_allclose(watch.logits, expected + guard.settings.bias, atol=1e-4)
    assert [len(b._forward_hooks) for b in decoder_layers(loaded.model)] == hooks


def test_a_reply_that_turns_is_stopped_before_the_next_token(loaded: Loaded) -> None:
    """The threshold is put between two scores of one reply: it must end just there, the others go on."""
    ids = [loaded.tokenizer(p).input_ids for p in PROMPTS]
    sampling = Sampling(max_new_tokens=20, seed=5)
    free = make_guard(pooling="last", every=1)
    with StreamingGuard(free, loaded, PROMPTS) as watching:
        plain = generate(loaded.model, ids, sampling, batch_size=5, pad_token_id=1, on_token=watching)
    joint: list[list[float]] = []
    for watch, completion in zip(watching.watches, plain, strict=True):
        words = [
            loaded.tokenizer.decode(
                completion.token_ids[:t], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            for t in range(20)
        ]
        joint.append(
            [
                free.joint_logit(z, {"prompt": watch.prompt, "reply": w})
                for z, w in zip(watch.logits, words, strict=True)
            ]
        )
    row = next(i for i, values in enumerate(joint) if int(np.argmax(values)) >= 3)
    at = int(np.argmax(joint[row]))
    highest_before = max(joint[row][:at])
    limit = (highest_before + joint[row][at]) / 2
    guard = make_guard(pooling="last", every=1, flag_above=limit)
    passed: list[tuple[int, int]] = []
    with StreamingGuard(guard, loaded, PROMPTS, on_token=lambda i, t: passed.append((i, t))) as watching:
        made = generate(loaded.model, ids, sampling, batch_size=5, pad_token_id=1, on_token=watching)
    assert (made[row].token_ids, made[row].finish_reason) == (plain[row].token_ids[:at], "interrupted")
    verdict = watching.verdicts()[row]
    assert (verdict.flagged, verdict.layer, verdict.at) == (True, "exchange", at)
    assert verdict.score == pytest.approx(sigmoid(joint[row][at]), abs=1e-4)
    for i, values in enumerate(joint):
        expected = next((t for t, v in enumerate(values) if v > limit), 20)
        assert made[i].token_ids == plain[i].token_ids[:expected]
        assert [t for j, t in passed if j == i] == made[i].token_ids


def test_the_second_layer_is_asked_only_where_the_first_rises() -> None:
    asked: list[int] = []
    guard = make_guard(pooling="last", raise_above=1.0, bias=0.0, every=4)
    watch = Watch(guard, "p")
    levels = [0, 0, 2, 2, 2, 2, 2, 0, 0, 2, 2, 0, 2]

    for t, level in enumerate(levels):

        def text(t: int = t) -> str:
            asked.append(t)
            return "x"

        watch.see([level, 0, 0], text)
    assert asked == [2, 6, 10]  # at once when it rises, then not for four tokens
    quiet = Watch(guard, "p")
    for _ in range(5):
        quiet.see([0.5, 0, 0], lambda: pytest.fail("asked"))
    verdict = quiet.finish("whatever")
    assert (verdict.layer, verdict.flagged, verdict.score) == ("probe", False, pytest.approx(sigmoid(0.5)))


def test_saved_and_read_again(tmp_path: Path) -> None:
    guard = make_guard(pooling="prompt-mean")
    save_guard(guard, tmp_path)
    again = read_guard(tmp_path)
    assert again.settings == guard.settings
    assert torch.equal(again.directions, guard.directions)
    assert np.array_equal(again.text, guard.text)
    assert again.joint_logit(0.3, {"prompt": "a"}) == guard.joint_logit(0.3, {"prompt": "a"})


@pytest.mark.parametrize("damage", ["settings", "weights", "format", "absent"])
def test_a_damaged_guard_is_refused(tmp_path: Path, damage: str) -> None:
    save_guard(make_guard(), tmp_path)
    if damage == "settings":
        (tmp_path / "guard.json").write_text("{")
    elif damage == "weights":
        (tmp_path / "guard.safetensors").write_bytes(b"nothing")
    elif damage == "format":
        text = json.loads((tmp_path / "guard.json").read_text())
        (tmp_path / "guard.json").write_text(json.dumps({**text, "format": 99}))
    else:
        (tmp_path / "guard.safetensors").unlink()
    with pytest.raises(ToolError, match="format 99" if damage == "format" else "damaged guard"):
        read_guard(tmp_path)


def test_what_is_no_guard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="no such file"):
        load_guard(str(tmp_path))


NUMBERS = ["4111 1111 1111 1111", "GB29 NWBK 6016 1331 9268 19", "+44 20 7946 0018", "ada@example.org"]
WORDS = [*NUMBERS, "5555555555554444", "Hello,", "42", "GB", "(", "ok.\n", "212-555-0123", "8.8.8.8", "AB12"]


@settings(deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=8), st.integers(0, 2**32))
def test_masked_in_pieces_is_masked_whole(words: list[str], seed: int) -> None:
    text = " ".join(words)
    rng, masker, at, out = random.Random(seed), Masker(), 0, ""
    while at < len(text):
        step = rng.randint(1, 9)
        out += masker.feed(text[at : at + step])
        at += step
    assert out + masker.finish() == pii.mask(text)[0]


@pytest.mark.parametrize("number", NUMBERS)
def test_no_digit_of_it_slips_through(number: str) -> None:
    masker, out = Masker(), ""
    for character in f"It is {number} indeed":
        out += masker.feed(character)
        assert not any(c.isdigit() or c == "@" for c in out)
    assert (out + masker.finish()).startswith("It is [")


def test_ordinary_text_comes_word_by_word() -> None:
    masker = Masker()
    assert masker.feed("The quick brown") == "The quick "
    assert masker.feed(" fox jumps.") == "brown fox "
    assert masker.finish() == "jumps."
