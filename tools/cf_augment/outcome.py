"""Why a text is left alone."""

from __future__ import annotations


class Undecided(Exception):
    """The text does not decide; no twin is written.

    Args:
        kind: a short name, under which abstentions are counted.
        reason: with the words of the text.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason
