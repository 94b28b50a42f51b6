"""The card says what the manifests say, no more, and its code and commands run."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import environment, invoke, load_tool, tiny_records, write_jsonl

from tuneutils.shared.artifact import Artifact, Input, describe_input, sidecar
from tuneutils.shared.command import Run
from tuneutils.tools.model_card import markdown

FORBIDDEN = re.compile(r"\bNone\b|TODO|unknown model|\[More Information|\bnull\b|\bnan\b")
LOG = [
    {"step": 1, "loss": 3.5, "learning_rate": 1e-4, "grad_norm": 2.0},
    {"step": 1, "eval_loss": 3.4},
    {"step": 2, "loss": 3.1, "learning_rate": 2e-4, "grad_norm": 1.5},
    {"step": 3, "loss": 2.75, "learning_rate": 1e-4, "grad_norm": 1.0},
    {"step": 3, "eval_loss": 2.9},
]


@dataclasses.dataclass(frozen=True)
class TrainParams:
    model: str = "artifacts/base"
    heldout: str | None = None
    rank: int = 4
    learning_rate: float = 2e-4
    dora: bool = False
    target: tuple[str, ...] = ("q_proj", "v|proj")


def run(tool: str, output: str, params: Any = None, **sources: str) -> Run[Any]:
    given = params if params is not None else dataclasses.make_dataclass("Nothing", [], frozen=True)()
    return Run(tool=tool, params=given, output=output, seed=7, sources=sources)


def make_base(
    tiny_model: Path, source: str | None = "hf:org/tiny@abc123", licence: str | None = "Apache-2.0"
) -> None:
    given = Input("source", source or "made-here", "0" * 64, licence=licence, source=source)
    with Artifact.open(run("model-import", "artifacts/base"), "model", [given]) as art:
        shutil.copytree(tiny_model, art.dir, dirs_exist_ok=True)
        art.licence, art.source = licence, source
        art.extra["model"] = {"architecture": "LlamaForCausalLM", "parameters": 12345}


def make_records(name: str = "data.jsonl", licence: str | None = "CC-BY-4.0") -> Path:
    path = write_jsonl(Path(name), tiny_records("prompt-completion", 8))
    sidecar(run("data-import", name), path, [], licence=licence, source="pypi:proverbs==1.0!/all.json")
    return path


def make_adapter(records: Path, output: str = "artifacts/lora") -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained("artifacts/base"),
        LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    inputs = [describe_input("model", "artifacts/base"), describe_input("records", records)]
    settings = run("lora-tune", output, TrainParams(rank=4), model="flag", rank="params", target="flag")
    with Artifact.open(settings, "adapter", inputs) as art:
        model.save_pretrained(art.dir)
        art.licence = "Apache-2.0"
        (art.dir / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in LOG))
        art.extra["method"] = "lora"
        art.metrics = {
            "examples": 8,
            "learnt_tokens": 321,
            "truncated": 2,
            "final_loss": 2.75,
            "heldout_loss": 2.9,
        }


def make_report(output: str = "reports/bench", artifact: str = "artifacts/lora") -> None:
    paths = ["artifacts/base", artifact]
    results = [
        {"value": 9.5, "low": 9.1, "high": 9.9, "n": 64},
        {"value": 7.25, "low": 7.0, "high": 7.5, "n": 64},
    ]
    report = {
        "schema": 1, "interval": "95 % percentile bootstrap", "baseline": "base", "warnings": ["few items"],
        "tasks": {"heldout": {}},
        "models": [
            {"label": p.split("/")[1], "info": {"path": p}, "results": {"heldout": {"perplexity": r}}}
            for p, r in zip(paths, results)
        ],
    }  # fmt: skip
    report["models"][1]["differences"] = {
        "heldout": {"perplexity": {"value": -2.25, "low": -2.5, "high": -2.0, "n": 64}}
    }
    settings = run("lm-bench", output)
    with Artifact.open(settings, "report", [describe_input("model", p) for p in paths]) as art:
        (art.dir / "report.json").write_text(json.dumps(report))


@pytest.fixture
def chain(workdir: Path, tiny_model: Path) -> Path:
    make_base(tiny_model)
    make_adapter(make_records())
    make_report()
    return workdir


def card(*args: str, code: int = 0) -> str:
    done = invoke(load_tool("model-card"), *args)
    assert done.code == code, done.stderr
    return done.stdout if "-" in args else Path(args[args.index("-o") + 1], "README.md").read_text()


def head(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def block(text: str, language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)\n```", text, re.DOTALL)
    assert found
    return found[1]


def test_head_is_what_the_hub_reads(chain) -> None:
    from huggingface_hub import ModelCard

    text = card("artifacts/lora", "-o", "card", "--language", "en")
    data = ModelCard(text).data.to_dict()
    assert data == head(text)
    assert data["base_model"] == "org/tiny"
    assert data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft"
    assert data["license"] == "other"
    assert data["license_name"] == "several-see-card"
    assert data["language"] == ["en"]
    assert data["tags"] == ["tuneutils", "lora-tune", "lora"]


def test_claims_equal_the_manifests(chain) -> None:
    text = card("artifacts/lora", "-o", "card", "--report", "reports/bench")
    manifest = json.loads(Path("artifacts/lora/artifact.json").read_text())
    for name, entry in manifest["params"].items():
        value = entry["value"]
        shown = "not set" if value is None else value if isinstance(value, str) else json.dumps(value)
        shown = shown.replace("|", "\\|")
        assert f"| `{name}` | `{shown}` | {entry['source']} |" in text
    for given in manifest["inputs"]:
        assert given["path"] in text
        assert given["sha256"][:12] in text
    for name, version in manifest["libraries"].items():
        assert f"| {name} | `{version}` |" in text
    assert "| `learnt_tokens` | 321 |" in text
    assert "[org](" not in text
    assert "(https://huggingface.co/org/tiny/tree/abc123)" in text
    assert "| records | `data.jsonl` | 8 | CC\\-BY\\-4.0 |".replace("\\-", "-") in text
    assert "| base | heldout | perplexity | 9.5 \\[9.1, 9.9\\] (n = 64) |" in text
    assert (
        "| lora **(this)** | heldout | perplexity | 7.25 \\[7, 7.5\\] (n = 64) | -2.25 \\[-2.5, -2\\] (n = 64) |"
        in text
    )
    assert "| training loss | 3.5 (step 1) | 2.75 (step 3) | 2.75 (step 3) | 3 |" in text
    assert "| held-out loss | 3.4 (step 1) | 2.9 (step 3) | 2.9 (step 3) | 2 |" in text
    assert "2 training examples were cut" in text
    assert "![Loss and learning rate over steps](plots/training.png)" in text
    for path in re.findall(r"\]\((plots/[^)]+)\)", text):
        assert Path("card", path).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("artifact", ["artifacts/lora", "artifacts/base", "data.jsonl", "reports/bench"])
def test_no_placeholders_for_any_kind(artifact, chain) -> None:
    text = card(artifact, "-o", "-")
    assert not FORBIDDEN.search(text), FORBIDDEN.search(text)
    assert not re.search(r"!\[", text)
    assert head(text)["tags"][0] == "tuneutils"


@pytest.mark.parametrize("artifact", ["artifacts/lora", "artifacts/base", "data.jsonl", "reports/bench"])
def test_its_code_runs(artifact, chain) -> None:
    source = block(card(artifact, "-o", "-"), "python")
    done = subprocess.run(
        [sys.executable, "-c", source], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_later_kinds_work_without_being_known(workdir) -> None:
    with Artifact.open(run("guard", "artifacts/guard"), "guard", []) as art:
        (art.dir / "rules.json").write_text("{}")
        art.metrics = {"recall": {"value": 0.9, "low": 0.8, "high": 0.95, "n": 50}}
    text = card("artifacts/guard", "-o", "-")
    assert "kind guard" in text
    assert "| `recall` | 0.9 \\[0.8, 0.95\\] (n = 50) |" in text
    assert "No inputs are recorded" in text
    assert head(text)["license"] == "unknown"
    assert "library_name" not in head(text)


def test_bytes_repeat(chain) -> None:
    args = ("artifacts/lora", "--report", "reports/bench")
    card(*args, "-o", "one")
    card(*args, "-o", "two")
    files = [
        {p.relative_to(d): p.read_bytes() for p in Path(d).rglob("*") if p.is_file()} for d in ("one", "two")
    ]
    assert files[0] == files[1]
    assert {p.name for p in files[0]} == {"README.md", "artifact.json", "training.png", "results.png"}


def test_a_changed_input_is_flagged(chain) -> None:
    with open("data.jsonl", "a") as stream:
        stream.write('{"prompt": "x", "completion": "y"}\n')
    done = invoke(load_tool("model-card"), "artifacts/lora", "-o", "card")
    assert done.code == 0
    assert "data.jsonl: CHANGED" in done.stderr
    text = Path("card/README.md").read_text()
    assert "**Broken lineage.**" in text
    assert "- `data.jsonl` (records): CHANGED since this was made from it" in text
    assert json.loads(Path("card/artifact.json").read_text())["metrics"]["broken_inputs"] == 1


def test_changed_weights_below_an_unchanged_manifest(chain) -> None:
    with open("artifacts/base/model.safetensors", "ab") as stream:
        stream.write(b"x")
    assert "- `artifacts/base` (model): CHANGED" in card("artifacts/lora", "-o", "-")


def test_an_input_that_is_gone_and_a_damaged_file(chain) -> None:
    Path("data.jsonl").unlink()
    Path("artifacts/lora/log.jsonl").write_text("")
    text = card("artifacts/lora", "-o", "-")
    assert "- `data.jsonl` (records): GONE" in text
    assert "`log.jsonl: changed since it was written`" in text


def test_local_base_is_no_link(workdir, tiny_model) -> None:
    make_base(tiny_model, source=None, licence=None)
    make_adapter(make_records(licence=None))
    text = card("artifacts/lora", "-o", "-")
    assert "base_model" not in head(text)
    assert "huggingface.co" not in text
    assert "unknown: no source is recorded" in text
    assert "`artifacts/base`" in text
    assert "For some parts none is recorded" in text


def test_report_of_something_else(chain) -> None:
    make_adapter(Path("data.jsonl"), "artifacts/other")
    done = invoke(load_tool("model-card"), "artifacts/other", "-o", "card", "--report", "reports/bench")
    assert done.code == 65
    assert "did not measure" in done.error
    assert not Path("card").exists()


def test_joined_report_counts_through_the_reports_that_it_joins(chain) -> None:
    joined = "reports/joined"
    report = Path("reports/bench/report.json").read_text()
    with Artifact.open(run("lm-bench", joined), "report", [describe_input("report", "reports/bench")]) as art:
        (art.dir / "report.json").write_text(report)
    assert "7.25" in card("artifacts/lora", "-o", "-", "--report", joined)


def test_reproduce_command_makes_the_same_files(chain) -> None:
    """The line for adapter-merge, run again to another place, gives the same bytes."""
    done = invoke(load_tool("adapter-merge"), "artifacts/lora", "-o", "artifacts/merged", "--max-kl", "0.02")
    assert done.code == 0, done.stderr
    lines = block(card("artifacts/merged", "-o", "-"), "sh").splitlines()
    assert [shlex.split(line)[0] for line in lines] == [
        "model-import",
        "data-import",
        "lora-tune",
        "adapter-merge",
    ]
    assert shlex.split(lines[2])[1:] == [
        "data.jsonl", "--model", "artifacts/base", "--rank", "4", "--target", "q_proj", "--target", "v|proj",
        "--seed", "7", "-o", "artifacts/lora",
    ]  # fmt: skip
    words = shlex.split(lines[3])
    assert words[-1] == "artifacts/merged"
    assert invoke(load_tool(words[0]), *words[1:-1], "again").code == 0
    first, again = (
        json.loads(Path(d, "artifact.json").read_text())["files"] for d in ("artifacts/merged", "again")
    )
    assert first == again


def test_values_cannot_become_markup(workdir) -> None:
    name = "da`ta | [x](y) <b>.jsonl"
    path = write_jsonl(Path(name), tiny_records("text", 2))
    sidecar(run("data-import", name), path, [], licence="*Bold* | <i>", source="pypi:a|b==1!/c")
    text = card(name, "-o", "-")
    markdown_it = pytest.importorskip("markdown_it")
    tokens = markdown_it.MarkdownIt("commonmark").enable("table").parse(text.split("---\n", 2)[2])
    found = {t.type for token in tokens for t in [token, *(token.children or [])]}
    assert "table_open" in found
    assert not found & {"link_open", "html_inline", "html_block", "image", "em_open"}
    widths = [line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("| `")]
    assert set(widths) <= {3, 4}
    assert "\\*Bold\\* \\| \\<i\\>" in text


def test_markdown_by_hand() -> None:
    assert markdown.code("a`b|c") == "``a`b\\|c``"
    assert markdown.code("`x`") == "`` `x` ``"
    assert markdown.fenced("a\n```\nb") == "````\na\n```\nb\n````"
    assert markdown.text("a_b\n*c*") == "a\\_b \\*c\\*"
    assert markdown.size(538_090_408) == "538.1 MB"
    assert [markdown.number(v) for v in (12345, 0.123456, True, 3.0)] == ["12,345", "0.1235", "yes", "3"]


def test_not_an_artifact(workdir) -> None:
    assert invoke(load_tool("model-card"), "nowhere", "-o", "card").code == 66
    Path("plain").mkdir()
    done = invoke(load_tool("model-card"), "plain", "-o", "card")
    assert done.code == 65
    assert "nothing true can be said" in done.error
