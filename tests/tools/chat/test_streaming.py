"""Pieces of text are those of the whole text, and stop strings end it, however tokens cut it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny_tokenizer

from tuneutils.shared.guarding import Masker
from tuneutils.tools.chat.streaming import TextStream

TOKENIZER = tiny_tokenizer()


def streamed(
    text: str, stop: tuple[str, ...] = (), masker: Masker | None = None
) -> tuple[list[str], TextStream]:
    pieces: list[str] = []
    stream = TextStream(TOKENIZER, pieces.append, stop, masker)
    for token in TOKENIZER(text, add_special_tokens=False).input_ids:
        if stream.token(token):
            break
    stream.finish()
    return pieces, stream


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(blacklist_categories=["Cs"]), max_size=40))
def test_pieces_join_to_the_text(text: str) -> None:
    pieces, stream = streamed(text)
    assert "".join(pieces) == stream.text == text
    assert all(pieces)


@settings(max_examples=200, deadline=None)
@given(st.text("ab東\n", max_size=30), st.lists(st.text("ab東\n", min_size=1, max_size=4), max_size=3))
def test_a_stop_string_ends_the_text_before_it(text: str, stop: list[str]) -> None:
    _, stream = streamed(text, tuple(stop))
    places = [text.index(s) for s in stop if s in text]
    if not places:
        assert stream.text == text
        return
    # What stops it is the first that is complete, which is not always the one that begins first.
    first_end = min(text.index(s) + len(s) for s in stop if s in text)
    assert stream.stopped
    assert text.startswith(stream.text)
    assert len(stream.text) <= first_end
    assert not any(s in stream.text for s in stop)


def test_no_half_of_a_character_comes_out() -> None:
    pieces, _ = streamed("東京 😀 é")
    assert "\ufffd" not in "".join(pieces)


def test_personal_data_is_masked_across_pieces() -> None:
    _, stream = streamed("Write to ann@example.org or call.", masker=Masker())
    assert stream.text == "Write to [EMAIL] or call."


@pytest.mark.parametrize("end", ["th", "the"])
def test_what_may_begin_a_stop_string_waits(end: str) -> None:
    pieces: list[str] = []
    stream = TextStream(TOKENIZER, pieces.append, ("their",))
    for token in TOKENIZER("on " + end, add_special_tokens=False).input_ids:
        stream.token(token)
    assert "".join(pieces) == "on "
    assert stream.finish() == "on " + end
