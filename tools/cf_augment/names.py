"""Is a capitalised word a person's first name? *Mark my words*, *in May*, *Virginia Street*, *J. Madison*."""

from __future__ import annotations

from collections.abc import Sequence

from tuneutils.tools.cf_augment.outcome import Undecided
from tuneutils.tools.cf_augment.scan import Hit, Table
from tuneutils.tools.cf_augment.words import word_set

_TITLES = word_set("titles")
_PLACES_BEFORE = word_set("places-before")
_THINGS_AFTER = word_set("things-after")
_KIN = word_set("kin")
_SAYS = word_set("says")
_WORDY_BEFORE = word_set("wordy-before")
_MOSTLY_NAMES = word_set("mostly-names")
_MOSTLY_WORDS = word_set("mostly-words")
_GOES = word_set("goes")
_WORDY_AFTER = word_set("wordy-after")


def is_name(hit: Hit, words: Sequence[str], seps: Sequence[str], table: Table) -> bool:
    """Whether a hit of kind ``name`` is a person's first name.

    Raises:
        Undecided: it is an ordinary word or a place as well and nothing near it says which.
    """
    i = hit.start
    before = words[i - 1] if i and seps[i] == " " else ""
    after = words[i + 1] if i + 1 < len(words) and seps[i + 1] == " " else ""
    low_before, low_after = before.lower(), after.lower()
    if low_before in _PLACES_BEFORE and before[0].isupper():
        return False
    if after and after[0].isupper() and low_after in _THINGS_AFTER:
        return False
    if (seps[i].endswith("-") and i) or (seps[i + 1].startswith("-") and i + 1 < len(words)):
        return False
    titled = low_before in _TITLES or (
        seps[i].strip() == "." and words[i - 1].lower() in _TITLES if i else False
    )
    surname_next = (
        bool(after) and after[0].isupper() and not after.isupper() and low_after not in _WORDY_AFTER
    )
    if titled and not surname_next:
        return False
    if _is_first_name_before(i, words, seps, table):
        return False
    if seps[i + 1] in ("'", "’") and i + 1 < len(words) and words[i + 1].lower() == "t":
        return False  # Don't
    if not (hit.entry.word or hit.entry.text in _MOSTLY_WORDS) or hit.entry.text in _MOSTLY_NAMES:
        return True
    if hit.entry.text in _MOSTLY_WORDS:
        return titled or low_before in _KIN
    return _word_or_name(hit, words, seps, low_before, low_after, titled or surname_next)


def _is_first_name_before(i: int, words: Sequence[str], seps: Sequence[str], table: Table) -> bool:
    """*James Madison*, *Mary J. Blige*: a word behind a first name, or an initial, is a surname."""
    if not i:
        return False
    if seps[i].strip() == "." and len(words[i - 1]) == 1 and words[i - 1].isupper():
        return i > 1 and words[i - 2] in table and words[i - 2][0].isupper()
    if seps[i] != " " or words[i - 1].isupper():
        return False
    entries = table.alone(words[i - 1])
    return bool(entries) and entries[0].kind == "name"


def _word_or_name(
    hit: Hit, words: Sequence[str], seps: Sequence[str], before: str, after: str, person: bool
) -> bool:
    i = hit.start
    first = not i or any(c in seps[i] for c in '.!?:\n"“')
    if before == "to" and i > 1 and words[i - 2].lower() in _GOES:
        return False
    if before in _WORDY_BEFORE or (first and after in _WORDY_AFTER):
        return False
    if person or before in _KIN or after in _SAYS or _possessive(i, words, seps):
        return True
    if not first and after and after.endswith("ed") and after.islower():
        return True
    raise Undecided("name or word", f"{words[i]!r}: a name or a word")


def _possessive(i: int, words: Sequence[str], seps: Sequence[str]) -> bool:
    return seps[i + 1] in ("'", "’") and i + 1 < len(words) and words[i + 1] == "s"
