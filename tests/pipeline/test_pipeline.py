"""The pipeline's files agree with the tools: dependencies, parameters, profiles."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"pipeline_{name}", ROOT / "pipeline" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def profile(name: str) -> dict[str, Any]:
    base = read("profiles/default.yaml")
    return base if name == "default" else load("profile").overlay(base, read(f"profiles/{name}.yaml"))


def test_stages_depend_on_the_code_that_they_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("deps").main(write=False) == 0, capsys.readouterr().out


def test_params_are_the_default_profile() -> None:
    assert read("params.yaml") == read("profiles/default.yaml")


@pytest.mark.parametrize("name", [p.stem for p in sorted((ROOT / "profiles").glob("*.yaml"))])
def test_every_profile_holds_only_options_that_the_tools_have(name: str) -> None:
    jsonschema.validate(profile(name), json.loads((ROOT / "params.schema.json").read_text()))


def test_a_misspelt_option_in_a_profile_is_refused() -> None:
    wrong = profile("default")
    wrong["tune"]["learnig_rate"] = 1.0
    with pytest.raises(jsonschema.ValidationError, match="learnig_rate"):
        jsonschema.validate(wrong, json.loads((ROOT / "params.schema.json").read_text()))


def test_an_unknown_key_in_an_overlay_is_refused() -> None:
    with pytest.raises(SystemExit, match="unknown key 'tuen'"):
        load("profile").overlay({"tune": {}}, {"tuen": {}})


def entries(given: Any, params: dict[str, Any]) -> int:
    """How many entries a list, or ``${a.path}`` into the parameters, has."""
    if isinstance(given, str):
        for key in given.removeprefix("${").removesuffix("}").split("."):
            params = params[key]
        given = params
    return len(given)


def count(stage: dict[str, Any], params: dict[str, Any]) -> int:
    """The stages that DVC makes of one in the file: an entry of ``foreach``, a cell of ``matrix``."""
    axes = stage["matrix"].values() if "matrix" in stage else [stage.get("foreach", [None])]
    return math.prod(entries(axis, params) for axis in axes)


def test_there_are_fewer_than_eighty_stages() -> None:
    stages = read("dvc.yaml")["stages"].values()
    assert sum(count(s, profile("default")) for s in stages) < 80


def test_stages_are_counted_as_dvc_makes_them() -> None:
    params = {"methods": {"a": {}, "b": {}}, "some": {"bits": [3, 4, 8]}}
    matrix = {"scheme": ["rtn", "gptq"], "bits": "${some.bits}"}
    stages = [{"foreach": "${methods}"}, {"foreach": ["x", "y", "z"]}, {"matrix": matrix}, {"cmd": "true"}]
    assert [count(s, params) for s in stages] == [2, 3, 6, 1]


def test_nine_methods_are_compared() -> None:
    wanted = {"full", "lora", "qlora", "houlsby", "pfeiffer", "llama-adapter", "prefix", "prompt", "ia3"}
    assert wanted <= set(profile("default")["methods"])
