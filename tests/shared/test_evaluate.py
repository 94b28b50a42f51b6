"""Intervals against theory and simulation; scores against full logits in double precision."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import PROVERBS, tiny_records

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip

from tuneutils.shared.evaluate import (
    distinct_n,
    encode_pair,
    paired_difference,
    ratio_estimate,
    score_windows,
)
from tuneutils.shared.evaluate_model import (
    context_length,
    continuation_scores,
    cut_windows,
    perplexity_items,
    pick,
    record_sequence,
    score_sequences,
    text_sequence,
)
from tuneutils.shared.models import Loaded, load_model
from tuneutils.shared.supervise import Encoded, encode


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> Loaded:
    return load_model(str(tiny_model), device="cpu", dtype=torch.float64)


def full_logprobs(loaded: Loaded, ids: list[int]) -> torch.Tensor:
    """``(T - 1, V)``: row ``t`` is the distribution of token ``t + 1``."""
    with torch.no_grad():
        return loaded.model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)


def test_bootstrap_interval_of_a_mean_covers_it_95_percent_of_the_time() -> None:
    rng = np.random.default_rng(7)
    hits = 0
    for i in range(500):
        found = ratio_estimate(rng.normal(3.0, 2.0, 80), seed=i, resamples=400)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 3.0 <= found.high
    assert 0.91 <= hits / 500 <= 0.98


def test_interval_of_a_ratio_agrees_with_the_delta_method() -> None:
    rng = np.random.default_rng(1)
    size = rng.integers(5, 60, 2000).astype(float)
    total = 2.5 * size + rng.normal(0, 4, 2000)
    found = ratio_estimate(total, size, transform=np.exp)
    ratio = total.sum() / size.sum()
    error = np.sqrt(((total - ratio * size) ** 2).sum()) / size.sum()
    assert found.value == pytest.approx(math.exp(ratio), rel=1e-12)
    assert found.low == pytest.approx(math.exp(ratio - 1.96 * error), rel=2e-3)
    assert found.high == pytest.approx(math.exp(ratio + 1.96 * error), rel=2e-3)


def test_paired_difference_has_the_interval_of_the_differences() -> None:
    rng = np.random.default_rng(2)
    difficulty = rng.normal(0, 10, 1500)
    a, b = difficulty + rng.normal(0.3, 1, 1500), difficulty + rng.normal(0, 1, 1500)
    found = paired_difference(a, b)
    error = (a - b).std(ddof=1) / math.sqrt(1500)
    assert found.value == pytest.approx((a - b).mean(), rel=1e-12)
    assert found.low == pytest.approx((a - b).mean() - 1.96 * error, abs=0.05 * error * 2)
    assert found.high == pytest.approx((a - b).mean() + 1.96 * error, abs=0.05 * error * 2)


def test_repeated_items_in_clusters_do_not_narrow_the_interval() -> None:
    values = np.random.default_rng(3).normal(0, 1, 50)
    once = ratio_estimate(values)
    repeated = ratio_estimate(np.repeat(values, 9), clusters=np.repeat(np.arange(50), 9).tolist())
    assert (repeated.low, repeated.high) == pytest.approx((once.low, once.high))
    assert (repeated.n, repeated.clusters) == (450, 50)


def test_estimates_repeat_with_the_seed_and_change_with_it() -> None:
    values = np.random.default_rng(3).normal(0, 1, 50)
    assert ratio_estimate(values, seed=1) == ratio_estimate(values, seed=1)
    assert ratio_estimate(values, seed=1) != ratio_estimate(values, seed=2)


def test_one_item_has_no_interval_and_none_has_no_estimate() -> None:
    assert ratio_estimate([2.0]).low is None
    with pytest.raises(ValueError, match="no items"):
        ratio_estimate([])
    with pytest.raises(ValueError, match="equally many"):
        paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="sums to zero"):
        ratio_estimate([1.0, 2.0], [0.0, 0.0])


@pytest.mark.parametrize("length", [2, 5, 8, 9, 10, 25, 26])
@pytest.mark.parametrize(("longest", "stride"), [(8, 8), (8, 3), (8, 1), (1, 1)])
def test_windows_score_every_token_once_with_all_the_context_that_fits(
    length: int, longest: int, stride: int
) -> None:
    scored = []
    for i, (start, first, end) in enumerate(score_windows(length, longest, stride)):
        assert end - 1 - start <= longest
        assert start < first < end
        assert start == 0 or end - 1 - start == longest
        assert end - first <= (longest if i == 0 else stride)
        scored += list(range(first, end))
    assert scored == list(range(1, length))


def test_perplexity_items_equal_a_direct_computation(loaded: Loaded) -> None:
    sequences = [record_sequence(r, loaded.tokenizer) for r in tiny_records("text")]
    items = perplexity_items(loaded, sequences, max_length=100)
    for item, record in zip(items, tiny_records("text"), strict=True):
        ids = loaded.tokenizer.encode(record["text"], add_special_tokens=False)
        rows = full_logprobs(loaded, [loaded.tokenizer.bos_token_id, *ids])
        wanted = -rows[range(len(ids)), ids].sum().item()
        assert item["nll"] == pytest.approx(wanted, rel=1e-10)
        assert (item["tokens"], item["bytes"]) == (len(ids), len(record["text"].encode()))


@pytest.mark.parametrize("kind", ["prompt-completion", "messages"])
def test_completions_are_scored_as_training_sees_them(loaded: Loaded, kind: str) -> None:
    record = tiny_records(kind)[6]
    encoded = encode(record, loaded.tokenizer)
    (item,) = perplexity_items(loaded, [record_sequence(record, loaded.tokenizer)], max_length=127)
    rows = full_logprobs(loaded, encoded.input_ids)
    labels = encoded.labels[1:]
    wanted = -sum(rows[t, label].item() for t, label in enumerate(labels) if label >= 0)
    assert item["nll"] == pytest.approx(wanted, rel=1e-10)
    answer = record["completion"] if kind == "prompt-completion" else record["messages"][-1]["content"]
    assert item["bytes"] == len(answer.encode())
    assert item["tokens"] == len(loaded.tokenizer(answer, add_special_tokens=False).input_ids) + 1  # EOS


def test_a_uniform_model_has_the_bits_per_byte_of_its_vocabulary(tiny_model: Path) -> None:
    uniform = load_model(str(tiny_model), device="cpu", dtype="float32")
    torch.nn.init.zeros_(uniform.model.lm_head.weight)
    texts = [text_sequence(p, uniform.tokenizer) for p in PROVERBS]
    sizes = [len(p.encode()) for p in PROVERBS]
    items = perplexity_items(uniform, list(zip(texts, sizes, strict=True)), max_length=100)
    tokens = sum(len(t) - 1 for t in texts)
    bits = sum(i["nll"] for i in items) / math.log(2) / sum(sizes)
    assert bits == pytest.approx(math.log2(384) * tokens / sum(sizes), rel=1e-6)


@pytest.mark.parametrize("stride", [16, 5])
def test_texts_longer_than_the_context_are_scored_in_windows(loaded: Loaded, stride: int) -> None:
    text = " ".join(PROVERBS)
    sequence = text_sequence(text, loaded.tokenizer)
    (item,) = perplexity_items(loaded, [(sequence, len(text.encode()))], max_length=16, stride=stride)
    ids, wanted, done = sequence.input_ids, 0.0, 1
    while done < len(ids):  # one forward pass a window, cut by hand
        end = min(len(ids), done + (16 if done == 1 else stride))
        start = max(0, end - 17)
        rows = full_logprobs(loaded, ids[start:end])
        wanted -= sum(rows[t - start - 1, ids[t]].item() for t in range(done, end))
        done = end
    assert item["nll"] == pytest.approx(wanted, rel=1e-10)
    assert item["tokens"] == len(ids) - 1


def test_windows_keep_the_labels_of_a_long_completion() -> None:
    sequence = Encoded(list(range(40)), [-100] * 20 + list(range(20, 40)))
    pieces = cut_windows(sequence, 8, 8)
    assert [label for p in pieces for label in p.labels if label >= 0] == list(range(20, 40))
    assert all(label in (-100, token) for p in pieces for token, label in zip(p.input_ids, p.labels))


def test_scores_do_not_depend_on_the_batch(tiny_model: Path) -> None:
    loaded = load_model(str(tiny_model), device="cpu", dtype="float32")
    sequences = [text_sequence(p, loaded.tokenizer) for p in PROVERBS]
    alone = score_sequences(loaded, sequences, batch_tokens=1)
    together = score_sequences(loaded, sequences, batch_tokens=100_000, greedy=True)
    for a, b in zip(alone, together, strict=True):
        assert a.logprob == pytest.approx(b.logprob, rel=1e-5)
        assert a.tokens == b.tokens


def brute_force(loaded: Loaded, context: list[int], rest: list[int]) -> tuple[float, bool]:
    rows = full_logprobs(loaded, context + rest)[-len(rest) :]
    return sum(rows[t, token].item() for t, token in enumerate(rest)), rows.argmax(-1).tolist() == rest


def test_continuations_equal_brute_force(loaded: Loaded) -> None:
    tokenizer = loaded.tokenizer
    pairs = [(p[:cut], p[cut:]) for p in PROVERBS for cut in (6, 11)]
    # the greedy continuation of the model itself, so that both answers of ``greedy`` occur
    ids = tokenizer.encode("A bird")
    for _ in range(3):
        with torch.no_grad():
            ids.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
    scores = continuation_scores(loaded, pairs, max_length=100, greedy=True)
    for (context, rest), score in zip(pairs, scores, strict=True):
        logprob, is_greedy = brute_force(loaded, *encode_pair(tokenizer, context, rest))
        assert score.logprob == pytest.approx(logprob, rel=1e-10)
        assert score.greedy == is_greedy
    labels = [-100] * (len(ids) - 3) + ids[-3:]
    (own,) = score_sequences(loaded, [Encoded(ids, labels)], greedy=True)
    assert own.greedy
    assert own.logprob == pytest.approx(brute_force(loaded, ids[:-3], ids[-3:])[0], rel=1e-10)


def test_a_context_too_long_is_cut_from_the_left(loaded: Loaded) -> None:
    context, rest = " ".join(PROVERBS), " said the apple"
    (score,) = continuation_scores(loaded, [(context, rest)], max_length=12)
    head, tail = encode_pair(loaded.tokenizer, context, rest)
    assert score.logprob == pytest.approx(brute_force(loaded, (head + tail)[-13 : -len(tail)], tail)[0])
    with pytest.raises(ValueError, match="longer than the context of 12"):
        continuation_scores(loaded, [("A", context)], max_length=12)


def test_spaces_between_context_and_continuation_belong_to_the_continuation(loaded: Loaded) -> None:
    tokenizer = loaded.tokenizer
    assert encode_pair(tokenizer, "The early  ", "bird") == encode_pair(tokenizer, "The early", "  bird")
    head, rest = encode_pair(tokenizer, "The early", " bird")
    assert tokenizer.decode(head) == "The early"
    assert tokenizer.decode(rest) == " bird"


def test_an_empty_context_is_the_prefix_token(loaded: Loaded) -> None:
    ids = loaded.tokenizer.encode("bird", add_special_tokens=False)
    assert encode_pair(loaded.tokenizer, "", "bird") == ([loaded.tokenizer.bos_token_id], ids)
    spaced = loaded.tokenizer.encode("  bird", add_special_tokens=False)
    assert encode_pair(loaded.tokenizer, "  ", "bird") == ([loaded.tokenizer.bos_token_id], spaced)
    with pytest.raises(ValueError, match="no token"):
        encode_pair(loaded.tokenizer, "bird", "")


def test_choices_are_picked_raw_per_character_and_per_byte() -> None:
    picked = pick([-4.0, -6.0, -7.0], ["ab", "abcd", "東京の中"])
    assert picked == {"acc": 0, "acc_norm": 1, "acc_bytes": 2}  # 2/4/4 characters, 2/4/12 bytes
    assert pick([-1.0, -1.0], ["a", "b"])["acc"] == 0


def test_virtual_tokens_take_their_part_of_the_context(tiny_model: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    loaded = load_model(str(tiny_model), device="cpu", dtype="float32")
    assert context_length(loaded.model) == 128
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=10)
    tuned: Any = get_peft_model(loaded.model, config)
    assert context_length(tuned) == 118
    scored = score_sequences(replace(loaded, model=tuned), [text_sequence(PROVERBS[0], loaded.tokenizer)])
    assert math.isfinite(scored[0].logprob)


def test_a_record_without_text_to_score_is_refused(loaded: Loaded) -> None:
    with pytest.raises(ValueError, match="no text to score"):
        record_sequence({"prompt": "Say nothing.", "completion": ""}, loaded.tokenizer)


def test_distinct_n_counts_different_ngrams() -> None:
    assert distinct_n([1, 2, 1, 2, 1], 2) == 2 / 4
    assert distinct_n([1, 2, 3], 1) == 1
    assert distinct_n([], 1) == 1
