"""Texts with some words in another language, by a dictionary; a pair's own target side gives their form."""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import check_stream, describe_input, sidecar
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ToolError
from tuneutils.shared.records import Reader, open_writer
from tuneutils.tools.xl_parallel.glossary import Dictionary, load, look_up
from tuneutils.tools.xl_parallel.params_pairs import CodeswitchParams
from tuneutils.tools.xl_parallel.placeholders import PLACEHOLDER

WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_ADDRESS = re.compile(r"\S+@\S+|\w+://\S+|(?<!\w)[~/]\w*/\S*|(?<!\w)--?\w[\w-]*|`[^`]*`")
#: An inflected form begins as the dictionary's does, for this share of it and STEM characters at least; only
#: ENDING others may follow.
BEGINNING, STEM, ENDING = 0.7, 3, 3


def codeswitch(run: Run[CodeswitchParams]) -> dict[str, Any]:
    """Run ``xl-parallel codeswitch``; returns the summary."""
    params = run.params
    inputs = [describe_input("records", path) for path in run.inputs]
    inputs.append(describe_input("dictionary", params.dictionary))
    check_stream(run, inputs)
    dictionary = load(params.dictionary)
    quarantine = f"{run.output}.quarantine.jsonl" if run.output not in (None, "-") else None
    reader = Reader(run.inputs, on_error=run.on_error, quarantine=quarantine)
    counts: Counter[str] = Counter()
    with open_writer(str(run.output)) as writer:
        for located in reader.located():
            record = located.record
            field = params.field or ("src" if "src" in record else "text")
            if not isinstance(record.get(field), str):
                reader.refuse(located, f"field {field!r}: must be a string; name another with --field")
                continue
            other = record.get("tgt") if field == "src" else record.get("src") if field == "tgt" else None
            text, switched = switch(
                record[field], other if isinstance(other, str) else None, dictionary, params.share, run.seed
            )
            counts["words switched"] += len(switched)
            counts["records switched"] += bool(switched)
            if params.keep_original and switched:
                writer.write(record)
            to_lang = params.to_lang or record.get("tgt_lang" if field != "tgt" else "src_lang")
            made = {**record, field: text, "switched": [list(pair) for pair in switched]}
            writer.write({**made, "switched_lang": to_lang} if to_lang else made)
        if not counts["records switched"] and params.share > 0:
            raise ToolError(
                f"{params.dictionary}: has no word of the {reader.stats.read} records; languages swapped?"
            )
    metrics = {
        "records": reader.stats.read, **{k.replace(" ", "_"): n for k, n in sorted(counts.items())},
        "refused": reader.stats.refused,
    }  # fmt: skip
    licences = sorted({i.licence for i in inputs if i.licence})
    sidecar(run, Path(str(run.output)), inputs, metrics=metrics, licence=" AND ".join(licences) or None)
    run.log.info(
        "%d words of %d of %d records switched", counts["words switched"], counts["records switched"],
        reader.stats.read,
    )  # fmt: skip
    return {"output": run.output, "metrics": metrics}


def switch(
    text: str, other: str | None, dictionary: Dictionary, share: float, seed: int
) -> tuple[str, list[tuple[str, str]]]:
    """A text with about ``share`` of its translatable words in the other language.

    Placeholders, addresses, options and code stay. Which words are switched depends on the text and the seed.

    Args:
        other: the text's translation; its words give the form where they fit.

    Returns:
        The text, and each word switched with what is in its place.
    """
    forms = {w.lower(): w for w in WORD.findall(other)} if other is not None else None
    found = list(_candidates(text, forms, dictionary))
    digest = hashlib.sha256(f"{seed}:{text}".encode("utf-8", "surrogatepass")).digest()
    drawn = random.Random(digest).sample(found, round(share * len(found)))
    pieces, position, switched = [], 0, []
    for match, translation in sorted(drawn, key=lambda item: item[0].start()):
        pieces += [text[position : match.start()], translation]
        position = match.end()
        switched.append((match[0], translation))
    return "".join([*pieces, text[position:]]), switched


def _candidates(
    text: str, forms: dict[str, str] | None, dictionary: Dictionary
) -> Iterator[tuple[re.Match[str], str]]:
    kept = [m.span() for pattern in (PLACEHOLDER, _ADDRESS) for m in pattern.finditer(text)]
    for match in WORD.finditer(text):
        if any(start < match.end() and match.start() < end for start, end in kept):
            continue
        translation = translate(match[0].lower(), forms, dictionary)
        if translation and translation.lower() != match[0].lower():
            yield match, cased(translation, match[0])


def translate(word: str, forms: dict[str, str] | None, dictionary: Dictionary) -> str | None:
    """The translation of a lower-case word, in the form that the text's own translation has.

    Without a translation at hand a word that the dictionary lists as it stands takes its first sense; one
    found only by its stem is left, since the form that it needs is not known.

    Args:
        forms: the translation's words: lower case → as written.
    """
    exact = dictionary.get(word)
    senses = exact or look_up(word, dictionary)
    if forms is None:
        return exact[0] if exact else None
    for sense in senses:
        if sense in forms:
            return forms[sense]
    for sense in senses:
        if form := _inflected(sense, list(forms)):
            return forms[form]
    return None


def _inflected(sense: str, words: Sequence[str]) -> str | None:
    """The word that begins like ``sense``, their last characters apart; the longest beginning wins."""
    best, longest = None, max(STEM, math.ceil(BEGINNING * len(sense))) - 1
    for word in words:
        common = next((i for i, (a, b) in enumerate(zip(sense, word)) if a != b), min(len(sense), len(word)))
        if common > longest and len(word) - common <= ENDING:
            best, longest = word, common
    return best


def cased(word: str, like: str) -> str:
    """A lower-case word in the casing of the one it replaces; what is already written with capitals stays."""
    if like.isupper() and len(like) > 1:
        return word.upper()
    if like[:1].isupper() and word.islower():
        return word[:1].upper() + word[1:]
    return word
