"""a or an before a word."""

from __future__ import annotations

_AN = ("hour", "honest", "honor", "honour", "heir")
_A = ("uni", "use", "usu", "uten", "eu", "ewe", "one", "once", "ur", "ubiq")
_A_EXCEPT = ("unin", "unim", "urg", "urb", "urd", "usher")


def article(word: str) -> str:
    """``a`` or ``an`` by the sound that the word most likely begins with."""
    low = word.lower()
    if low.startswith(_AN):
        return "an"
    if low.startswith(_A) and not low.startswith(_A_EXCEPT):
        return "a"
    return "an" if low[:1] in "aeiou" else "a"
