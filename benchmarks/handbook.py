"""The prose of The Debian Administrator's Handbook as records, a page each, to calibrate and to judge on.

    python benchmarks/handbook.py -o artifacts/handbook.jsonl
    data-import artifacts/handbook.jsonl --split calibration=0.5,heldout=0.5 -o artifacts/handbook

The text is downloaded as Debian's package ``debian-handbook`` (GPL-2+ or CC-BY-SA-3.0). Headings and
paragraphs are taken; listings of commands, navigation and pages of fewer than 400 characters are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from html.parser import HTMLParser
from pathlib import Path

from tuneutils.shared.sources import resolve

SOURCE = "deb:debian-handbook!/usr/share/doc/debian-handbook/html/en-US/*.html"
SHORTEST = 400
VOID = {"img", "br", "hr", "meta", "link", "input"}


class Prose(HTMLParser):
    """Collects the text of ``<div class="para">`` and of headings.

    Attributes:
        parts: texts in the page's order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._open: list[str] = []  # of each open element: "take", "skip" or "" (as its parent)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in VOID:
            return
        kind = dict(attrs).get("class") or ""
        if tag == "pre" or kind in ("screen", "docnav"):
            self._open.append("skip")
        elif (tag == "div" and kind == "para") or tag in ("h1", "h2", "h3", "h4"):
            self._open.append("take")
            self.parts.append("")
        else:
            self._open.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """XHTML's empty elements hold no text."""

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID and self._open:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if next((kind for kind in reversed(self._open) if kind), "skip") == "take":
            self.parts[-1] += data


def prose(page: str) -> str:
    parser = Prose()
    parser.feed(page)
    return "\n\n".join(text for part in parser.parts if (text := " ".join(part.split())))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--source", default=SOURCE)
    args = parser.parse_args()
    pages = [prose(path.read_text(encoding="utf-8")) for path in resolve(args.source, "dataset").paths]
    kept = [page for page in pages if len(page) >= SHORTEST]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("".join(json.dumps({"text": page}) + "\n" for page in kept), encoding="utf-8")
    print(f"{len(kept)} of {len(pages)} pages, {sum(map(len, kept))} characters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
