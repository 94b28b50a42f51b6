"""The published rules on documents made for each, and n-gram shares by brute force."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from tuneutils.tools.corpus_build.names import RULES
from tuneutils.tools.corpus_build.rules import (
    DOCUMENT_RULES,
    DUPLICATE_NGRAM,
    LINE_RULES,
    TOP_NGRAM,
    Ngrams,
    broken_rules,
    chosen,
    clean_lines,
    duplicate_ngram_shares,
    top_ngram_shares,
)
from tuneutils.tools.corpus_build.tokens import tokenize

SENTENCES = [
    "The committee that met in spring decided to publish the minutes with a summary of every vote.",
    "Nobody could say whether rivers to the north would have enough water for another dry season.",
    "A museum opened its doors last autumn and visitors came from far beyond the old city walls.",
    "Engineers measured vibrations along the bridge while traffic was kept away for two whole hours.",
    "She wrote letters to friends abroad and kept copies of each one in a small wooden box.",
    "Later studies found that sleep, diet and exercise matter more than any single medicine does.",
]
GOOD = "\n".join(SENTENCES)


def broken(text: str, *rules: str) -> str | None:
    return broken_rules([text], rules or RULES)[0]


def test_good_prose_breaks_no_rule() -> None:
    assert broken(GOOD) is None
    assert clean_lines(GOOD, RULES) == (GOOD, {})


def words(count: int, length: int = 5) -> str:
    """``count`` different words of ``length`` letters."""
    letters = random.Random(0)
    return " ".join("".join(letters.choices("abcdefghij", k=length)) for _ in range(count))


@pytest.mark.parametrize(
    ("rule", "just_in", "just_out"),
    [
        ("gopher-words", words(50), words(49)),
        ("gopher-words", "ab " * 100_000, "ab " * 100_001),
        ("gopher-word-length", words(60, 3), words(60, 2)),
        ("gopher-word-length", words(60, 10), words(60, 11)),
        ("gopher-symbols", words(100) + " #" * 11, words(100) + " #" * 12),
        ("gopher-symbols", words(100) + "…" * 10, words(100) + "…" * 11),
        ("gopher-symbols", words(100) + "..." * 10, words(100) + "..." * 11),
        ("gopher-bullets", "- a\n" * 9 + "b", "- a\n" * 10 + ""),
        ("gopher-ellipsis", "a...\n" * 3 + "b\n" * 7, "a…\n" * 4 + "b\n" * 6),
        ("gopher-alphabetic", "word " * 8 + "12 ," , "word " * 7 + "12 , ;"),
        ("gopher-stop-words", "cats WITH the dogs", "cats and dogs, and withal theirs"),
        ("gopher-duplicate-lines", "aa\nb\nc\nd\ne\nf\ng\nh\ni\nj\nkkkkkk\naa", "a\na\na\na\nb\nc\nd\ne\nf\ng"),
        ("gopher-duplicate-lines", "ab\nab\ncdefgh\nij", "abc\nabc\ncdefgh\nij"),
        ("gopher-duplicate-paragraphs", "a\n\nb\n\na\n\nccccccccccc", "a\n\nb\n\na\n\na"),
        ("c4-lorem-ipsum", "Lorem est ipsum", "Lorem IPSUM dolor"),
        ("c4-curly-bracket", "f(x)", "f { x }"),
        ("c4-sentences", 'One. Two! "Three?"', "One. Version 3.11 of it. Then no end"),
        ("gopher-top-ngrams", "xx yy " + words(10) + " xx yy", "xx yy xx yy xx yy " + words(10)),
        ("gopher-duplicate-ngrams", words(60) + " " + words(4), words(60) + " " + words(60)),
    ],
)  # fmt: skip
def test_thresholds(rule: str, just_in: str, just_out: str) -> None:
    assert broken(just_in, rule) is None
    assert broken(just_out, rule) == rule
    assert broken_rules([just_in, just_out, GOOD], [rule]) == [None, rule, None]


@pytest.mark.parametrize(
    ("rule", "stays", "goes"),
    [
        ("c4-terminal-punctuation", 'He said: "Go."', "Read more..."),
        ("c4-terminal-punctuation", "Is it?", "Home | About | Contact"),
        ("c4-short-lines", "five words are just enough", "four are too few"),
        ("c4-javascript", "Java is an island", "Please enable JavaScript"),
        ("c4-policy", "their policy on privacy", "Read our Privacy Policy here"),
    ],
)
def test_line_rules(rule: str, stays: str, goes: str) -> None:
    assert clean_lines(f"{stays}\n{goes}\n{stays}", [rule]) == (f"{stays}\n{stays}", {rule: 1})


def test_citations_are_taken_out() -> None:
    text = "Water boils.[12] It freezes.[citation needed] a[i] stays, as does [1234]."
    assert clean_lines(text, ["c4-citations"])[0] == "Water boils. It freezes. a[i] stays, as does [1234]."


def top_by_hand(text: str, n: int) -> float:
    parts = text.split()
    grams = Counter(tuple(p.lower() for p in parts[i : i + n]) for i in range(len(parts) - n + 1))
    if not grams or max(grams.values()) < 2:
        return 0.0
    most = max(grams.values())
    longest = max(sum(map(len, g)) for g, c in grams.items() if c == most)
    return most * longest / sum(map(len, parts))


def repeated_by_hand(text: str, n: int) -> float:
    parts = text.lower().split()
    seen: set[tuple[str, ...]] = set()
    covered: set[int] = set()
    for i in range(len(parts) - n + 1):
        gram = tuple(parts[i : i + n])
        if gram in seen:
            covered.update(range(i, i + n))
        seen.add(gram)
    return sum(len(parts[i]) for i in covered) / max(sum(map(len, parts)), 1)


def random_texts() -> list[str]:
    rng = random.Random(1)
    made = ["", "one", "one two", GOOD, GOOD + "\n" + GOOD]
    for size in (3, 8, 30, 200):
        vocabulary = [f"w{'x' * rng.randrange(6)}{i}" for i in range(size)]
        made += [" ".join(rng.choices(vocabulary, k=rng.randrange(5, 400))) for _ in range(12)]
    return made


def test_repeated_ngrams_equal_brute_force() -> None:
    texts = random_texts()
    shares = duplicate_ngram_shares(Ngrams(tokenize(texts, spaces_only=True)))
    for n in DUPLICATE_NGRAM:
        assert shares[n] == pytest.approx([repeated_by_hand(t, n) for t in texts])


def test_most_common_ngrams_equal_brute_force_where_the_limit_is_near() -> None:
    texts = random_texts()
    shares = top_ngram_shares(Ngrams(tokenize(texts, spaces_only=True)))
    above = 0
    for n, limit in TOP_NGRAM.items():
        for text, share in zip(texts, shares[n], strict=True):
            wanted = top_by_hand(text, n)
            above += wanted > limit
            assert share == pytest.approx(wanted) if wanted > limit else share <= limit
    assert above > 10


def test_families_and_exceptions() -> None:
    assert set(chosen(["gopher", "c4"], [])) == set(RULES)
    assert chosen(["c4"], ["c4-sentences"]) == tuple(
        n for n in RULES if n.startswith("c4-") and n != "c4-sentences"
    )
    assert chosen(["gopher-words", "c4-javascript"], []) == ("gopher-words", "c4-javascript")
    assert set(DOCUMENT_RULES) | set(LINE_RULES) < set(RULES)
    assert all(re.fullmatch(r"(gopher|c4)(-[a-z]+)+", n) for n in RULES)
