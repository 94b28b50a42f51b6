"""WEAT and SEAT: two sets of targets against two sets of attributes, in word vectors or a model's own.

``weat`` takes word vectors, or the mean input embedding of a word's tokens; ``seat`` puts each word into
templates and takes the model's sentence vector (May et al. 2019): the last layer at the last token, or at
CLS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tuneutils.shared.streams import Record
from tuneutils.tools.bias_scan.models import weat
from tuneutils.tools.bias_scan.models.estimates import Floats, Measure
from tuneutils.tools.bias_scan.models.vectors import Vectors

#: May et al. 2019, section 2.2: semantically bleached.
TEMPLATES = ("This is {}.", "That is {}.", "There is {}.", "Here is {}.", "{} is here.", "{} is there.")
PERMUTATIONS = 100_000
#: The share of a set's words that may be missing, as in WEFE.
MISSING = 0.2
#: A permutation test holds for few words, and the published sets have 12 to 64 in X and Y.
MIN_WORDS = 10
FORMULA = "d = (mean s(X) - mean s(Y)) / std s over X and Y (ddof 1), s(w) = mean cos(w, A) - mean cos(w, B)"


@dataclass(frozen=True)
class Query:
    name: str
    sets: tuple[tuple[str, ...], ...]
    templates: tuple[str, ...] = TEMPLATES


def parse(record: Record) -> Query:
    """``name``, ``X``, ``Y``, ``A``, ``B`` (lists of words or phrases) and, for sentences, ``templates``.

    Raises:
        ValueError: with the field that is missing or wrong.
    """
    name = record.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError("field 'name': must be text")
    sets = []
    for key in ("X", "Y", "A", "B"):
        words = record.get(key)
        if (
            not isinstance(words, list)
            or len(words) < 2
            or not all(isinstance(w, str) and w.strip() for w in words)
        ):
            raise ValueError(f"field {key!r}: must be a list of two words or more")
        sets.append(tuple(dict.fromkeys(words)))
    if set(sets[0]) & set(sets[1]):
        raise ValueError(f"field 'Y': shares {sorted(set(sets[0]) & set(sets[1]))[0]!r} with X")
    templates = record.get("templates", list(TEMPLATES))
    if (
        not isinstance(templates, list)
        or not all(isinstance(t, str) and "{}" in t for t in templates)
        or not templates
    ):
        raise ValueError("field 'templates': must be a list of texts with {} in them")
    return Query(name, tuple(sets), tuple(templates))


def measure(
    test: str, model: Any, queries: Sequence[Query], seed: int
) -> tuple[list[Measure], list[dict[str, Any]]]:
    """d and p of each query."""
    made, items = [], []
    for query in queries:
        found = [_vectors(test, model, words, query.templates) for words in query.sets]
        missing = [w for given, (kept, _) in zip(query.sets, found) for w in given if w not in set(kept)]
        enough = all(len(kept) >= max(2, (1 - MISSING) * len(g)) for g, (kept, _) in zip(query.sets, found))
        items.append({"name": query.name, "missing": missing})
        if not enough:
            made.append(_refused(test, query, missing))
            continue
        (_, x), (_, y), (_, a), (_, b) = found
        made.append(effect(test, query.name, x, y, a, b, seed, len(missing)))
        s = weat.associations(_stack(x, y), a, b)
        items[-1] |= {"s": dict(zip(_labels(test, found, query), s.tolist()))}
    return made, items


def effect(
    test: str, name: str, x: Floats, y: Floats, a: Floats, b: Floats, seed: int, missing: int = 0
) -> Measure:
    """The measure of four sets of vectors; its units are the words of X and Y."""
    s = weat.associations(_stack(x, y), a, b)
    p, partitions, exact = weat.p_value(s, len(x), PERMUTATIONS, seed)
    extra = {"p": p, "partitions": partitions, "exact": int(exact), "missing": missing}
    columns = weat.columns(s, len(x))
    formula = f"{FORMULA} (Caliskan et al. 2017); p one-sided, by permutation"
    unit = "words" if test == "weat" else "sentences"
    return Measure(
        test,
        "d",
        formula,
        columns,
        weat.effect_size,
        len(s),
        name,
        neutral=0.0,
        extra=extra,
        minimum=MIN_WORDS,
        unit=unit,
    )


def _refused(test: str, query: Query, missing: Sequence[str]) -> Measure:
    note = f"{len(missing)} words have no vector, more than {MISSING:.0%} of a set: {', '.join(missing[:5])}"
    columns = weat.columns(weat.np.zeros(0), 0)
    words = sum(map(len, query.sets[:2]))
    return Measure(test, "d", FORMULA, columns, weat.effect_size, words, query.name, neutral=0.0, note=note)


def _vectors(
    test: str, model: Any, words: Sequence[str], templates: Sequence[str]
) -> tuple[list[str], Floats]:
    if isinstance(model, Vectors):
        return model.find(words)
    if test == "weat":
        from tuneutils.tools.bias_scan.models.scorers import input_embeddings

        return list(words), input_embeddings(model.loaded, words)
    return list(words), model.vectors([_filled(t, w) for w in words for t in templates])


def _filled(template: str, word: str) -> str:
    made = template.replace("{}", word)
    return made[:1].upper() + made[1:]


def _stack(x: Floats, y: Floats) -> Floats:
    return weat.np.concatenate([x, y])


def _labels(test: str, found: Sequence[tuple[list[str], Floats]], query: Query) -> list[str]:
    words = [*found[0][0], *found[1][0]]
    return words if test == "weat" else [_filled(t, w) for w in words for t in query.templates]
