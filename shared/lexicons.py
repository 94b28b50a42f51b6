"""Lists of terms that name groups of people, by axis and language, each with its licence and source.

A list is a tab-separated file: lines ``# licence: …`` and ``# source: …``, a header, one term a line.

=========  ==========================================================================================
column     meaning
=========  ==========================================================================================
term       a word or phrase in lower case
group      the group that it names; ``-`` for a phrase that is no mention (``king size``)
slot       the meaning that counterparts of several groups share (``church`` and ``mosque``); may be empty
flags      ``capital``: a mention only where the text has a capital; ``word``: also an ordinary word
weight     1 if not given
=========  ==========================================================================================

Names have ``count``, ``female_share`` and ``ethnicity`` in place of slot and weight.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from tuneutils.shared.errors import ExitCode, ToolError, nearest

#: The group of phrases that name nobody.
NO_GROUP = "-"
FLAGS = ("capital", "word", "place", "british")
_TERM_COLUMNS = ("term", "group", "slot", "flags", "weight")
_NAME_COLUMNS = ("term", "group", "count", "female_share", "ethnicity", "flags")


@dataclass(frozen=True)
class Term:
    """One term of a lexicon; ``text`` is in lower case."""

    text: str
    group: str
    slot: str = ""
    flags: frozenset[str] = frozenset()
    weight: float = 1.0


@dataclass(frozen=True)
class Name:
    """A first name in lower case.

    Attributes:
        count: people of that name in the source's records.
        female_share: share of women among them.
        ethnicity: the one group whose list has it, or the empty string.
        flags: ``word`` and ``place`` where it is that as well.
    """

    text: str
    count: int
    female_share: float
    ethnicity: str = ""
    flags: frozenset[str] = frozenset()

    @property
    def group(self) -> str:
        """``female`` from a share of .9, ``male`` up to .1, else ``either``."""
        return "female" if self.female_share >= 0.9 else "male" if self.female_share <= 0.1 else "either"


@dataclass(frozen=True)
class Lexicon:
    """The terms of one axis in one language."""

    name: str
    language: str
    terms: tuple[Term, ...]
    licence: str
    source: str

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups in their order of appearance, without ``-``."""
        return tuple(dict.fromkeys(t.group for t in self.terms if t.group != NO_GROUP))

    @property
    def by_text(self) -> Mapping[str, tuple[Term, ...]]:
        """Every term of each text: ``her`` is two, ``object`` and ``possessive``."""
        return _by_text(self)

    def counterparts(self, term: Term) -> dict[str, Term]:
        """The first term of the same slot in every other group; empty for a term without a slot."""
        return {g: t for g, t in _by_slot(self).get(term.slot, {}).items() if g != term.group}

    def pairs(self, group: str, other: str) -> Iterator[tuple[Term, Term]]:
        """Each term of ``group`` with its counterpart in ``other``, in the list's order."""
        for term in self.terms:
            if term.group == group and (found := self.counterparts(term).get(other)):
                yield term, found


@lru_cache(maxsize=32)
def _by_text(lexicon: Lexicon) -> dict[str, tuple[Term, ...]]:
    found: dict[str, tuple[Term, ...]] = {}
    for term in lexicon.terms:
        found[term.text] = (*found.get(term.text, ()), term)
    return found


@lru_cache(maxsize=32)
def _by_slot(lexicon: Lexicon) -> dict[str, dict[str, Term]]:
    found: dict[str, dict[str, Term]] = {}
    for term in lexicon.terms:
        if term.slot and term.group != NO_GROUP:
            found.setdefault(term.slot, {}).setdefault(term.group, term)
    return found


def available() -> dict[str, tuple[str, ...]]:
    """The axes that ship, each with its languages; ``names`` is no axis and not among them."""
    found: dict[str, tuple[str, ...]] = {}
    for name in sorted(p.name for p in _folder().iterdir() if p.name.endswith(".tsv")):
        axis, language, _ = name.split(".")
        if axis != "names":
            found[axis] = (*found.get(axis, ()), language)
    return found


@lru_cache(maxsize=64)
def load(name: str, language: str = "en") -> Lexicon:
    """The lexicon of an axis: gender, ethnicity, religion, age, disability, orientation, nationality, ses.

    Raises:
        ToolError: there is none of that name or in that language (2).
    """
    known = available()
    if name not in known:
        raise ToolError(
            f"no lexicon {name!r}{nearest(name, known)}; there are {', '.join(known)}", code=ExitCode.USAGE
        )
    if language not in known[name]:
        raise ToolError(
            f"the lexicon {name!r} has no language {language!r}; it has {', '.join(known[name])}",
            code=ExitCode.USAGE,
        )
    text = (_folder() / f"{name}.{language}.tsv").read_text(encoding="utf-8")
    return _parse(text, f"{name}.{language}.tsv", name, language)


def load_file(path: str | os.PathLike[str], language: str = "en") -> Lexicon:
    """A list of one's own in the same format; the axis is the file's name up to the first dot.

    Raises:
        ToolError: it cannot be read (66), or a line is wrong, by its number (65).
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as exc:
        reason = (exc.strerror or "").lower()
        raise ToolError(f"{path}: cannot read: {reason}", code=ExitCode.MISSING_INPUT) from exc
    except UnicodeDecodeError as exc:
        raise ToolError(f"{path}: not UTF-8: byte 0x{exc.object[exc.start]:02x} at {exc.start}") from exc
    return _parse(text, str(path), file.name.split(".")[0], language)


@lru_cache(maxsize=4)
def load_names(language: str = "en") -> tuple[Name, ...]:
    """First names, the most frequent first, then those that only the ethnicity lists have.

    Raises:
        ToolError: no names in that language (2).
    """
    at = _folder() / f"names.{language}.tsv"
    if not at.is_file():
        raise ToolError(f"no list of names in {language!r}; there is en", code=ExitCode.USAGE)
    names = []
    for _, row in _rows(at.read_text(encoding="utf-8"), at.name, _NAME_COLUMNS)[1]:
        flags = frozenset(row["flags"].split())
        names.append(
            Name(row["term"], int(row["count"]), float(row["female_share"]), row["ethnicity"], flags)
        )
    return tuple(names)


def names_lexicon(by: str = "gender", language: str = "en") -> Lexicon:
    """The names as a lexicon: by ``gender`` (female and male) or by ``ethnicity``.

    Names of either gender and names under no or several ethnicities are left out; all are ``capital``.
    """
    header, _ = _rows(
        (_folder() / f"names.{language}.tsv").read_text(encoding="utf-8"), "names", _NAME_COLUMNS
    )
    terms = []
    for name in load_names(language):
        group = name.group if by == "gender" else name.ethnicity
        if group not in ("", "either"):
            terms.append(Term(name.text, group, "", name.flags | {"capital"}))
    return Lexicon(f"names-{by}", language, tuple(terms), header["licence"], header["source"])


def _folder() -> Path:
    return Path(str(files("tuneutils.shared"))) / "lexicons_data"


def _parse(text: str, place: str, name: str, language: str) -> Lexicon:
    header, rows = _rows(text, place, _TERM_COLUMNS)
    terms = tuple(_term(row, f"{place}:{number}") for number, row in rows)
    if not any(t.group != NO_GROUP for t in terms):
        raise ToolError(f"{place}: no terms")
    return Lexicon(name, language, terms, header.get("licence", "unknown"), header.get("source", place))


def _rows(
    text: str, place: str, columns: tuple[str, ...]
) -> tuple[dict[str, str], list[tuple[int, dict[str, str]]]]:
    """The header's keys, and the rows with their line numbers."""
    header: dict[str, str] = {}
    names: list[str] = []
    rows: list[tuple[int, dict[str, str]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("# ") and not names:
            key, _, value = line[2:].partition(":")
            header[key.strip()] = value.strip()
        elif not line.strip() or line.startswith("#"):
            continue
        elif not names:
            names = line.split("\t")
            _check_columns(names, columns, f"{place}:{number}")
        else:
            rows.append((number, _row(line, names, columns, f"{place}:{number}")))
    return header, rows


def _check_columns(names: list[str], columns: tuple[str, ...], place: str) -> None:
    for name in names:
        if name not in columns:
            raise ToolError(f"{place}: unknown column {name!r}{nearest(name, columns)}")
    for name in ("term", "group"):
        if name not in names:
            raise ToolError(f"{place}: needs tab-separated columns term and group; has {', '.join(names)}")


def _row(line: str, names: list[str], columns: tuple[str, ...], place: str) -> dict[str, str]:
    cells = line.split("\t")
    if len(cells) > len(names):
        raise ToolError(f"{place}: {len(cells)} cells under {len(names)} columns")
    row = dict.fromkeys(columns, "") | dict(zip(names, (c.strip() for c in cells)))
    if not row["term"] or not row["group"]:
        raise ToolError(f"{place}: needs a term and a group, separated by a tab: {line[:60]!r}")
    return row


def _term(row: dict[str, str], place: str) -> Term:
    flags = frozenset(row["flags"].split())
    for flag in flags:
        if flag not in FLAGS:
            raise ToolError(
                f"{place}: unknown flag {flag!r}{nearest(flag, FLAGS)}; known: {', '.join(FLAGS)}"
            )
    try:
        weight = float(row["weight"] or 1)
    except ValueError as exc:
        raise ToolError(f"{place}: weight must be a number, is {row['weight']!r}") from exc
    if not 0 <= weight < float("inf"):
        raise ToolError(f"{place}: weight must be finite and not negative, is {row['weight']}")
    return Term(row["term"].lower(), row["group"], row["slot"], flags, weight)
