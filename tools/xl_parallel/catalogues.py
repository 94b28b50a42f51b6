"""gettext catalogues: what a program says in its own language and in others, joined by message."""

from __future__ import annotations

import gettext
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tuneutils.shared.errors import ToolError, require

#: A message: domain, context, English (or whatever the programmers wrote), and which plural form it is.
Key = tuple[str, str, str, int]

_LANGUAGE = re.compile(r"[a-z]{2,3}(_[A-Z][A-Za-z]+)?(@[a-z]+)?")
_ACCELERATOR = re.compile(r"(?<![\w_])_(?=\w)|(?<=\w)_(?=\w)|(?<!&)&(?=\w)(?![a-z]+;)")
_TRAILING = re.compile(r"\s*\([_&]\w\)")


def language_of(path: Path, catalogue: Any = None) -> str | None:
    """By the folder (``…/es/LC_MESSAGES/x.mo``), the file's name (``es.po``), or the header."""
    installed = path.parent.name == "LC_MESSAGES"
    for part in (path.parent.parent.name,) if installed else (path.stem, path.parent.name):
        if part not in ("po", "doc") and _LANGUAGE.fullmatch(part):
            return part
    declared = catalogue.metadata.get("Language", "") if catalogue is not None else ""
    return declared or None


def domain_of(path: Path) -> str:
    """What a message belongs to: the catalogue's name, or its folder where that is the language."""
    if path.parent.name != "LC_MESSAGES" and _LANGUAGE.fullmatch(path.stem):
        return path.parent.name
    return path.stem


def load(path: Path) -> Any:
    """The catalogue by polib.

    Raises:
        ToolError: not a catalogue, or not in the character set that it declares (65).
    """
    require("polib", "parallel")
    import polib

    try:
        return polib.pofile(str(path)) if path.suffix == ".po" else polib.mofile(str(path))
    except (OSError, UnicodeDecodeError, ValueError, LookupError, IndexError) as exc:
        reason = " ".join(str(exc).split())[:120] or type(exc).__name__
        raise ToolError(f"{path}: not a gettext catalogue that can be read: {reason}") from exc
    except Exception as exc:
        if type(exc).__module__ != "struct":
            raise
        raise ToolError(f"{path}: damaged gettext catalogue: {exc}") from exc


def messages(path: Path, accelerators: bool) -> Iterator[tuple[Key, str, str]]:
    """Each translated message as its key, the original and the translation.

    A message with plurals gives the singular with the form that the language uses for 1, and the plural with
    each other form; a language with one form gives the plural alone. Fuzzy and obsolete ones are left out.

    Args:
        accelerators: keep the marks of keyboard shortcuts (``_File``, ``&File``, ``(_F)``).
    """
    catalogue = load(path)
    domain = domain_of(path)
    singular = _singular_form(catalogue.metadata.get("Plural-Forms", ""))
    for entry in catalogue:
        if not entry.msgid or entry.obsolete or "fuzzy" in entry.flags:
            continue
        for form, original, translation in _forms(entry, singular):
            if original.strip() and translation.strip():
                key = (domain, entry.msgctxt or "", entry.msgid, form)
                pair = (original, translation) if accelerators else _plain(original, translation)
                yield key, *pair


def _forms(entry: Any, singular: int | None) -> Iterator[tuple[int, str, str]]:
    if not entry.msgid_plural:
        yield 0, entry.msgid, entry.msgstr
        return
    for form, text in sorted((int(k), v) for k, v in entry.msgstr_plural.items()):
        yield form, entry.msgid if form == singular else entry.msgid_plural, text


def _singular_form(header: str) -> int | None:
    """The form for n = 1 by the header's C expression; None where it serves other numbers just as well."""
    expression = re.search(r"plural\s*=\s*([^;]+)", header)
    try:
        choose = gettext.c2py(expression.group(1)) if expression else (lambda n: int(n != 1))
        form = choose(1)
        return None if form == choose(2) == choose(5) else int(form)
    except ValueError:
        return 0


def _plain(original: str, translation: str) -> tuple[str, str]:
    """Without the accelerator, where both sides have at most one mark and the original has it."""
    marks = [len(_ACCELERATOR.findall(t)) for t in (original, translation)]
    if marks[0] != 1 or marks[1] > 1:
        return original, translation
    return _ACCELERATOR.sub("", original), _ACCELERATOR.sub("", _TRAILING.sub("", translation))


def same_language(wanted: str, found: str) -> bool:
    """``es`` is es and es_ES; ``pt_BR`` (or pt-BR) only itself."""
    wanted, found = wanted.replace("-", "_"), found.replace("-", "_")
    return wanted == found or ("_" not in wanted and found.partition("_")[0] == wanted and "@" not in found)


def pairs(
    paths: Sequence[Path], src_lang: str, tgt_langs: Sequence[str], catalogue_lang: str, accelerators: bool
) -> Iterator[tuple[str, str, str, str]]:
    """``(origin, source, target, target language)`` of every message in both languages.

    Languages other than the catalogues' own meet in the same message of the same domain. Of ``es`` and
    ``es_MX`` only the first is es, unless it is missing in that domain.
    """
    by_language: dict[str, list[Path]] = {lang: [] for lang in (src_lang, *tgt_langs)}
    for lang, chosen in by_language.items():
        best: dict[str, Path] = {}
        for path in sorted(paths, key=lambda p: (len(language_of(p) or ""), str(p))):
            found = language_of(path) or language_of(path, load(path)) or ""
            if same_language(lang, found):
                best.setdefault(f"{domain_of(path)}", path)
        chosen.extend(best[d] for d in sorted(best))
    originals = None
    if src_lang != catalogue_lang:
        originals = {
            key: text for path in by_language[src_lang] for key, _, text in messages(path, accelerators)
        }
    for lang in tgt_langs:
        if lang == catalogue_lang:
            for path in by_language[src_lang]:
                for key, original, translation in messages(path, accelerators):
                    yield key[0], translation, original, lang
            continue
        for path in by_language[lang]:
            for key, original, translation in messages(path, accelerators):
                if originals is None:
                    yield key[0], original, translation, lang
                elif key in originals:
                    yield key[0], originals[key], translation, lang
