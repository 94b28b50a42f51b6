"""The built-in probes: nothing of the held-out ones is in the training ones, and what fails one."""

from __future__ import annotations

import re

import pytest
from support import run_cli, tool_args

from tuneutils.shared import pii
from tuneutils.tools.guard import probes
from tuneutils.tools.guard.refusals import refuses


def texts(split: str) -> list[str]:
    return [
        str(p["prompt"] if isinstance(p["prompt"], str) else p["prompt"][-1]["content"])
        for p in probes.builtin(split)
    ]


def test_splits_share_no_template_no_prompt_and_no_word() -> None:
    train, held = list(probes.builtin("train")), list(probes.builtin("heldout"))
    assert not {p["template"] for p in train} & {p["template"] for p in held}
    assert not {t.lower() for t in texts("train")} & {t.lower() for t in texts("heldout")}
    words = probes._data()["words"]
    for slot in words["train"]:
        assert not set(words["train"][slot]) & set(words["heldout"][slot]), slot


@pytest.mark.parametrize("split", probes.SPLITS)
def test_every_category_has_failures_and_look_alikes(split: str) -> None:
    found = list(probes.builtin(split))
    for category in ("unsafe", "injection", "personal-data", "off-domain", "bias"):
        of = [p["fails"] == "never" for p in found if p["category"] == category]
        assert 9 <= sum(of) < len(of), category
        assert len(of) - sum(of) >= 9, category
    for probe in found:
        probes.check_spec(probe["fails"])
        assert "{" not in str(probe["prompt"]).replace("{'role'", "").replace("{'content'", "")
    counts = [sum(p["template"] == t for p in found) for t in {p["template"] for p in found}]
    assert max(counts) <= probes.PER_TEMPLATE


@pytest.mark.parametrize("split", probes.SPLITS)
def test_personal_data_of_the_probes_is_found_by_the_patterns(split: str) -> None:
    words = probes._data()["words"][split]
    for slot in ("iban", "card", "phone", "email"):
        for word in words[slot]:
            assert [s.kind for s in pii.find(f"It is {word}.")] == [slot], word


@pytest.mark.parametrize(
    ("spec", "reply", "fails"),
    [
        ("never", "anything", False),
        ("complies", "First, take a hammer.", True),
        ("complies", "I'm sorry, but I cannot help with that.", False),
        ("complies", "", False),
        ("contains:ZEBRA", "zebra", True),
        ("contains:ZEBRA", "a horse", False),
        ("lacks:unknown", "The man.", True),
        ("lacks:unknown", "Unknown.", False),
        ("matches:^[0-9]+$", "123", True),
        ("matches:^[0-9]+$", "12a", False),
        ("personal-data", "Her card is 4111 1111 1111 1111.", True),
        ("personal-data", "Her card is 4111 1111 1111 1112.", False),
    ],
)
def test_failing(spec: str, reply: str, fails: bool) -> None:
    probes.check_spec(spec)
    assert probes.failed(spec, reply) == fails


@pytest.mark.parametrize(
    "reply",
    [
        "I'm sorry, but I can't help with that.",
        "I cannot assist with this request.",
        "As an AI language model, I don't have personal opinions.",
        "Sorry, I am unable to share this information.",
        "I must decline.",
        "No, I won't do that.",
        "I’m not able to provide instructions for that.",
        "That is illegal, so please don't.",
    ],
)
def test_refusals(reply: str) -> None:
    assert refuses(reply)


@pytest.mark.parametrize(
    "reply",
    [
        "Sure! First open the door.",
        "You cannot open the file before it is saved. Click on Save.",
        "To kill the process, run kill -9 PID.",
        "The answer is 42.",
        "Notes on the north: it is cold.",
    ],
)
def test_no_refusals(reply: str) -> None:
    assert not refuses(reply)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("complys", "did you mean 'complies'"),
        ("contains:", "write contains:TEXT"),
        ("matches:(", "regular expression"),
        (3, "must be a string"),
    ],
)
def test_bad_checks_are_named(spec: object, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        probes.check_spec(spec)


def test_unknown_builtin(tiny_model: object, tmp_path: object) -> None:
    done = run_cli(*tool_args("guard"), "probe", "builtin:trian", "-m", str(tiny_model))
    assert (done.code, "did you mean 'train'" in done.error) == (66, True)
