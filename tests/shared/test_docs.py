"""What is generated from the tools is true, and a lie is found."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import toy
from support import ROOT

from tuneutils.shared import docs
from tuneutils.shared.man import manual_page


def test_nothing_generated_is_out_of_date() -> None:
    stale = [
        str(p.relative_to(ROOT)) for p, text in docs.documents() if not p.is_file() or p.read_text() != text
    ]
    assert stale == [], "run: python -m tuneutils.shared.docs"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tools" / "toy_copy").mkdir(parents=True)
    page = "# toy-copy\n\n<!-- options -->\nlies\n<!-- /options -->\nKept as it is: \\1\n"
    (tmp_path / "tools" / "toy_copy" / "README.md").write_text(page)
    (tmp_path / "README.md").write_text("x\n<!-- tools -->\n<!-- /tools -->\n<!-- other -->\nkept\n")
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "x"\n[project.entry-points."tuneutils.tools"]\n'
        'toy-copy = "toy:copy"\ntoy-group = "toy:group"\n'
    )
    return tmp_path


def test_only_text_between_markers_changes(tree: Path) -> None:
    written = {p.relative_to(tree).as_posix(): text for p, text in docs.documents(tree)}
    page = written["tools/toy_copy/README.md"]
    assert page.startswith(
        "# toy-copy\n\n<!-- options -->\n```text\nUsage: toy-copy [OPTIONS] [RECORDS]...\n"
    )
    assert page.endswith("```\n<!-- /options -->\nKept as it is: \\1\n")
    assert "lies" not in page
    assert "--learning-rate" in page
    assert "| [`toy-copy`](tools/toy_copy/README.md) |" in written["README.md"]
    assert written["README.md"].endswith("<!-- /tools -->\n<!-- other -->\nkept\n")
    for path, text in written.items():
        (tree / path).write_text(text)
    assert {p.relative_to(tree).as_posix(): text for p, text in docs.documents(tree)} == written


def test_subcommands_are_shown(tree: Path) -> None:
    text = docs.options_text(toy.group, "toy-group")
    assert "Usage: toy-group one [OPTIONS] FILE" in text
    assert "Usage: toy-group two [OPTIONS]" in text
    page = manual_page(toy.group, "toy-group", "two in one")
    assert r"\fBtoy\-group two\fR" in page
    assert r".TP" in page


class TestSchema:
    @pytest.fixture(scope="class")
    def validator(self, tmp_path_factory: pytest.TempPathFactory) -> Any:
        root = tmp_path_factory.mktemp("root")
        shutil.copy(ROOT / "LICENSE", root)
        (root / "pyproject.toml").write_text(
            '[project]\nname = "x"\n[project.entry-points."tuneutils.tools"]\n'
            'toy-copy = "toy:copy"\ntoy-group = "toy:group"\n'
        )
        made = docs.schema(docs.entries(root))
        jsonschema.Draft202012Validator.check_schema(made)
        assert set(made["$defs"]) == {"toy-copy", "toy-group one", "toy-group two"}
        return jsonschema.Draft202012Validator(made["$defs"]["toy-copy"])

    @pytest.mark.parametrize(
        "section",
        [
            {},
            {"rank": 4, "learning_rate": 1, "tags": "one", "upper": True, "seed": 3},
            {"tags": ["a", 2], "title": 2024, "mode": "slow-path", "on_error": "skip"},
        ],
    )
    def test_accepts(self, validator: Any, section: dict[str, Any]) -> None:
        validator.validate(section)

    @pytest.mark.parametrize(
        "section",
        [
            {"rnak": 4},
            {"rank": 0},
            {"rank": 65},
            {"rank": 1.5},
            {"rank": "4"},
            {"rank": True},
            {"mode": "fats"},
            {"upper": "yes"},
            {"tags": {"a": 1}},
            {"learning_rate": -1},
            {"params": "x.yaml"},
        ],
    )
    def test_refuses_what_the_command_refuses(self, validator: Any, section: dict[str, Any]) -> None:
        with pytest.raises(jsonschema.ValidationError):
            validator.validate(section)

    def test_defaults_are_valid(self, validator: Any) -> None:
        properties = validator.schema["properties"]
        validator.validate(
            {name: entry["default"] for name, entry in properties.items() if "default" in entry}
        )
        assert properties["rank"]["default"] == 4


def test_every_default_of_every_tool_is_valid() -> None:
    for name, definition in docs.schema(docs.entries())["$defs"].items():
        section = {k: v["default"] for k, v in definition["properties"].items() if "default" in v}
        jsonschema.validate(section, definition), name
