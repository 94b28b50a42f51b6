"""The command: what goes, what stays, and what it refuses."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support import Result, build_tiny_model, invoke, load_tool, tiny_records, write_jsonl

from tuneutils.shared.errors import ExitCode

# isort: split
import torch
from transformers import AutoModelForCausalLM

Prune = Callable[..., Result]


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(
        tmp_path_factory.mktemp("prune") / "dense", num_hidden_layers=4, initializer_range=0.15
    )


@pytest.fixture
def texts(workdir: Path) -> Path:
    return write_jsonl(workdir / "texts.jsonl", tiny_records("text", 24))


@pytest.fixture
def prune(workdir: Path, dense: Path, texts: Path) -> Prune:
    command = load_tool("prune")

    def call(
        *args: Any, output: str = "out", model: Path = dense, inputs: Sequence[Any] = (texts,)
    ) -> Result:
        fixed = ("--dtype", "float32", "--calibration-rows", "8", "--calibration-length", "32", "--no-speed")
        return invoke(command, *map(str, [*inputs, "-m", model, "-o", output, *fixed, *args]))

    return call


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "sparsity.csv", encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def report(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "report.json").read_text()))


def matrices(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for n, t in load_file(folder / "model.safetensors").items() if "_proj" in n}


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_half_of_each_matrix_goes(
    method: str, pattern: str, prune: Prune, workdir: Path, texts: Path
) -> None:
    done = prune("--method", method, "--pattern", pattern, "--heldout", texts)
    assert done.code == 0, done.stderr
    for weight in matrices(workdir / "out").values():
        assert abs(float((weight == 0).float().mean()) - 0.5) < 1e-6
        if pattern == "2:4":
            assert weight.view(len(weight), -1, 4).eq(0).sum(-1).eq(2).all()
    assert {row["sparsity"] for row in table(workdir / "out")} == {"0.5"}
    assert (workdir / "out" / "sparsity.png").read_bytes().startswith(b"\x89PNG")
    made = report(workdir / "out")
    assert made["original"]["agreement"]["value"] == 1
    assert made["pruned"]["kl"]["low"] > 0
    loaded = AutoModelForCausalLM.from_pretrained(workdir / "out")
    assert (
        sum(int((p == 0).sum()) for n, p in loaded.named_parameters() if "_proj" in n)
        == json.loads((workdir / "out" / "artifact.json").read_text())["metrics"]["zeros"]
    )


def test_sparsegpt_spares_every_output_of_the_first_layer(prune: Prune, workdir: Path) -> None:
    errors = []
    for method in ("sparsegpt", "magnitude", "wanda"):
        assert prune("--method", method, output=method).code == 0
        errors.append([float(r["output_error"]) for r in table(workdir / method) if r["layer"] == "0"])
    for ours, *others in zip(*errors, strict=True):
        assert ours < min(others)


def test_nothing_goes_at_a_share_of_zero(prune: Prune, workdir: Path, dense: Path, texts: Path) -> None:
    assert prune("--sparsity", 0, "--heldout", texts).code == 0
    ours, theirs = load_file(workdir / "out" / "model.safetensors"), load_file(dense / "model.safetensors")
    assert all(torch.equal(ours[n], t) for n, t in theirs.items())
    assert report(workdir / "out")["pruned"]["kl"]["value"] == 0


def test_a_global_budget_is_one_threshold(prune: Prune, workdir: Path, dense: Path) -> None:
    assert prune("--method", "magnitude", "--budget", "global", "--sparsity", 0.3).code == 0
    before, after = matrices(dense), matrices(workdir / "out")
    gone = torch.cat([before[n][after[n] == 0].abs() for n in before])
    stays = torch.cat([before[n][after[n] != 0].abs() for n in before])
    assert abs(len(gone) / (len(gone) + len(stays)) - 0.3) < 0.01
    assert gone.max() <= stays.min() * 1.05  # the share of each matrix is rounded to whole weights


def test_named_matrices_have_their_own_share(prune: Prune, workdir: Path) -> None:
    args = ("--layer-sparsity", r"layers\.0\.=0", "--layer-sparsity", "down_proj=0.75")
    assert prune("--method", "magnitude", *args).code == 0
    for row in table(workdir / "out"):
        expected = 0.0 if row["layer"] == "0" else 0.75 if "down" in row["module"] else 0.5
        assert float(row["sparsity"]) == pytest.approx(expected, abs=1e-3)


def test_rounds_end_at_the_same_share(prune: Prune, workdir: Path) -> None:
    assert prune("--method", "wanda", "--rounds", 3).code == 0
    assert {row["sparsity"] for row in table(workdir / "out")} == {"0.5"}


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("heads", {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 4}),
        ("mlp", {"intermediate_size": 32, "num_hidden_layers": 4}),
        ("layers", {"num_hidden_layers": 2}),
    ],
)
@pytest.mark.parametrize("importance", ["activation", "taylor"])
def test_structures_go_whole(
    method: str, expected: dict[str, int], importance: str, prune: Prune, workdir: Path, texts: Path
) -> None:
    done = prune("--method", method, "--importance", importance, "--heldout", texts)
    assert done.code == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(workdir / "out")
    assert {name: getattr(model.config, name) for name in expected} == expected
    assert len(table(workdir / "out")) == 4
    metrics = json.loads((workdir / "out" / "artifact.json").read_text())["metrics"]
    assert metrics["total_parameters"] < metrics["original_parameters"]
    ids = torch.randint(4, 300, (1, 9), generator=torch.Generator().manual_seed(0))
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 13)


@pytest.mark.parametrize("importance", ["activation", "taylor"])
@pytest.mark.parametrize("method", ["mlp", "heads"])
def test_units_of_no_importance_leave_the_logits_as_they_are(
    method: str, importance: str, prune: Prune, workdir: Path
) -> None:
    path = build_tiny_model(workdir / "idle", initializer_range=0.15)
    tensors = load_file(path / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "mlp.up_proj.weight"][5:37] = 0
        tensors[prefix + "self_attn.v_proj.weight"][8 * layer : 8 * layer + 8] = 0
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    done = prune("--method", method, "--importance", importance, model=path)
    assert done.code == 0, done.stderr
    ids = torch.randint(4, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(p)(input_ids=ids).logits for p in (workdir / "out", path)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_identity_layer_goes_first(prune: Prune, workdir: Path) -> None:
    path = build_tiny_model(workdir / "idle", num_hidden_layers=4, initializer_range=0.15)
    tensors = load_file(path / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.1.{name}.weight"].zero_()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert prune("--method", "layers", "--sparsity", 0.25, model=path).code == 0
    rows = table(workdir / "out")
    assert [row["kept"] for row in rows] == ["1", "0", "1", "1"]
    assert float(rows[1]["influence"]) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--method", "mlp", "--pattern", "2:4"), "--pattern: does not go with --method mlp"),
        (("--budget", "global"), "--budget global: does not go with --method wanda"),
        (("--importance", "taylor"), "--importance taylor"),
        (("--pattern", "4:2"), "--pattern 4:2"),
        (("--layer-sparsity", "x"), "--layer-sparsity x"),
        (("--layer-sparsity", "x=1.5"), "--layer-sparsity x=1.5"),
    ],
)
def test_options_that_do_not_go_together(
    args: Sequence[str], message: str, prune: Prune, workdir: Path
) -> None:
    done = prune(*args)
    assert done.code == ExitCode.USAGE
    assert message in done.error
    assert not (workdir / "out").exists()


def test_columns_that_do_not_divide_are_named(prune: Prune) -> None:
    done = prune("--pattern", "3:5")
    assert done.code == ExitCode.BAD_DATA
    assert "q_proj: 32 columns cannot be cut into groups of 5" in done.error


def test_calibration_of_another_kind_or_too_short(prune: Prune, workdir: Path) -> None:
    other = write_jsonl(workdir / "other.jsonl", tiny_records("parallel"))
    assert "other.jsonl:1" in prune(inputs=(other,)).error
    short = write_jsonl(workdir / "short.jsonl", tiny_records("text", 1))
    assert "too few to calibrate" in prune(inputs=(short,)).error


def test_weights_that_are_no_numbers_are_named(prune: Prune, workdir: Path) -> None:
    path = build_tiny_model(workdir / "broken")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = float("inf")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    done = prune(model=path)
    assert done.code == ExitCode.BAD_DATA
    assert "down_proj.weight has 1 values that are NaN or infinite" in done.error
    assert not (workdir / "out").exists()


def test_a_quantized_model_is_refused(prune: Prune, workdir: Path, dense: Path) -> None:
    pytest.importorskip("compressed_tensors")
    made = invoke(load_tool("quantize"), str(dense), "--scheme", "int8", "-o", "small", "-q")
    assert made.code == 0, made.stderr
    done = prune(model=Path("small"))
    assert done.code == ExitCode.BAD_DATA
    assert "is quantized already; prune first, then quantize" in done.error


@pytest.mark.parametrize("method", ["sparsegpt", "mlp", "layers"])
def test_tied_embeddings_stay_tied_and_whole(method: str, prune: Prune, workdir: Path) -> None:
    path = build_tiny_model(workdir / "tied", tie_word_embeddings=True)
    done = prune("--method", method, model=path)
    assert done.code == 0, done.stderr
    before, after = load_file(path / "model.safetensors"), load_file(workdir / "out" / "model.safetensors")
    assert "lm_head.weight" not in after
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    loaded = AutoModelForCausalLM.from_pretrained(workdir / "out")
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight


@pytest.mark.parametrize("method", ["wanda", "mlp"])
def test_an_architecture_without_the_modules_says_which(method: str, prune: Prune, workdir: Path) -> None:
    from support import tiny_tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = workdir / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=2)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    done = prune("--method", method, model=folder)
    assert done.code == ExitCode.BAD_DATA
    assert "GPT2LMHeadModel lacks linear modules in each of transformer.h" in done.error
