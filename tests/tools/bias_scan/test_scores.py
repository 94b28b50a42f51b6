"""Scores against GenBit's own code, closed forms and a count by brute force."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest

from tuneutils.shared.errors import ToolError
from tuneutils.shared.lexicons import Lexicon, Term
from tuneutils.tools.bias_scan import near as near_module
from tuneutils.tools.bias_scan.association import cobs, npmi, npmi_gap
from tuneutils.tools.bias_scan.intervals import jackknife, percentiles, resampled_sums
from tuneutils.tools.bias_scan.matcher import Matcher
from tuneutils.tools.bias_scan.near import Window
from tuneutils.tools.bias_scan.report import Score
from tuneutils.tools.bias_scan.scores import Scores
from tuneutils.tools.bias_scan.stopwords import STOP_WORDS
from tuneutils.tools.bias_scan.tally import SHARDS, Batch, Tally
from tuneutils.tools.bias_scan.targets import parse_targets

GENBIT_TEXTS = [
    "he repaired engine while she painted flowers",
    "she painted engine",
    "he repaired engine engine flowers",
    "she loves flowers flowers music",
    "he loves music engine",
    "she repaired flowers painted music music",
]
GENDER = {"she": "female", "her": "female", "he": "male", "his": "male", "old man": "male"}


def gender(terms: dict[str, str] = GENDER, name: str = "gender") -> Lexicon:
    return Lexicon(name, "en", tuple(Term(t, g) for t, g in terms.items()), "MIT", "test")


def tally_of(texts: Sequence[str], lexicons: Sequence[Lexicon], window: Window = Window()) -> Tally:  # noqa: B008
    """Row ``i`` is of bucket ``i``."""
    tally = Tally(Matcher(lexicons), window, STOP_WORDS, 10, 0)
    for shard in range(SHARDS):
        at = list(range(shard, len(texts), SHARDS))
        if at:
            tally.add(Batch(shard, [texts[i] for i in at], np.array(at), "x", [i + 1 for i in at]))
    return tally


def scores_of(texts: Sequence[str], lexicons: Sequence[Lexicon], minimum: int = 1) -> dict[str, Score]:
    tally = tally_of(texts, lexicons)
    return {s.name: s.checked() for s in Scores(tally, {}, minimum, 0).all()}


def test_genbit_is_that_of_the_genbit_package() -> None:
    """genbit 2.2.0.0's MetricsCalculation("en", 30, .95, 80, Tokenizer("en"), False, False) on these texts, with
    a lemmatizer that returns its argument: genbit_score, and bias_conditional_ratio of the two words considered."""
    tally = tally_of(GENBIT_TEXTS, [gender()])
    scores = Scores(tally, {}, 1, 0)
    found = {s.name: s for s in scores.all()}["gender.female:male.genbit"]
    assert found.value == pytest.approx(0.5138278359323325, rel=1e-6)
    pair = scores.pairs["gender.female:male"]
    ratios = {scores.words[i]: ratio for i, ratio in zip(pair.words, pair.ratios)}
    assert ratios[b"engine"] == pytest.approx(-0.547272, abs=2e-6)
    assert ratios[b"flowers"] == pytest.approx(0.480383, abs=2e-6)
    assert len(ratios) == 2
    assert found.extra["words"] == 2


def near_by_brute_force(texts: Sequence[str], window: Window) -> dict[tuple[str, str], float]:
    """``(group, word)`` → weight, by loops over words; phrases count as one."""
    found: dict[tuple[str, str], float] = {}
    for text in texts:
        words = text.replace("old man", "old_man").split()
        words = [w for w in words if w.replace("_", " ") in GENDER or (w not in STOP_WORDS and len(w) > 1)]
        for i, word in enumerate(words):
            group = GENDER.get(word.replace("_", " "))
            for j, other in enumerate(words):
                if group and i != j and abs(i - j) <= window.size and "_" not in other:
                    key = (group, other)
                    found[key] = found.get(key, 0.0) + window.decay ** abs(i - j)
    return found


@pytest.mark.parametrize("window", [Window(), Window(2, 0.5), Window(1, 1.0)])
def test_words_near_mentions_by_brute_force(window: Window) -> None:
    rng = random.Random(3)
    vocabulary = ["he", "she", "old man", "the", "of", "nurse", "doctor", "engine", "blue", "runs", "a", "7"]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randint(0, 40))) for _ in range(60)]
    tally = tally_of(texts, [gender()], window)
    got: dict[tuple[str, str], float] = {}
    for near in tally.near:
        for number, table in near.tables.items():
            for word, column in near.words.items():
                if table[column]:
                    key = (tally.matcher.groups[number][1], word.decode())
                    got[key] = got.get(key, 0.0) + table[column]
    want = {k: v for k, v in near_by_brute_force(texts, window).items() if k[1] != "7"}
    assert got == pytest.approx(want, rel=1e-5)
    assert tally.tokens == sum(len(t.split()) for t in texts)


def test_npmi_closed_form() -> None:
    near = np.array([[3.0, 1.0], [1.0, 3.0]])
    # p(w, g) = 3/8 and 1/8, p(w) = p(g) = 1/2.
    high, low = math.log(1.5) / -math.log(3 / 8), math.log(0.5) / -math.log(1 / 8)
    assert npmi(near, near.sum(axis=1)) == pytest.approx(np.array([[high, low], [low, high]]))
    assert npmi_gap(near, near.sum(axis=1)) == pytest.approx(high - low)
    assert npmi(np.array([[2.0, 0.0], [0.0, 2.0]]), np.array([2.0, 2.0]))[0].tolist() == [1.0, -1.0]


def test_cobs_closed_form() -> None:
    near, mentions = np.array([[8.0, 2.0], [4.0, 16.0]]), np.array([10.0, 40.0])
    # Word 0: (8/10)/(10/100) / ((4/20)/(40/100)) = 16; word 1: (2/10)/.1 / ((16/20)/.4) = 1.
    assert cobs(near, near.sum(axis=1), mentions, 100) == pytest.approx(math.log10(16) / 2)
    assert cobs(near[:, 1:], near.sum(axis=1), mentions, 100) == pytest.approx(0.0)
    assert math.isnan(cobs(np.array([[1.0, 0.0], [0.0, 1.0]]), np.ones(2), mentions, 100))


def test_representation_closed_form() -> None:
    found = scores_of(["he he he she", "nothing"], [gender()])
    # Shares 3/4 and 1/4 against halves; per term: he's list has 3 terms, she's 2: 1 and 1/2 of 3/2.
    assert found["gender.representation"].value == pytest.approx(0.25)
    assert found["gender.representation-per-term"].value == pytest.approx(2 / 3 - 1 / 2)
    assert (found["gender.male.share"].value, found["gender.male.share"].n) == (0.75, 4)
    assert (found["gender.male.rows"].value, found["gender.male.rows"].n) == (0.5, 2)


def test_representation_against_a_target() -> None:
    tally = tally_of(["he he he she"], [gender()])
    targets = parse_targets(["gender.female=0.25"], tally.matcher)
    found = {s.name: s for s in Scores(tally, targets, 1, 0).all()}
    assert found["gender.representation"].value == pytest.approx(0.0)
    assert "as stated" in found["gender.representation"].formula


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["gender.femal=0.5"], "no such group"),
        (["gender.female"], "no such group"),
        (["gender.female=half"], "between 0 and 1"),
        (["gender.female=0.5", "gender.male=0.6"], "sum to 1.1"),
        (["gender.female=0.5", "gender.male=0.4"], "sum to 0.9"),
    ],
)
def test_bad_targets(given: list[str], says: str) -> None:
    with pytest.raises(ToolError, match=says):
        parse_targets(given, Matcher([gender()]))


def test_scores_below_the_minimum_are_refused() -> None:
    found = scores_of(["he she", "nothing"], [gender()], minimum=3)
    assert all(s.value is None for s in found.values())
    assert found["gender.representation"].note == "refused: n=2 is below 3"
    assert found["gender.female:male.genbit"].note == "refused: n=1 is below 3"


def test_a_text_without_terms() -> None:
    found = scores_of(["nothing here", ""], [gender()])
    assert found["gender.representation"].value is None
    assert found["gender.male.rows"].value == 0.0


def test_an_axis_of_many_groups_is_scored_against_the_rest() -> None:
    terms = {g: g for g in ("cat", "dog", "cow", "hen", "ant")}
    texts = ["cat purrs softly", "dog barks loud", "cow barks softly", "hen purrs loud"] * 3
    found = scores_of(texts, [gender(terms, "pets")])
    assert {s.group for s in found.values() if s.metric == "genbit"} == {
        f"{g}:rest" for g in ("cat", "dog", "cow", "hen")
    }


def test_chance_is_what_unrelated_words_score() -> None:
    """Words drawn whatever the group: the score lies where chance says; words that follow it lie far above."""
    rng = random.Random(5)
    words = [f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(200)]
    texts = [" ".join([rng.choice(("he", "she")), *rng.choices(words, k=8)]) for _ in range(2000)]
    found = scores_of(texts, [gender()])["gender.female:male.genbit"]
    assert found.value == pytest.approx(found.extra["chance"], rel=0.2)
    apart = {"he": words[:100], "she": words[100:]}
    texts = [" ".join([g, *rng.choices(apart[g], k=8)]) for g in rng.choices(("he", "she"), k=2000)]
    leaning = scores_of(texts, [gender()])["gender.female:male.genbit"]
    assert leaning.value > 3 * leaning.extra["chance"]


def test_jackknife_of_a_mean_is_the_standard_error() -> None:
    shards = np.array([[1.0, 1], [2.0, 1], [4.0, 1], [9.0, 1]])
    [(value, (low, high))] = jackknife(lambda s: s[:1] / s[1], shards)
    half = 3.1824 * np.std(shards[:, 0], ddof=1) / 2
    assert (value, low, high) == pytest.approx((4.0, 4.0 - half, 4.0 + half))


def test_bootstrap_of_a_share_is_near_the_binomial() -> None:
    rng = np.random.default_rng(1)
    ones = (rng.random(4096) < 0.3).astype(float)
    buckets = np.column_stack([ones, np.ones_like(ones)]).reshape(256, 16, 2).sum(axis=1)
    sums = resampled_sums(buckets, 0)
    low, high = percentiles(sums[:, 0] / sums[:, 1])
    p = ones.mean()
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(p * (1 - p) / 4096), rel=0.12)


def test_rare_words_are_forgotten_and_frequent_ones_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_module, "MAX_WORDS", 64)
    rng = random.Random(2)

    def rare() -> str:
        return "".join(rng.choices("abcdefgh", k=9))

    texts = [f"he common {rare()} {rare()}" for _ in range(3000)]
    tally = tally_of(texts, [gender()])
    for near in tally.near:
        assert len(near) <= 64
        assert near.pruned > 0
        assert near.tables[1][near.words[b"common"]] == pytest.approx(3000 / SHARDS * 0.95, rel=1e-4)
        assert near.pruned_below < 2


def test_numbers_do_not_fill_the_memory() -> None:
    tally = tally_of([f"he {i} {i}x {i + 1}" for i in range(2000)], [gender()])
    assert sum(len(near) for near in tally.near) <= SHARDS
