"""Text out of one file's bytes: plain text, Markdown, HTML, PDF, manual pages, each also compressed.

What cannot be read raises ``Unreadable`` with the reason that the report counts.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from tuneutils.shared.errors import require
from tuneutils.shared.streams import open_binary
from tuneutils.tools.corpus_build.roff import looks_like_man, man_text

RECORDS = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".jsonl.zst", ".ndjson.zst", ".parquet")
PACKED = (".gz", ".zst")
_KINDS = {
    ".md": "markdown", ".markdown": "markdown", ".mdx": "markdown", ".html": "html", ".htm": "html",
    ".xhtml": "html", ".pdf": "pdf", ".txt": "text", ".text": "text", ".rst": "text", ".tex": "text",
}  # fmt: skip
_BOMS = (
    (b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe\x00\x00", "utf-32"), (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"),
)  # fmt: skip
_MAN_SUFFIX = re.compile(r"\.[1-9][a-z]*\Z")
_DROPPED = frozenset(
    [
        "script",
        "style",
        "noscript",
        "template",
        "nav",
        "aside",
        "footer",
        "form",
        "iframe",
        "svg",
        "button",
        "select",
        "object",
        "canvas",
        "head",
        "dialog",
        "menu",
    ]
)
_BLOCKS = frozenset(
    [
        "p",
        "div",
        "section",
        "article",
        "main",
        "header",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "ul",
        "ol",
        "dl",
        "li",
        "dt",
        "dd",
        "table",
        "tr",
        "blockquote",
        "pre",
        "figure",
        "figcaption",
        "hr",
        "address",
        "details",
        "summary",
        "body",
        "caption",
        "tbody",
        "thead",
    ]
)
_TIGHT = {"li", "tr", "dt", "dd", "br", "caption", "tbody", "thead"}


class Unreadable(Exception):
    """A file without text to be had; the argument is the reason, a few words."""


def record_stream(name: str) -> bool:
    """Whether a file holds records rather than one text."""
    return name.lower().endswith(RECORDS)


def read_limited(path: Path, limit_bytes: int) -> bytes:
    """A file's bytes, decompressed.

    Raises:
        Unreadable: more than ``limit_bytes`` (a large file or a zip bomb), damaged, or not permitted.
    """
    packed = str(path).endswith(PACKED)
    try:
        if not packed and path.stat().st_size > limit_bytes:
            raise Unreadable("too large")
        with open_binary(str(path)) as source:
            data = _read(source, limit_bytes)
    except (EOFError, zlib.error) as exc:
        raise Unreadable("damaged compression") from exc
    except OSError as exc:
        raise Unreadable("damaged compression" if exc.errno is None else "cannot be read") from exc
    if len(data) > limit_bytes:
        raise Unreadable("expands beyond the limit" if packed else "too large")
    return data


def _read(source: IO[bytes], limit: int) -> bytes:
    """Up to one byte more than the limit, in steps: what decompresses without end is never held."""
    pieces, size = [], 0
    while size <= limit:
        piece = source.read(min(1 << 20, limit + 1 - size))
        if not piece:
            break
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)


def kind_of(name: str, head: bytes) -> str:
    """``text``, ``markdown``, ``html``, ``pdf`` or ``man``, by ending, else by how it begins.

    Raises:
        Unreadable: neither says that it is text.
    """
    lower = name.lower()
    for ending in PACKED:
        lower = lower.removesuffix(ending)
    if head.startswith(b"%PDF-"):
        return "pdf"
    if any(head.startswith(bom) for bom, _ in _BOMS):
        return _KINDS.get(Path(lower).suffix, "text")
    if b"\0" in head and not _utf16_without_mark(head):
        raise Unreadable("binary")
    kind = _KINDS.get(Path(lower).suffix)
    if kind == "pdf":
        raise Unreadable("damaged PDF")
    if kind is not None:
        return kind
    start = head[:1024].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "html"
    if _MAN_SUFFIX.search(lower) and looks_like_man(head.decode("latin-1")):
        return "man"
    controls = sum(b < 9 or 13 < b < 27 for b in head)
    if controls > 0.02 * len(head):
        raise Unreadable("binary")
    return "text"


def _utf16_without_mark(head: bytes) -> str | None:
    odd, even = head[1::2].count(0), head[0::2].count(0)
    if odd > 0.4 * len(head) / 2 and even < 0.05 * len(head):
        return "utf-16-le"
    if even > 0.4 * len(head) / 2 and odd < 0.05 * len(head):
        return "utf-16-be"
    return None


def decode(data: bytes) -> tuple[str, bool]:
    """Text, and whether it was clean UTF-8 (or marked as UTF-16 or 32).

    Otherwise each line is UTF-8 if it can be, else Windows-1252, else Latin-1: files of mixed encodings
    keep what each line says.
    """
    for bom, encoding in _BOMS:
        if data.startswith(bom):
            return data.decode(encoding, errors="replace"), True
    try:
        return data.decode("utf-8"), True
    except UnicodeDecodeError:
        pass
    wide = _utf16_without_mark(data[:8192])
    if wide:
        return data.decode(wide, errors="replace"), True
    return "".join(map(_decode_line, data.splitlines(keepends=True))), False


def _decode_line(line: bytes) -> str:
    for encoding in ("utf-8", "cp1252"):
        try:
            return line.decode(encoding)
        except UnicodeDecodeError:
            continue
    return line.decode("latin-1")


def text_of(kind: str, data: bytes) -> tuple[str, bool]:
    """The text of a file's bytes, and whether its encoding was clean.

    Raises:
        Unreadable: encrypted, damaged or without text.
    """
    if kind == "pdf":
        return _checked(pdf_text, data), True
    if kind == "html":
        return _checked(html_text, data), True
    text, clean = decode(data)
    if kind == "man":
        text = man_text(text)
    elif kind == "markdown":
        text = markdown_text(text)
    return text, clean


def _checked(extract: Callable[[bytes], str], data: bytes) -> str:
    """Parsers of others raise what they like on damaged files; the file is then named, not the run ended."""
    try:
        return extract(data)
    except Unreadable:
        raise
    except RecursionError as exc:
        raise Unreadable("nested too deeply") from exc
    except Exception as exc:
        raise Unreadable(f"damaged ({type(exc).__name__})") from exc


def markdown_text(text: str) -> str:
    """Markdown as it is, without front matter and comments."""
    text = re.sub(r"\A---\n.*?\n(?:---|\.\.\.)\n", "", text, count=1, flags=re.DOTALL)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL) if "<!--" in text else text


def html_text(data: bytes) -> str:
    """The text of a page: its main part where it names one; without navigation, scripts and forms."""
    require("lxml", "corpus")
    from lxml import etree, html

    if not data.strip():
        return ""
    text, clean = decode(data)
    declared = re.search(rb"charset=[\"']?([\w-]+)", data[:2048])
    if not clean and declared:
        with suppress(LookupError):
            text = data.decode(declared.group(1).decode("ascii"), errors="replace")
    text = re.sub(r"\A\s*<\?xml[^>]*\?>", "", text).replace("\0", "")
    tree = html.document_fromstring(text, parser=html.HTMLParser(huge_tree=True))
    mains = tree.xpath('//main|//*[@role="main"]|//article')
    root = mains[0] if len(mains) == 1 else tree
    return _layout(etree.iterwalk(root, events=("start", "end", "comment", "pi")))


def _layout(walk: Any) -> str:
    pieces: list[str] = []
    verbatim = 0

    def add(text: str | None) -> None:
        if text:
            pieces.append(text if verbatim else re.sub(r"\s+", " ", text))

    for event, element in walk:
        tag = element.tag
        if event in ("comment", "pi") or not isinstance(tag, str):
            add(element.tail)
            continue
        gap = "\n" if tag in _TIGHT else "\n\n" if tag in _BLOCKS else ""
        if event == "start":
            if tag in _DROPPED:
                walk.skip_subtree()
                continue
            pieces.append(gap)
            verbatim += tag == "pre"
            add(element.text)
        else:
            verbatim -= tag == "pre"
            pieces.append(
                "\t" if tag in ("td", "th") else gap if gap == "\n\n" and tag not in _DROPPED else ""
            )
            add(element.tail)
    text = re.sub(r"[ \t]*\n(?:[ \t]*\n)+", "\n\n", "".join(pieces))
    return "\n".join(
        line.rstrip() if line[:2].isspace() else line.strip() for line in text.split("\n")
    ).strip("\n")


def pdf_text(data: bytes) -> str:
    """The text layer of a PDF, its lines joined to paragraphs.

    Raises:
        Unreadable: it needs a password, or has no text (a scan).
    """
    require("pypdf", "corpus")
    import logging

    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    reader = pypdf.PdfReader(io.BytesIO(data), strict=False)
    if reader.is_encrypted and not reader.decrypt(""):
        raise Unreadable("needs a password")
    pages = [page.extract_text() or "" for page in reader.pages]
    text = "\n\n".join(_joined_lines(page) for page in pages if page.strip())
    if not text.strip():
        raise Unreadable("PDF without text")
    return text


def _joined_lines(page: str) -> str:
    """Lines that go on are joined, a word parted by a hyphen is put together."""
    lines = [line.strip() for line in page.split("\n")]
    full = 0.6 * max(map(len, lines), default=0)
    made: list[str] = []
    goes_on = False
    for line in lines:
        if goes_on and line and made:
            hyphen = made[-1].endswith("-") and line[:1].islower() and made[-1][-2:-1].isalpha()
            made[-1] = made[-1][:-1] + line if hyphen else f"{made[-1]} {line}"
        else:
            made.append(line)
        goes_on = len(line) >= full and not line.endswith((".", "!", "?", ":"))
    return "\n".join(made)


def cut(text: str, limit_bytes: int) -> Iterator[str]:
    """A text in pieces of at most ``limit_bytes`` of UTF-8, parted between paragraphs where it can be."""
    limit = max(limit_bytes // 4, 1) if not text.isascii() else limit_bytes
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n\n", start + limit // 2, start + limit)
        end = end if end > 0 else text.rfind("\n", start + limit // 2, start + limit)
        end = end if end > 0 else text.rfind(" ", start + limit // 2, start + limit)
        end = end if end > 0 else start + limit
        yield text[start:end]
        start = end
    yield text[start:]
