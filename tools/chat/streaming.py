"""Text from tokens as they come: whole characters, up to a stop string, personal data masked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Emit = Callable[[str], object]
UNFINISHED = "\ufffd"


class TextStream:
    """Turns the tokens of one reply into pieces of text.

    What may still change is held back: a character of which some bytes are missing, what may be the
    beginning of a stop string, and with a masker what may grow into personal data.

    Args:
        tokenizer: its special tokens are left out of the text.
        emit: called with each new piece, never with an empty one.
        stop: strings that end the reply; they are not part of it.
        masker: a ``guarding.Masker``.

    Attributes:
        text: all that was emitted.
        stopped: a stop string has come.
    """

    def __init__(self, tokenizer: Any, emit: Emit, stop: Sequence[str] = (), masker: Any = None) -> None:
        self._tokenizer = tokenizer
        self._emit = emit
        self._stop = tuple(s for s in stop if s)
        self._masker = masker
        self._context: list[int] = []  # tokens whose text is known, and which the next ones may depend on
        self._new: list[int] = []  # tokens after them, whose text is not
        self._held = ""
        self.text = ""
        self.stopped = False

    def token(self, token: int) -> bool:
        """Take a token; true once a stop string has come."""
        if self.stopped:
            return True
        self._new.append(token)
        known, all_of_it = self._decode(self._context), self._decode(self._context + self._new)
        if all_of_it.endswith(UNFINISHED) and len(self._new) < 8:  # a character has at most four bytes
            return False
        piece = all_of_it[len(known) :]
        if piece:
            self._context, self._new = self._new, []
            self._take(piece)
        return self.stopped

    def finish(self) -> str:
        """Emit what was held back; gives the whole text."""
        if not self.stopped:
            rest = self._decode(self._context + self._new)[len(self._decode(self._context)) :]
            self._new = []
            self._take(rest, last=True)
        if self._masker is not None:
            self._out(self._masker.finish())
        return self.text

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _take(self, piece: str, last: bool = False) -> None:
        self._held += piece
        places = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if places:
            self.stopped = True
            ready, self._held = self._held[: min(places)], ""
        else:
            keep = 0 if last else max((_overlap(self._held, s) for s in self._stop), default=0)
            at = len(self._held) - keep
            ready, self._held = self._held[:at], self._held[at:]
        self._out(self._masker.feed(ready) if self._masker is not None else ready)

    def _out(self, text: str) -> None:
        if text:
            self.text += text
            self._emit(text)


def _overlap(text: str, stop: str) -> int:
    """The longest end of ``text`` that is a beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
