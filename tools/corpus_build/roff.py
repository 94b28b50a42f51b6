"""Manual pages: the text of man(7) and mdoc(7) sources, without a formatter."""

from __future__ import annotations

import re

_ESCAPES = {
    "-": "-",
    "e": "\\",
    " ": " ",
    "~": " ",
    "0": " ",
    "`": "`",
    "'": "'",
    "t": " ",
    "E": "\\",
    ".": ".",
}
_ESCAPES |= dict.fromkeys("&|^c%/,:){}pdu", "")
_GLYPH_PAIRS = r"""
    aq ' dq " lq “ rq ” oq ‘ cq ’ em — en – hy - bu • co © rg ® tm ™ mu × de ° -> → <- ← lt < gt >
    ti ~ ha ^ rs \ sl / ga ` aa ´ sc § <= ≤ >= ≥ != ≠ +- ± L" “ R" ” Fo « Fc » ss ß oe œ ae æ Po £
    Eu € ba |
"""
_GLYPHS = dict(zip(_GLYPH_PAIRS.split()[::2], _GLYPH_PAIRS.split()[1::2], strict=True))
_ESCAPE = re.compile(
    r"\\(?:f(?:\[[^\]]*\]|\(..|.)|s(?:\[[^\]]*\]|\([+-]?\d\d|[+-]?\d\d?)|\*(?:\[(?P<str>[^\]]*)\]|\((?P<str2>..)|.)"
    r"|\[(?P<name>[^\]]*)\]|\((?P<two>..)|[hvwlLDXbozZNRMmFgkAB]'[^']*'|n(?:\[[^\]]*\]|\(..|.)|(?P<one>.))"
)
_COMMENT = re.compile(r"\\[\"#].*")
_HEADINGS = {"SH", "SS", "Sh", "Ss"}
_PARAGRAPHS_NAMES = """
    PP P LP TP TQ IP HP Pp sp It Bl El RS RE YS SY D1 Bd Ed
    """
_PARAGRAPHS = frozenset(_PARAGRAPHS_NAMES.split())
_SHOWN_NAMES = """
    B I BR BI IB IR RB RI SM SB R OP MR UR MT YS SY Nm Ar Cm Fl Op Pa Xr Dq Sq Qq Ql Li Em Sy Va Vt
    Fn Fa Ft Ev Nd Ns Pq Aq Bq Brq Dv Er Ic In Lk Mt No An St Ux Tn D1 It IP Dl Fx Ox Nx Bx Lb Rv Ad
    Cd Ms Oc Oo Po Pc
    """
_SHOWN = frozenset(_SHOWN_NAMES.split())
_JOINED = {"BR", "BI", "IB", "IR", "RB", "RI"}  # their arguments take turns in two fonts, without spaces
_IGNORED_BLOCKS = {"de", "de1", "am", "ig", "TS"}  # a macro's definition; a table's layout


def looks_like_man(head: str) -> bool:
    """Whether a source begins as manual pages do."""
    return bool(re.search(r"^\.(?:TH|Dd|Dt|so) ", head[:8000], re.MULTILINE))


def man_text(source: str) -> str:
    """Headings, paragraphs and tagged lists as plain text; formatting macros and escapes are resolved."""
    writer = _Writer()
    skip_until: str | None = None
    for raw in source.replace("\\\n", "").split("\n"):
        if skip_until is not None:
            if raw.startswith(skip_until):
                skip_until = None
            continue
        line = _COMMENT.sub("", raw)
        if line[:1] in (".", "'") and (match := re.match(r"[.'][ \t]*([A-Za-z0-9]+)?[ \t]*(.*)", line)):
            macro, rest = match.group(1) or "", match.group(2)
            if macro in _IGNORED_BLOCKS:
                skip_until = ".TE" if macro == "TS" else ".."
                continue
            writer.macro(macro, rest)
        elif not line.strip():
            writer.paragraph()
        else:
            writer.text(unescape(line))
    return writer.result()


def unescape(text: str) -> str:
    """roff's escape sequences as characters; those that only format as nothing."""

    def one(match: re.Match[str]) -> str:
        name = match.group("name") or match.group("two")
        if name:
            if re.fullmatch(r"u[0-9A-Fa-f]{4,6}", name):
                code = int(name[1:], 16)
                return chr(code) if code < 0x110000 and not 0xD800 <= code < 0xE000 else ""
            return _GLYPHS.get(name, name if len(name) == 1 else "")
        string = match.group("str") or match.group("str2")
        if string:
            return {"lq": "“", "rq": "”", "R": "®", "Tm": "™", "dq": '"'}.get(string, "")
        return _ESCAPES.get(match.group("one") or "", match.group("one") or "")

    return _ESCAPE.sub(one, text) if "\\" in text else text


def _arguments(rest: str) -> list[str]:
    found = re.findall(r'"((?:[^"]|"")*)"?|(\S+)', rest)
    return [unescape(quoted.replace('""', '"') or plain) for quoted, plain in found]


class _Writer:
    def __init__(self) -> None:
        self.done: list[str] = []
        self.line: list[str] = []
        self.verbatim = False
        self.tag_next = False
        self.name = ""

    def macro(self, name: str, rest: str) -> None:
        words = _arguments(rest)
        if name in ("TH", "Dt"):
            self.text(f"{words[0]}({words[1]})" if len(words) > 1 else " ".join(words))
            self.paragraph()
            return
        if name in _HEADINGS:
            self.paragraph()
            self.text(" ".join(words))
            self.paragraph()
            return
        if name in ("nf", "EX", "fi", "EE"):
            self.paragraph()
            self.verbatim = name in ("nf", "EX")
            return
        if name in ("br", "Pc"):
            self._end_line()
        if name in _PARAGRAPHS:
            self.paragraph()
        if name in ("TP", "TQ"):
            self.tag_next = True
            return
        if name == "IP":
            words = words[:1]
        if name == "Nm":
            self.name = words[0] if words else self.name
            words = words or [self.name]
        if name == "Fl" and words:
            words[0] = "-" + words[0]
        if name == "Xr" and len(words) > 1:
            words = [f"{words[0]}({words[1]})", *words[2:]]
        if name in _SHOWN and words:
            self.text(("" if name in _JOINED else " ").join(words))
            if name in ("IP", "It"):
                self._end_line()

    def text(self, text: str) -> None:
        if not text.strip():
            return
        self.line.append(text if self.verbatim else text.strip())
        if self.verbatim or self.tag_next:
            self.tag_next = False
            self._end_line()

    def _end_line(self) -> None:
        if self.line:
            self.done.append(" ".join(self.line))
            self.line = []

    def paragraph(self) -> None:
        self._end_line()
        if self.done and self.done[-1]:
            self.done.append("")

    def result(self) -> str:
        self._end_line()
        return "\n".join(self.done).strip()
