"""The conversation so far, kept in a file after each turn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuneutils.shared.errors import ToolError
from tuneutils.shared.files import atomic_file
from tuneutils.shared.records import check_messages

Message = dict[str, Any]


@dataclass
class History:
    """Messages, and the JSONL file that they are written to (a message a line), if there is one."""

    path: Path | None = None
    messages: list[Message] = field(default_factory=list)

    @classmethod
    def open(cls, path: str | None) -> History:
        """Read the file, if it is there.

        Raises:
            ToolError: a line is no message (65).
        """
        if path is None:
            return cls()
        made = cls(Path(path))
        if made.path is not None and made.path.exists():
            made.messages = list(_lines(made.path))
        return made

    def add(self, *messages: Message) -> None:
        """Put messages to the end, in memory and in the file."""
        self.messages += messages
        self._write()

    def undo(self) -> str | None:
        """Take back the last turn of the user and what followed; gives what the user had said."""
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            return None
        at = asked[-1]
        said = str(self.messages[at]["content"])
        del self.messages[at:]
        self._write()
        return said

    def clear(self) -> None:
        """Forget all."""
        self.messages = []
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        text = "".join(json.dumps(m, ensure_ascii=False) + "\n" for m in self.messages)
        with atomic_file(self.path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _lines(path: Path) -> Iterator[Message]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            message = json.loads(line)
            check_messages("messages", [message])
        except ValueError as exc:
            raise ToolError(f"{path}:{number}: no message with role and content: {exc}") from exc
        yield message
