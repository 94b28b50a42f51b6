"""Spanish and French through Apertium: its analyses say what agrees, its generators write the new forms.

Needs the commands ``lt-proc`` and ``apertium-tagger`` and the data of the pair fr-es (Debian: ``apertium``
and ``apertium-fr-es``). They run as processes of their own for as long as the tool does.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import IO

from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.tools.cf_augment.outcome import Undecided

#: Language → direction whose analyser reads it, and the one whose generator writes it.
DIRECTIONS = {"es": ("es-fr", "fr-es"), "fr": ("fr-es", "es-fr")}
_PIPE = 1 << 13
_UNIT = re.compile(r"\^((?:[^$\\]|\\.)*)\$")
_SPECIAL = re.compile(r"([\\^$/<>{}\[\]@~])")


@dataclass(frozen=True)
class Unit:
    """A word or mark of a text.

    Attributes:
        start, end: in characters of the text.
        surface: as written.
        lemma: in the surface's casing.
        tags: ``("n", "m", "sg")``; empty for an unknown word.
        before: what is joined in front, as *a* in *al*: lemma with tags, ready to be generated.
    """

    start: int
    end: int
    surface: str
    lemma: str
    tags: tuple[str, ...]
    before: str = ""

    def with_gender(self, gender: str) -> Unit:
        return replace(self, tags=tuple(gender if t in ("m", "f", "mf") else t for t in self.tags))

    @property
    def code(self) -> str:
        tags = "".join(f"<{t}>" for t in self.tags)
        return f"{self.before}^{_escaped(self.lemma)}{tags}$" if tags else _escaped(self.surface)


def _escaped(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", text)


class Apertium:
    """The analyser and generator of one language."""

    def __init__(self, language: str) -> None:
        reads, writes = DIRECTIONS[language]
        data = _data()
        analyser = ["lt-proc", "-z", str(data / f"{reads}.automorf.bin")]
        tagger = ["apertium-tagger", "-z", "-g", "-p", str(data / f"{reads}.prob")]
        generator = ["lt-proc", "-z", "-g", str(data / f"{writes}.autogen.bin")]
        contractor = ["lt-proc", "-z", "-p", str(data / f"{writes}.autopgen.bin")]
        self._read = _Chain([analyser, tagger])
        self._write = _Chain([generator, contractor])
        self._forms = lru_cache(maxsize=1 << 16)(self._write.ask)

    def analyse(self, text: str) -> list[Unit]:
        """The units of a text, each with the tagger's choice.

        Raises:
            Undecided: the analyser returned another text than it was given.
        """
        source = text.replace("\0", " ").replace("\n", " ")
        found, position = [], 0
        for match in _UNIT.finditer(self._read.ask(_escaped(source))):
            surface, _, analysis = _plain(match[1]).partition("/")
            start = source.find(surface, position)
            if start < 0:
                raise Undecided("analysis", f"Apertium lost {surface!r}")
            position = start + len(surface)
            if "œ" in surface and analysis.startswith("*"):  # its dictionary writes oe
                again = _UNIT.search(self._read.ask(_escaped(surface.replace("œ", "oe"))))
                analysis = _plain(again[1]).partition("/")[2] if again else analysis
            found.append(_unit(start, position, surface, analysis))
        return found

    def generate(self, coded: str) -> str:
        """Surface forms, contracted.

        Raises:
            Undecided: there is no such form.
        """
        written = self._forms(coded)
        if "#" in written or "@" in written:
            raise Undecided("no counterpart", f"Apertium has no form for {coded[:60]}")
        return _plain(written).replace("~", "")


def _plain(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)


def _unit(start: int, end: int, surface: str, analysis: str) -> Unit:
    if analysis.startswith("*") or not analysis:
        return Unit(start, end, surface, surface, ())
    *joined, last = analysis.split("+")
    before = "".join(f"^{part}$ " for part in joined)
    lemma, *tags = re.split("[<>]+", last.rstrip(">"))
    return Unit(start, end, surface, lemma, tuple(tags), before)


class _Chain:
    """Commands piped together that answer one text at a time, ended by a null byte."""

    def __init__(self, commands: Sequence[Sequence[str]]) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        source: int | IO[bytes] | None = subprocess.PIPE
        for command in commands:
            process = subprocess.Popen(
                command, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            self._processes.append(process)
            source = process.stdout

    def ask(self, text: str) -> str:
        first, last = self._processes[0].stdin, self._processes[-1].stdout
        assert first is not None
        assert last is not None
        data = text.encode("utf-8", "replace") + b"\n\0"
        sender = None
        if len(data) > _PIPE:  # the pipes would fill, and both sides wait
            sender = threading.Thread(target=_send, args=(first, data), daemon=True)
            sender.start()
        else:
            _send(first, data)
        answer = bytearray()
        while not answer.endswith(b"\0"):
            block = os.read(last.fileno(), 1 << 16)
            if not block:
                raise _ended()
            answer += block
        if sender is not None:
            sender.join()
        return answer[:-1].decode("utf-8").rstrip("\n")

    def __del__(self) -> None:
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
            process.terminate()


def _send(sink: IO[bytes], data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):  # the end of the answer says it
        sink.write(data)
        sink.flush()


def _ended() -> ToolError:
    return ToolError("apertium ended in mid-text; try: lt-proc -V", code=ExitCode.UNAVAILABLE)


def _data() -> Path:
    """The folder of the pair's data.

    Raises:
        ToolError: (69) a command or the data is not installed.
    """
    for command in ("lt-proc", "apertium-tagger"):
        if shutil.which(command) is None:
            raise ToolError(
                f"the command {command!r} is not installed; run: apt-get install apertium apertium-fr-es",
                code=ExitCode.UNAVAILABLE,
            )
    for root in ("/usr/share", "/usr/local/share"):
        folder = Path(root, "apertium", "apertium-fr-es")
        if folder.is_dir():
            return folder
    raise ToolError(
        "Apertium's data for fr-es are not installed; run: apt-get install apertium-fr-es",
        code=ExitCode.UNAVAILABLE,
    )
