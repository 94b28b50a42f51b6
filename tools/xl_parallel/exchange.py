"""Translation memories (TMX 1.4b) and XLIFF 1.2 and 2.x: units with a text in each language."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tuneutils.shared.errors import ToolError

_LANG = "{http://www.w3.org/XML/1998/namespace}lang"
#: Inline elements that stand for a piece of code; XLIFF names it in ``id``.
_CODES = {"x", "ph", "bx", "ex", "sc", "ec", "cp"}
#: Elements whose content is native code, not text.
_NATIVE = {"bpt", "ept", "it", "ut"}


def units(path: Path) -> Iterator[dict[str, str]]:
    """Texts by language, one dictionary a translation unit.

    A placeholder becomes ``{id}``, so that it can be compared across languages; formatting codes go.

    Raises:
        ToolError: not well-formed, with line and column, or neither TMX nor XLIFF (65).
    """
    try:
        yield from _read(path)
    except ElementTree.ParseError as exc:
        raise ToolError(f"{path}: not well-formed XML: {exc}") from exc


def _read(path: Path) -> Iterator[dict[str, str]]:
    languages: dict[str, str] = {}
    root = None
    for event, element in ElementTree.iterparse(path, events=("start", "end")):
        name = _local(element)
        if event == "start":
            if root is None:
                root = name
                if root not in ("tmx", "xliff"):
                    raise ToolError(f"{path}: its root is <{root}>, neither <tmx> nor <xliff>")
            languages.update(_declared(element))
        elif name == "tu":
            texts = {_of(tuv): _segment(tuv) for tuv in _children(element, "tuv")}
            yield {lang: text for lang, text in texts.items() if lang and text}
            element.clear()
        elif name in ("trans-unit", "segment"):
            yield _bilingual(element, languages)
            element.clear()


def _declared(element: Any) -> dict[str, str]:
    """Source and target language, as XLIFF 1.2 (``source-language``) or 2.x (``srcLang``) says."""
    names = {"source": ("source-language", "srcLang"), "target": ("target-language", "trgLang")}
    return {side: element.get(n) for side, some in names.items() for n in some if element.get(n)}


def _bilingual(unit: Any, languages: dict[str, str]) -> dict[str, str]:
    made = {}
    for side in ("source", "target"):
        for child in _children(unit, side)[:1]:
            lang = child.get(_LANG) or languages.get(side)
            if lang and (text := _text(child).strip()):
                made[lang] = text
    return made


def _of(tuv: Any) -> str | None:
    return tuv.get(_LANG) or tuv.get("lang")


def _segment(tuv: Any) -> str:
    return "".join(_text(seg) for seg in _children(tuv, "seg")).strip()


def _text(element: Any) -> str:
    parts = [element.text or ""]
    for child in element:
        name = _local(child)
        if name in _CODES:
            inner = "".join(child.itertext())
            parts.append(inner or f"{{{child.get('id') or child.get('x') or ''}}}")
        elif name not in _NATIVE:
            parts.append(_text(child))
        parts.append(child.tail or "")
    return "".join(parts)


def _children(element: Any, name: str) -> list[Any]:
    return [child for child in element if _local(child) == name]


def _local(element: Any) -> str:
    return str(element.tag).rpartition("}")[2]
