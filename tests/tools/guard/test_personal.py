"""Personal data by patterns, and by Presidio where it is installed."""

from __future__ import annotations

import pytest

from tuneutils.shared.errors import ToolError
from tuneutils.tools.guard.personal import Finder


def test_presidio_that_is_not_there_is_named() -> None:
    try:
        import presidio_analyzer  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(ToolError, match=r"pip install 'tuneutils\[presidio\]'") as caught:
            Finder(presidio=True)
        assert caught.value.code == 69
    else:
        pytest.skip("presidio is installed")


def test_presidio_adds_names_and_ours_stay() -> None:
    pytest.importorskip("presidio_analyzer")
    text = "My name is Ada Lovelace, the card is 4111 1111 1111 1111."
    found = [(s.kind, text[s.start : s.end]) for s in Finder(presidio=True).find(text)]
    assert found == [("person", "Ada Lovelace"), ("card", "4111 1111 1111 1111")]


def test_patterns_alone() -> None:
    text = "Ada Lovelace, ada@example.org"
    assert [(s.kind, text[s.start : s.end]) for s in Finder().find(text)] == [("email", "ada@example.org")]
