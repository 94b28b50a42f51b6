"""Tokens, MinHash, DSIR and repeats against brute force and the published formulas."""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from tuneutils.shared.neardup import band_keys, near_duplicates, similar_pairs
from tuneutils.tools.corpus_build import dsir
from tuneutils.tools.corpus_build.contamination import benchmark_grams, contaminated
from tuneutils.tools.corpus_build.substrings import repeated_spans, without
from tuneutils.tools.corpus_build.tokens import shingles, tokenize, windows
from tuneutils.tools.corpus_build.vocabulary import log_odds

TEXTS = [
    "Hello, World! It's 3.14 o'clock...",
    "",
    "   \n\t ",
    "naïve Größe 東京 x_y — “quoted” İstanbul 😀!?",
    "A b A b a B",
]


@pytest.mark.parametrize("together", [True, False])
def test_tokens_are_those_of_wordpunct(together: bool) -> None:
    batches = [TEXTS] if together else [[t] for t in TEXTS]
    hashes: dict[str, int] = {}
    for batch in batches:
        tokens = tokenize(batch)
        for i, text in enumerate(batch):
            mine = slice(tokens.bounds[i], tokens.bounds[i + 1])
            spans = list(zip(tokens.start[mine], tokens.end[mine], strict=True))
            assert spans == [m.span() for m in re.finditer(r"\w+|[^\w\s]+", text)]
            for (a, b), value in zip(spans, tokens.hashes[mine].tolist(), strict=True):
                assert hashes.setdefault(text[a:b].lower(), value) == value
    assert len(set(hashes.values())) == len(hashes)


def test_windows_are_equal_where_their_words_are() -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcd", k=rng.randrange(0, 40))) for _ in range(60)]
    tokens = tokenize(texts).words()
    for size in (1, 2, 3, 5):
        grams, first = windows(tokens, size)
        wanted = [tuple(t.split()[i : i + size]) for t in texts for i in range(len(t.split()) - size + 1)]
        assert len(grams) == len(wanted) == len(first)
        by_hash = {}
        for gram, value in zip(wanted, grams.tolist(), strict=True):
            assert by_hash.setdefault(gram, value) == value
        assert len(set(by_hash.values())) == len(by_hash)


def shingle_set(text: str, size: int = 5) -> set[tuple[str, ...]]:
    parts = re.findall(r"\w+", text.lower())
    return {tuple(parts[i : i + size]) for i in range(max(len(parts) - size + 1, min(len(parts), 1)))}


def edited_texts(count: int = 120, versions: int = 6) -> list[str]:
    """Random texts, each with versions in which more and more words are others."""
    rng = random.Random(2)
    vocabulary = [f"w{i}" for i in range(4000)]
    made = []
    for _ in range(count):
        base = [rng.choice(vocabulary) for _ in range(rng.randrange(40, 300))]
        for version in range(versions):
            copy = base[:]
            for _ in range(version * 2):
                copy[rng.randrange(len(copy))] = rng.choice(vocabulary)
            made.append(" ".join(copy))
    rng.shuffle(made)
    return made


def test_near_duplicates_against_exact_jaccard() -> None:
    texts = edited_texts()
    sets = [shingle_set(t) for t in texts]
    true = {}
    for i in range(len(texts)):
        for j in range(i + 1, len(texts)):
            both = len(sets[i] & sets[j])
            if both and both / len(sets[i] | sets[j]) >= 0.8:
                true[i, j] = both / len(sets[i] | sets[j])
    grams, bounds = shingles(tokenize(texts).words(), 5)
    keys = band_keys(grams, bounds)
    hashed = [np.unique(grams[bounds[i] : bounds[i + 1]]) for i in range(len(texts))]
    found = similar_pairs(keys, hashed.__getitem__, 0.8)
    assert len(true) > 150
    assert set(found) <= set(true)
    assert len(found) >= 0.98 * len(true)
    assert found == pytest.approx({pair: true[pair] for pair in found})

    dropped = near_duplicates(keys, hashed.__getitem__, 0.8)
    for text, original in dropped.items():
        assert original < text
        assert original not in dropped
        assert true[original, text] >= 0.8
    kept = [i for i in range(len(texts)) if i not in dropped]
    left = [pair for pair in true if pair[0] in set(kept) and pair[1] in set(kept)]
    assert len(left) <= 0.02 * len(true)


def test_a_thousand_copies_cost_a_thousand_comparisons() -> None:
    texts = [TEXTS[0] + f" {i % 3}" for i in range(3000)]
    grams, bounds = shingles(tokenize(texts).words(), 5)
    calls = Counter[int]()

    def sets(i: int) -> np.ndarray:
        calls[i] += 1
        return np.unique(grams[bounds[i] : bounds[i + 1]])

    near_duplicates(band_keys(grams, bounds), sets, 0.5)
    assert sum(calls.values()) < 4 * len(texts)


def test_texts_without_words_are_nobodys_copies() -> None:
    grams, bounds = shingles(tokenize(["", "...", "!!", "one"]).words(), 5)
    assert bounds.tolist() == [0, 0, 0, 0, 1]
    keys = band_keys(grams, bounds)
    assert len(np.unique(keys)) == keys.size


def bucket(ngram: str) -> int:
    return int(hashlib.sha256(ngram.encode()).hexdigest(), 16) % 10_000


def test_dsir_is_the_formula_of_the_paper() -> None:
    raw = edited_texts(20, 2)
    target = ["court law judge, the court ruled", "judge and jury of the law " * 3]

    def counts(text: str) -> Counter[int]:
        parts = re.findall(r"\w+|[^\w\s]+", text.lower())
        return Counter([bucket(w) for w in parts] + [bucket(f"{a} {b}") for a, b in pairwise(parts)])

    p_raw, p_target = Counter[int](), Counter[int]()
    for text in raw:
        p_raw += counts(text)
    for text in target:
        p_target += counts(text)
    n_raw, n_target = sum(p_raw.values()), sum(p_target.values())

    def weight(text: str) -> float:
        return sum(
            n * (math.log(p_target[b] / n_target + 1e-8) - math.log(p_raw[b] / n_raw + 1e-8))
            for b, n in counts(text).items()
        )

    featurizer = dsir.Featurizer("sha256")
    features, bounds = featurizer(raw)
    ratio = dsir.log_ratio(dsir.target_counts([target], featurizer), dsir.bucket_counts(features))
    weights = dsir.log_weights(features, bounds, ratio)
    assert weights == pytest.approx([weight(t) for t in raw])

    noise = np.random.RandomState(7).gumbel(size=len(raw))
    best = sorted(range(len(raw)), key=lambda i: -(weight(raw[i]) + noise[i]))[:9]
    assert dsir.gumbel_top_k(weights, 9, 7).tolist() == sorted(best)
    assert dsir.gumbel_top_k(weights, len(raw), 7).tolist() == list(range(len(raw)))


def test_gumbel_top_k_draws_by_weight() -> None:
    """With one draw it is the softmax (Gumbel-max); 20,000 draws, four standard errors."""
    weights = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    drawn = Counter(int(dsir.gumbel_top_k(weights, 1, seed)[0]) for seed in range(20_000))
    for i, p in enumerate(np.exp(weights)):
        assert abs(drawn[i] / 20_000 - p) < 4 * math.sqrt(p * (1 - p) / 20_000)


def test_fast_features_count_each_unigram_and_bigram() -> None:
    texts = [*(t.replace("İ", "I") for t in TEXTS), *edited_texts(5, 1)]
    features, bounds = dsir.Featurizer()(texts)
    for i, text in enumerate(texts):
        parts = re.findall(r"\w+|[^\w\s]+", text.lower())
        assert bounds[i + 1] - bounds[i] == max(2 * len(parts) - 1, 0)
        alone, _ = dsir.Featurizer()([text])
        assert Counter(features[bounds[i] : bounds[i + 1]].tolist()) == Counter(alone.tolist())
        assert len(Counter(alone.tolist())) <= len(set(parts) | set(pairwise(parts)))


def test_repeats_equal_brute_force() -> None:
    rng = random.Random(5)
    shared = [f"s{i}" for i in range(60)]
    docs = [[f"d{i}_{j}" for j in range(rng.randrange(10, 80))] for i in range(30)]
    for doc in docs[::2]:
        at, start = rng.randrange(len(doc)), rng.randrange(20)
        doc[at:at] = shared[start : start + rng.randrange(5, 40)]
    size = 10
    seen: set[tuple[str, ...]] = set()
    wanted: list[set[int]] = []
    for doc in docs:
        covered: set[int] = set()
        for i in range(len(doc) - size + 1):
            gram = tuple(doc[i : i + size])
            if gram in seen:
                covered.update(range(i, i + size))
            seen.add(gram)
        wanted.append(covered)
    tokens = tokenize([" ".join(d) for d in docs]).words()
    spans = repeated_spans(tokens.hashes, tokens.bounds, range(len(docs)), size)
    found = [{w for a, b in spans.get(i, []) for w in range(a, b)} for i in range(len(docs))]
    assert found == wanted
    assert sum(map(bool, wanted)) > 5


def test_what_is_cut_is_cut_in_the_text() -> None:
    text = "Keep this, please. Cut these three words.\nAnd keep that."
    words = tokenize([text]).words()
    assert without(text, words, [(3, 7)]) == "Keep this, please.\nAnd keep that."
    assert without(text, words, [(0, 10)]) == ""
    assert without(text, words, [(0, 3), (7, 10)]) == "Cut these three words."


def test_contamination_needs_thirteen_words_in_a_row() -> None:
    question = " ".join(f"q{i}" for i in range(20))
    short = " ".join(f"s{i}" for i in range(8))
    grams = benchmark_grams([{"question": question, "options": [short, "too short to tell"]}])
    assert {size: len(g) for size, g in grams.items()} == {8: 1, 13: 8}
    texts = [
        "x " + " ".join(f"Q{i}," for i in range(3, 16)) + " y",
        " ".join(f"q{i}" for i in range(3, 15)),
        f"before {short} after",
        "too short to tell",
        "",
    ]
    assert contaminated(tokenize(texts).words(), grams).tolist() == [True, False, True, False, False]


def test_log_odds_of_monroe_colaresi_and_quinn() -> None:
    """By hand: y = (8, 2), (1, 9); prior .1 of both, alpha = (.9, 1.1)."""
    scores = dict(log_odds({"a": 8, "b": 2}, {"a": 1, "b": 9}, prior=0.1))
    delta = math.log(8.9 / (12 - 8.9)) - math.log(1.9 / (12 - 1.9))
    assert scores["a"] == pytest.approx(delta / math.sqrt(1 / 8.9 + 1 / 1.9))
    assert scores["a"] > 0 > scores["b"]
