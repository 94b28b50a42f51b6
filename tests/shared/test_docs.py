"""What is generated from the tools is true, and a lie is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import toy
import yaml
from support import ROOT

from tuneutils.shared import docs
from tuneutils.shared.man import manual_page
from tuneutils.shared.schema import schema


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
        (root / "pyproject.toml").write_text(
            '[project]\nname = "x"\n[project.entry-points."tuneutils.tools"]\n'
            'toy-copy = "toy:copy"\ntoy-group = "toy:group"\n'
        )
        made = schema({e.name: e.load() for e in docs.entries(root)}, root)
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


class TestPipeline:
    PIPELINE = """
stages:
  one:
    cmd: toy-copy ${in.file} ${in.options} -o out.jsonl
  two:
    foreach: ${methods}
    do:
      cmd: $LAUNCH toy-group two ${common} ${item} ${common.seed} ${key}
  three:
    cmd: echo ${unknown.tool}
  four:
    foreach: ${nested}
    do:
      cmd: toy-copy ${item.file} ${item.options}
  five:
    cmd:
      - toy-copy a.jsonl ${list.first}
      - toy-group two ${list.second}
  six:
    matrix: {rank: "${list.ranks}", tag: [a, b]}
    cmd: toy-copy a.jsonl --rank ${item.rank}
"""
    PARAMS = """
in: {file: a.jsonl, options: {rank: 3, tags: [a, b]}}
common: {seed: 1}
methods: {x: {rank: 1}, y: {rank: 2}}
nested: {x: {file: a.jsonl, options: {rank: 1}}}
list: {first: {tags: [a]}, second: {rank: 2}, ranks: [3, 4]}
"""

    @pytest.fixture
    def made(self, tmp_path: Path) -> dict[str, Any]:
        (tmp_path / "dvc.yaml").write_text(self.PIPELINE)
        (tmp_path / "params.yaml").write_text(self.PARAMS)
        return schema({"toy-copy": toy.copy, "toy-group": toy.group}, tmp_path)

    def test_accepts_what_it_was_made_for(self, made: dict[str, Any]) -> None:
        jsonschema.validate(yaml.safe_load(self.PARAMS), made)
        jsonschema.validate({"methods": {"z": {"rank": 64}}}, made)

    @pytest.mark.parametrize(
        "params",
        [
            {"in": {"options": {"rnak": 3}}},
            {"in": {"optoins": {"rank": 3}}},
            {"common": {"rank": "x"}},
            {"methods": {"x": {"rank": 65}}},
            {"methods": {"x": 3}},
            {"unknown": {"tool": 3}},
            {"nested": {"y": {"options": {"rank": 0}}}},
            {"nested": {"y": {"optoins": {"rank": 1}}}},
            {"list": {"first": {"rank": 0}}},
            {"list": {"second": {"rank": 65}}},
        ],
    )
    def test_refuses(self, made: dict[str, Any], params: dict[str, Any]) -> None:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(params, made)


def tools_schema() -> dict[str, Any]:
    return schema({e.name: e.load() for e in docs.entries()}, ROOT)


def test_our_own_parameters_are_valid() -> None:
    jsonschema.validate(yaml.safe_load((ROOT / "params.yaml").read_text()), tools_schema())


def test_every_default_of_every_tool_is_valid() -> None:
    for definition in tools_schema()["$defs"].values():
        section = {k: v["default"] for k, v in definition["properties"].items() if "default" in v}
        jsonschema.validate(section, definition)
