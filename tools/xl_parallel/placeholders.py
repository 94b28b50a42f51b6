"""What a translation must keep as it is: placeholders, and numbers whatever their separators."""

from __future__ import annotations

import re
import unicodedata

#: printf's and Python's conversions; ``{name}``, ``{{name}}``, ``${name}``, ``$NAME``; tags; entities.
PLACEHOLDER = re.compile(
    r"%%|%(?:\d+\$)?(?:\([^)\s]*\))?[-+#0]?(?:\d+|\*)?(?:\.(?:\d+|\*))?(?:hh|h|ll|l|j|z|t|L|q)?[diouxXeEfFgGaAcspn@m]"
    r"(?![^\W\d_])|\$?\{\{?[\w.:!\[\]-]*\}?\}|\$[A-Z_][A-Z0-9_]*|</?[A-Za-z][\w:.-]*(?:\s+[\w:.-]+=(?:\"[^\"]*\"|'[^']*'|[^\s<>]+))*\s*/?>|&(?:\w+|\#\d+);"
)
#: What no pair without a placeholder has.
MARKERS = "%{$<&"
_VOID = ("br", "hr", "p", "li", "img")
_NUMBER = re.compile(r"\d+(?:[.,'’\u066b\u066c]\d+|[ \u00a0\u2009\u202f]\d{3}(?!\d))*")
_SEPARATOR = re.compile(r"\D+")


def placeholders(text: str) -> list[str]:
    """The placeholders, sorted; an argument's number (``%2$s``) is left out, as its order may change.

    ``<file>`` without a ``</file>`` is a word for the reader, and none.
    """
    found = (re.sub(r"^%\d+\$", "%", m) for m in PLACEHOLDER.findall(text))
    return sorted(m for m in found if not _is_word(m, text))


def _is_word(found: str, text: str) -> bool:
    name = found[1:-1]
    return found.startswith("<") and name.isalpha() and name not in _VOID and f"</{name}>" not in text


def numbers(text: str) -> list[str]:
    """The numbers outside placeholders, sorted: decimal digits of any script, without separators."""
    plain = PLACEHOLDER.sub(" ", text) if any(c in text for c in MARKERS) else text
    return sorted(_digits(m) for m in _NUMBER.findall(plain))


def _digits(number: str) -> str:
    if number.isdecimal() and number.isascii():
        return number
    joined = _SEPARATOR.sub("", number)
    if joined.isascii():
        return joined
    return "".join(str(unicodedata.decimal(c, c)) for c in joined)
