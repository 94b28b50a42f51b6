"""Singular they takes the verb of a plural: *she walks and sings* becomes *they walk and sing*."""

from __future__ import annotations

from collections.abc import Sequence

from tuneutils.tools.cf_augment.edits import Edit
from tuneutils.tools.cf_augment.outcome import Undecided
from tuneutils.tools.cf_augment.words import cased_like, word_set

_IRREGULAR = {"is": "are", "was": "were", "has": "have", "does": "do", "goes": "go"}
_NEGATED = {"isn": "aren", "wasn": "weren", "hasn": "haven", "doesn": "don"}
_SHORT_IE = frozenset(("dies", "lies", "ties", "vies"))
#: Verbs whose *-es* is the ending: other verbs in *-e* lose the *-s* alone.
_ES = ("sses", "shes", "ches", "xes", "zzes", "oes")
_SAME = frozenset(("does", "toes", "shoes", "hoes", "aches", "caches"))
_ADVERBS = word_set("adverbs")
_NO_VERBS = word_set("no-verbs")
_PARTICIPLES = word_set("participles")
_AFTER_COORDINATED = word_set("present-after-and")
_VERBS = word_set("verbs")
_AUXILIARIES = frozenset(("is", "was", "has", "does"))


def base(verb: str) -> str | None:
    """The plural of a verb in the third person singular; None for a form that both share, or no verb.

    >>> base("carries"), base("watches"), base("likes"), base("walked")
    ('carry', 'watch', 'like', None)
    """
    low = verb.lower()
    if low in _IRREGULAR:
        return _IRREGULAR[low]
    if len(low) < 4 or not low.endswith("s") or low.endswith("ss") or low in _NO_VERBS:
        return None
    if low in _SHORT_IE:
        return low[:-1]
    if low.endswith("ies"):
        return low[:-3] + "y"
    if low.endswith(_ES) and low not in _SAME:
        return low[:-2]
    return low[:-1]


def agreeing(i: int, words: Sequence[str], seps: Sequence[str]) -> list[Edit]:
    """The edits that verbs need where word ``i``, a subject he or she, becomes they.

    Raises:
        Undecided: *'s* that may be *is* or *has*; a word behind *and* that may be a verb or a noun.
    """
    if _contracted(i, words, seps):
        return [_apostrophe(i, words, seps)]
    verb = _finite(i, words, seps)
    if verb is not None and _inverted(i, words, seps) and verb.new not in _IRREGULAR.values():
        return [verb, *_coordinated(verb.start, words, seps)]
    before = _before(i, words, seps)
    if before is not None:
        return [before]
    if verb is None:
        return []
    return [verb, *_coordinated(verb.start, words, seps)]


def _contracted(i: int, words: Sequence[str], seps: Sequence[str]) -> bool:
    return i + 1 < len(words) and seps[i + 1] in ("'", "’") and words[i + 1].lower() == "s"


def _apostrophe(i: int, words: Sequence[str], seps: Sequence[str]) -> Edit:
    k = i + 2
    while k < len(words) and seps[k] == " " and words[k].lower() in _ADVERBS:
        k += 1
    after = words[k].lower() if k < len(words) and seps[k] == " " else ""
    if after in _PARTICIPLES:
        return Edit(i + 1, i + 2, cased_like("ve", words[i + 1]))
    if after.endswith("ed"):
        raise Undecided("agreement", f'"{words[i]}\'s {after}": is or has')
    return Edit(i + 1, i + 2, cased_like("re", words[i + 1]))


def _finite(i: int, words: Sequence[str], seps: Sequence[str]) -> Edit | None:
    """The verb behind a subject, adverbs skipped."""
    k = i + 1
    while k < len(words) and seps[k] == " ":
        low = words[k].lower()
        if low not in _ADVERBS and not low.endswith("ly"):
            return _verb(k, words, seps)
        k += 1
    return None


def _verb(k: int, words: Sequence[str], seps: Sequence[str]) -> Edit | None:
    low = words[k].lower()
    if low in _NEGATED and seps[k + 1] in ("'", "’"):
        return Edit(k, k + 1, cased_like(_NEGATED[low], words[k]))
    new = base(words[k])
    return Edit(k, k + 1, cased_like(new, words[k])) if new else None


def _inverted(i: int, words: Sequence[str], seps: Sequence[str]) -> bool:
    return _before(i, words, seps) is not None


def _before(i: int, words: Sequence[str], seps: Sequence[str]) -> Edit | None:
    """The auxiliary of a question: *is she*, *doesn't he*, *nor does she*."""
    if not i or (seps[i] != " "):
        return None
    low = words[i - 1].lower()
    if low in _AUXILIARIES:
        return Edit(i - 1, i, cased_like(_IRREGULAR[low], words[i - 1]))
    if low == "t" and i > 1 and words[i - 2].lower() in _NEGATED:
        return Edit(i - 2, i - 1, cased_like(_NEGATED[words[i - 2].lower()], words[i - 2]))
    return None


def _coordinated(verb: int, words: Sequence[str], seps: Sequence[str]) -> list[Edit]:
    """Further verbs of the same subject: *walks in, sits down and reads*."""
    made = []
    for k in range(verb + 1, len(words) - 1):
        if any(c in seps[k] for c in '.!?;:\n"“”'):
            break
        low = words[k].lower()
        if low in ("who", "which", "that", "because", "if", "when", "while", "he", "she", "it", "they", "we"):
            break
        if low not in ("and", "or", "but", "then"):
            continue
        n = k + 1
        while n < len(words) - 1 and (words[n].lower() in _ADVERBS or words[n].lower().endswith("ly")):
            n += 1
        new = base(words[n])
        if new is None or words[n][0].isupper():
            continue
        after = words[n + 1].lower() if n + 1 < len(words) and seps[n + 1] == " " else ""
        sure = words[n].lower() in _IRREGULAR or after in _AFTER_COORDINATED or k == verb + 1
        if sure or (new in _VERBS and not _plural(words[k - 1])):
            made.append(Edit(n, n + 1, cased_like(new, words[n])))
        else:
            raise Undecided("agreement", f"{words[n]!r} behind {low!r}: a verb or a noun")
    return made


def _plural(word: str) -> bool:
    """Looks like a plural: then a word in *-s* behind *and* may be another, as in *cats and dogs*."""
    low = word.lower()
    return low.endswith("s") and not low.endswith("ss") and low not in _NO_VERBS
