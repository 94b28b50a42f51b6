"""The tagger of the two English pronouns whose counterpart depends on their use.

``her`` is him or his, ``his`` is her or hers. Both are one question, asked with two small logistic models: is
the word a determiner (*her book*, *his book*) or does it stand alone (*saw her*, *the book is his*)? The
models see two words on each side and are trained without hand-made labels, see ``fit_pronouns.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from tuneutils.tools.cf_augment.words import word_set

MODEL = Path(__file__).with_name("data") / "pronouns.json"

#: ``(words, separators, index)`` → log-odds that the word is a determiner; ``separators[i]`` precedes word i.
Tagger = Callable[[Sequence[str], Sequence[str], int], float]

Weights = dict[str, dict[str, float]]


#: Marks that stand before a word without ending its phrase: quotes, brackets, emphasis.
_OPENING = "\"'“‘«([*_~`$£€#"


def context(words: Sequence[str], seps: Sequence[str], i: int) -> tuple[str, str, str, str]:
    """The two units before and after word ``i``, lower-cased: words, or what punctuation stands between.

    ``seps[i]`` precedes ``words[i]``, so there is one more separator than words. ``^`` and ``$`` are the ends
    of the text, ``0`` is a number; no unit stands beyond punctuation.
    """
    count = len(words)
    if i + 1 < count and seps[i + 1] == "/":  # his/her book: as his or her book
        return "", "^", "or", words[i + 1].lower()
    n1 = _mark(seps[i + 1], i + 1 < count)
    n2 = ""
    if not n1:
        n1 = words[i + 1].lower() if i + 1 < count else "$"
        if i + 1 < count:
            n2 = _mark(seps[i + 2], i + 2 < count) or (words[i + 2].lower() if i + 2 < count else "$")
    mark = seps[i].strip()
    if mark or not i:
        return "", mark[-1] if mark else "^", n1, n2
    mark = seps[i - 1].strip()
    return mark[-1] if mark else words[i - 2].lower() if i > 1 else "^", words[i - 1].lower(), n1, n2


def _mark(sep: str, more: bool) -> str:
    """The first mark of a separator that counts; a word may follow (``more``)."""
    if sep == " ":
        return ""
    mark = sep.strip()
    if not mark:
        return ""
    if mark[0].isdigit():
        return "0"
    if more and mark[0] in _OPENING:
        mark = mark.lstrip(_OPENING)
        return mark[:1] if not mark[:1].isdigit() else "0"
    return mark[0]


def features(p2: str, p1: str, n1: str, n2: str) -> tuple[tuple[str, str], ...]:
    """What the models look at: (template, value) pairs."""
    return (
        ("n1", n1),
        ("p1", p1),
        ("n2", n2),
        ("end", n1[-3:]),
        ("n1n2", f"{n1} {n2}"),
        ("p1n1", f"{p1} {n1}"),
        ("p2p1", f"{p2} {p1}"),
        ("p1n2", f"{p1} {n2}"),
        ("ends", f"{n1[-2:]} {n2[-2:]}"),
        ("stem", f"{p1[:4]} {n1[-2:]}"),
        ("stems", f"{p1[:4]} {n2}"),
        ("near", f"{p1[-2:]} {n1} {n2}"),
    )


#: What can follow an object but never stands between *her* or *his* and their noun.
_CLOSED = word_set("closed")
#: The same where the sentence or clause ends behind it: *paid her back.*, but *her back hurt*.
_CLOSED_AT_END = word_set("closed-at-end")
_NOUNS_IN_LY = word_set("nouns-in-ly")
#: Nouns that nearly always have an owner: *gave her brother a book* is about her brother.
_OWNED = word_set("owned")
_KIN = word_set("kin")
_SAYS = word_set("says")
_TIMES = word_set("times")
_DECIDED = 20.0


def rule(p2: str, p1: str, n1: str, n2: str) -> float:
    """Log-odds where grammar alone decides what follows a determiner; 0 where it does not."""
    if p1 == "of" and p2 in _KIN and (n1[-2:] == "ed" or n1 in _SAYS):
        return -_DECIDED
    if n1 == "or" and n2 in ("her", "his", "their"):
        return _DECIDED
    if n1 in ("last", "next", "one", "each") and n2 in _TIMES:  # met her last week
        return -_DECIDED
    if n1 in _CLOSED or not (n1.isalpha() or n1 == "0"):
        return -_DECIDED
    if n1 in _OWNED:
        return _DECIDED
    if p1 in ("wish", "wishes", "wished", "wishing"):
        return -_DECIDED
    ends = n2 == "" or not n2.isalpha() or n2 in _CLOSED
    if ends and (n1 in _CLOSED_AT_END or (n1[-2:] == "ly" and n1 not in _NOUNS_IN_LY)):
        return -_DECIDED
    return 0.0


class Model:
    """Log-odds that a pronoun is a determiner, from weights by feature template."""

    def __init__(self, weights: Weights) -> None:
        self.bias = weights["bias"][""]
        self._get = [weights[template].get for template, _ in features("", "", "", "")]

    def __call__(self, words: Sequence[str], seps: Sequence[str], i: int) -> float:
        p2, p1, n1, n2 = context(words, seps, i)
        if decided := rule(p2, p1, n1, n2):
            return decided
        score = self.bias
        for get, (_, value) in zip(self._get, features(p2, p1, n1, n2)):
            score += get(value, 0.0)
        return score


@cache
def models() -> dict[str, Model]:
    """The shipped models of ``her`` and ``his``."""
    stored = json.loads(MODEL.read_text(encoding="utf-8"))
    return {word: Model(stored[word]) for word in ("her", "his")}


def probability(log_odds: float) -> float:
    return 1 / (1 + math.exp(-max(-30.0, min(30.0, log_odds))))
