"""``bias-scan leaks``: did a test set get into training records? By n-grams of words, streaming over them.

Texts are lower-cased and cut into words of letters and digits. A text leaked exactly when all its words
stand in one training record in a row, and nearly when the share of its n-grams that stand in one record
reaches ``--near`` (Brown et al. 2020, appendix C, and Touvron et al. 2023, appendix A.6, use such
overlaps). Texts shorter than an n-gram are one gram. Memory holds the test set's grams alone.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import check_stream, describe_input, sidecar
from tuneutils.shared.command import Run
from tuneutils.shared.errors import GateFailed, ToolError
from tuneutils.shared.evaluate import ratio_estimate
from tuneutils.shared.records import FORMATS, Reader, Record, open_writer
from tuneutils.tools.bias_scan.models.params import LeakParams

WORD = re.compile(r"\w+|\0", re.UNICODE)
#: Where a test set leaves a word open; any one or two words may stand there.
GAP = "\0"
PLACEHOLDER = re.compile(r"\[MASK\]|\bBLANK\b")
QUOTED = 200
#: Fields that name things and hold no text of a test.
NAMES = frozenset(
    {
        "id",
        "twin_of",
        "twin_axis",
        "bias_type",
        "type",
        "category",
        "axis",
        "annotations",
        "source",
        "options",
    }
)


@dataclass
class Text:
    """A text of a test set, and the best that was found of it so far.

    Attributes:
        grams: how many different n-grams it has.
        found: greatest share of them in one training record; ``place`` of that record.
    """

    place: str
    field: str
    words: tuple[str, ...]
    quoted: str
    grams: int
    found: float = 0.0
    exact: bool = False
    where: str = ""
    records: int = 0


@dataclass
class Index:
    """n-grams of all texts → the texts that have them."""

    ngram: int
    texts: list[Text] = field(default_factory=list)
    grams: dict[tuple[str, ...], list[int]] = field(default_factory=lambda: defaultdict(list))
    sizes: set[int] = field(default_factory=set)

    def add(self, place: str, name: str, text: str, words: tuple[str, ...]) -> None:
        found: set[tuple[str, ...]] = set()
        for piece in (part.split() for part in " ".join(words).split(GAP)):
            size = min(self.ngram, len(piece))
            if size:
                found |= set(_grams(piece, size))
                self.sizes.add(size)
        for gram in found:
            self.grams[gram].append(len(self.texts))
        quoted = " ".join(text.split())[:QUOTED]
        self.texts.append(Text(place, name, words, quoted, len(found)))

    def see(self, text: str, place: str, near: float) -> None:
        """Look for every text in one text of a training record."""
        words = words_of(text)
        hits: dict[int, int] = defaultdict(int)
        for size in self.sizes:
            for gram in set(_grams(words, size)) if len(words) >= size else ():
                for i in self.grams.get(gram, ()):
                    hits[i] += 1
        joined = " ".join(words) if hits else ""
        for i, count in hits.items():
            found = self.texts[i]
            share = count / found.grams
            exact = share == 1.0 and _stands(found.words, joined)
            found.records += exact or share >= near
            if (exact, share) > (found.exact, found.found):
                found.exact, found.found, found.where = exact, share, place


def find_leaks(run: Run[LeakParams]) -> dict[str, Any]:
    """Run ``bias-scan leaks``; gives the summary.

    Raises:
        GateFailed: something leaked, with ``--fail``; what was found is written all the same.
    """
    params = run.params
    inputs = [describe_input("records", path) for path in run.inputs]
    inputs += [describe_input("against", path) for path in params.against]
    check_stream(run, inputs)
    index, short = _index(params)
    quarantine = f"{run.output}.quarantine.jsonl" if run.output != "-" else None
    reader = Reader(run.inputs, formats=tuple(FORMATS), on_error=run.on_error, quarantine=quarantine)
    with run.progress(None, "records", "records") as bar:
        for located in reader.located():
            for _, text in strings(located.record):
                index.see(text, located.place, params.near)
            bar.update()
    leaked = [t for t in index.texts if t.exact or t.found >= params.near]
    with open_writer(str(run.output)) as writer:
        for text in leaked:
            writer.write(_record(text))
    metrics = _metrics(index, leaked, short, reader)
    if run.output != "-" and Path(str(run.output)).is_file():
        sidecar(run, Path(str(run.output)), inputs, metrics=metrics)
    _say(run, metrics)
    if params.fail and leaked:
        first = leaked[0]
        raise GateFailed(
            f"{len(leaked)} of {len(index.texts)} texts leaked, such as {first.place} in {first.where}: "
            f"{first.quoted[:60]!r}"
        )
    return {"output": run.output, "metrics": metrics}


def _index(params: LeakParams) -> tuple[Index, int]:
    """The texts of the test sets, each once, and how many were too short to look for."""
    index, seen, short = Index(params.ngram), set(), 0
    for located in Reader(params.against).located():
        for name, text in strings(located.record):
            words = words_of(PLACEHOLDER.sub(GAP, text))
            if len(words) < params.min_words:
                short += 1
            elif words not in seen:
                seen.add(words)
                index.add(located.place, name, text, words)
    if not index.texts:
        raise ToolError(
            f"{', '.join(params.against)}: no text of {params.min_words} words or more to look for; "
            "lower --min-words"
        )
    return index, short


def strings(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a record with its field; not the fields that name things."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if name or key not in NAMES:
                yield from strings(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner, name or "item")


def words_of(text: str) -> tuple[str, ...]:
    """Lower-case words; punctuation and space do not matter."""
    return tuple(WORD.findall(text.lower()))


def _stands(words: Sequence[str], joined: str) -> bool:
    """Whether the words stand in a row in a text's words joined by spaces, a gap being any one or two."""
    parts = (r"\w+( \w+)?" if word == GAP else re.escape(word) for word in words)
    return re.search(rf"(^| ){' '.join(parts)}( |$)", joined) is not None


def _grams(words: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(size)))


def _record(text: Text) -> Record:
    return {
        "test": text.place,
        "field": text.field,
        "train": text.where,
        "kind": "exact" if text.exact else "near",
        "overlap": round(text.found, 6),
        "train_records": text.records,
        "text": text.quoted,
    }


def _metrics(index: Index, leaked: Sequence[Text], short: int, reader: Reader) -> dict[str, Any]:
    names = {t.words for t in leaked}
    share = ratio_estimate([t.words in names for t in index.texts]) if leaked else None
    return {
        "texts": len(index.texts),
        "leaked": len(leaked),
        "exact": sum(t.exact for t in leaked),
        "share": share.value if share else 0.0,
        "low": share.low if share else None,
        "high": share.high if share else None,
        "too_short": short,
        "train_records": reader.stats.read,
        "refused": reader.stats.refused,
    }


def _say(run: Run[LeakParams], metrics: dict[str, Any]) -> None:
    run.log.info(
        "%d of %d texts leaked (%d exactly) into %d records; %d texts shorter than %d words not looked for",
        metrics["leaked"], metrics["texts"], metrics["exact"], metrics["train_records"], metrics["too_short"],
        run.params.min_words,
    )  # fmt: skip
    run.log.info("none found is no evidence of absence: paraphrases and translations are not seen")
