"""The command: what it writes is what it trained, and what quantize would write; what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support import Result, build_tiny_model, tiny_records, tiny_tokenizer, write_jsonl

from tuneutils.shared.errors import ExitCode
from tuneutils.tools.qat_tune import convert

from .conftest import losses, manifest, report

# isort: split
import torch
from transformers import AutoModelForCausalLM

Qat = Callable[..., Result]
TRAIN = ("--max-steps", 4, "--batch-size", 4, "--learning-rate", "0.01")
IDS = torch.arange(5, 37)[None]


def load(folder: Path | str, dtype: torch.dtype = torch.float32) -> Any:
    made, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return made.eval()


CASES = {
    "4 bit": (),
    "4 bit symmetric": ("--symmetric",),
    "8 bit rows": ("--bits", "8", "--group-size", "0", "--symmetric"),
    "3 bit": ("--bits", "3"),
    "2 bit": ("--bits", "2"),
    "float32": ("--dtype-stored", "float32"),
    "learnt scales": ("--learn-scales",),
    "lora": ("--method", "lora", "--lora-rank", "4"),
    "lora, learnt scales": ("--method", "lora", "--learn-scales", "--symmetric"),
    "labels": ("--loss", "ce"),
    "skipped": ("--skip", "*.down_proj"),
    "int8 inputs": ("--activations", "int8", "--symmetric", "--bits", "8", "--group-size", "0"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_loaded_is_what_was_trained(
    case: str, qat: Qat, texts: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights bit by bit, and the logits of the whole model, in float32."""
    simulated: dict[str, torch.Tensor] = {}
    logits: list[torch.Tensor] = []
    original = convert.write

    def spy(layers: Any, layout: Any, *rest: Any) -> Any:
        with torch.no_grad():
            simulated.update({name: layer.simulated().float() for name, layer in layers.items()})
            logits.append(layout.decoder.model.eval()(IDS).logits)
        return original(layers, layout, *rest)

    monkeypatch.setattr(convert, "write", spy)
    done = qat(texts, *TRAIN, *CASES[case])
    assert done.code == 0, done.stderr
    loaded = load("out")
    with torch.no_grad():
        ours = loaded(IDS).logits
    weights = {n: m.weight for n, m in loaded.named_modules() if n in simulated}
    assert len(simulated) == (12 if case == "skipped" else 14)
    given = load_file(model / "model.safetensors")
    for name, weight in simulated.items():
        assert torch.equal(weights[name].float(), weight), name
        assert not torch.equal(weight, given[f"{name}.weight"].float())
    if case == "int8 inputs":  # compressed-tensors divides by its scale in another order
        torch.testing.assert_close(ours, logits[0], rtol=0.02, atol=0.02)
    else:
        assert torch.equal(ours, logits[0])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ((), ("--scheme", "rtn", "--group-size", "16")),
        (("--symmetric",), ("--scheme", "rtn", "--group-size", "16", "--symmetric")),
        (("--method", "lora"), ("--scheme", "rtn", "--group-size", "16")),
        (("--bits", "8", "--group-size", "0", "--symmetric"), ("--scheme", "int8")),
        (
            ("--bits", "8", "--group-size", "0", "--symmetric", "--activations", "int8"),
            ("--scheme", "int8-dynamic"),
        ),
        (
            ("--bits", "3", "--skip", "*.v_proj"),
            ("--scheme", "rtn", "--bits", "3", "--group-size", "16", "--skip", "*.v_proj"),
        ),
    ],
)
def test_untrained_it_is_what_quantize_writes(
    ours: Sequence[str], theirs: Sequence[str], qat: Qat, quantize: Any, texts: Path, model: Path
) -> None:
    assert qat(texts, *ours, "--max-steps", 1, "--learning-rate", 0).code == 0
    assert quantize(model, *theirs).code == 0
    trained, rounded = load_file("out/model.safetensors"), load_file("ptq/model.safetensors")
    assert trained.keys() == rounded.keys()
    assert all(torch.equal(trained[name], rounded[name]) for name in rounded)
    assert Path("out/config.json").read_text() == Path("ptq/config.json").read_text()
    for key in ("bytes", "weights", "bits_per_weight", "quantized_matrices", "quantized_share"):
        assert manifest("out")["metrics"][key] == manifest("ptq")["metrics"][key]


@pytest.mark.parametrize("args", [(), ("--learn-scales",), ("--method", "lora", "--learning-rate", "0.03")])
def test_training_wins_back_what_rounding_lost(args: Sequence[str], qat: Qat, texts: Path) -> None:
    common = ("--bits", 3, "--max-steps", 60, "--batch-size", 12, "--learning-rate", "0.003")
    done = qat(texts, *common, *args, "--heldout", texts)
    assert done.code == 0, done.stderr
    made = report()
    share = made["recovered"]["kl"]
    assert share["low"] > 0.5
    assert made["models"]["trained"]["kl"]["value"] < made["models"]["rounded"]["kl"]["value"] / 2
    assert made["models"]["float"]["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert losses()[-1] < losses()[0] / 2
    assert manifest()["metrics"]["recovered"]["kl"] == share


def test_the_report_is_of_the_stored_models(qat: Qat, quantize: Any, texts: Path, model: Path) -> None:
    """Perplexities of the rounded and the trained model, computed again from the files."""
    assert qat(texts, *TRAIN, "--heldout", texts).code == 0
    assert quantize(model, "--scheme", "rtn", "--group-size", "16").code == 0
    tokenizer = tiny_tokenizer()
    found = report()["models"]
    for name, folder in (("float", model), ("rounded", "ptq"), ("trained", "out")):
        loaded, nll, tokens = load(folder), 0.0, 0
        for record in tiny_records("text", 12):
            ids = torch.tensor([[*tokenizer(record["text"]).input_ids, tokenizer.eos_token_id]])
            with torch.no_grad():
                nll += float(loaded(ids, labels=ids).loss) * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
        perplexity = float(torch.tensor(nll / tokens).exp())
        assert found[name]["perplexity"]["value"] == pytest.approx(perplexity, rel=1e-4)


def test_another_teacher_is_learnt_from(qat: Qat, texts: Path, workdir: Path) -> None:
    other = build_tiny_model(workdir / "other", seed=3, num_hidden_layers=3, initializer_range=0.15)
    common = ("--bits", 8, "--max-steps", 30, "--learning-rate", "0.01")
    assert qat(texts, *common, "--teacher", other).code == 0
    taught = losses()
    assert taught[0] > 0.5  # it is another model
    assert taught[-1] < 0.7 * taught[0]
    assert "teacher" in {i["role"] for i in manifest()["inputs"]}


def test_micro_batches_do_not_change_the_step(qat: Qat, texts: Path) -> None:
    assert qat(texts, "--max-steps", 2, "--batch-size", 6, output="one").code == 0
    assert (
        qat(texts, "--max-steps", 2, "--batch-size", 2, "--gradient-accumulation", 3, output="three").code
        == 0
    )
    assert losses("one") == pytest.approx(losses("three"), rel=1e-4)


def test_tied_embeddings_stay_tied_and_as_they_are(qat: Qat, texts: Path, model: Path) -> None:
    assert qat(texts, *TRAIN).code == 0
    stored = load_file("out/model.safetensors")
    assert "lm_head.weight" not in stored
    given = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(stored["model.embed_tokens.weight"], given.bfloat16())
    loaded = load("out")
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight


def test_dry_run_counts_without_weights(qat: Qat, texts: Path) -> None:
    full = qat(texts, "--dry-run", "--json").json()
    lora = qat(texts, "--dry-run", "--json", "--method", "lora", "--lora-rank", "2").json()
    assert full["plan"]["trainable_parameters"] == 73728 if "plan" in full else full
    assert (lora.get("plan") or lora)["trainable_parameters"] < 73728


class TestRefusals:
    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("--activations", "int8"), "add --symmetric"),
            (("--loss", "ce", "--ce-weight", "1"), "learns from labels alone"),
            (("--temperature", "0"), "must be above 0"),
            (("--scale-learning-rate", "0.1"), "goes with --learn-scales"),
            (("--skip", "*"), "--skip leaves nothing"),
        ],
    )
    def test_options_that_contradict(
        self, args: tuple[str, ...], message: str, qat: Qat, texts: Path
    ) -> None:
        done = qat(texts, *args)
        assert (done.code, message in done.error) == (2, True)

    def test_a_width_that_is_no_whole_number_of_groups(self, qat: Qat, texts: Path) -> None:
        done = qat(texts, "--group-size", 48)
        assert done.code == ExitCode.BAD_DATA
        assert "no multiple of --group-size 48" in done.error
        assert "--group-size 16 or 32 or 64 works" in done.error

    def test_a_model_that_is_quantized_already(
        self, qat: Qat, quantize: Any, texts: Path, model: Path
    ) -> None:
        assert quantize(model, "--scheme", "rtn", "--group-size", "16").code == 0
        done = qat(texts, source="ptq")
        assert done.code == ExitCode.BAD_DATA
        assert "already quantized (compressed-tensors)" in done.error

    def test_not_a_number(self, qat: Qat, texts: Path, model: Path, workdir: Path) -> None:
        spoilt = Path(shutil.copytree(model, workdir / "spoilt"))
        tensors = load_file(spoilt / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
        save_file(tensors, spoilt / "model.safetensors", metadata={"format": "pt"})
        done = qat(texts, source=spoilt)
        assert done.code == ExitCode.BAD_DATA
        assert "model.layers.1.mlp.up_proj.weight has 1 values that are NaN" in done.error
        assert not Path("out").exists()

    def test_records_that_are_too_short_or_too_long(self, qat: Qat, workdir: Path) -> None:
        short = write_jsonl(workdir / "short.jsonl", [{"text": "fine, this one"}, {"text": ""}])
        done = qat(short)
        assert done.code == ExitCode.BAD_DATA
        assert "short.jsonl:2" in done.error
        long = write_jsonl(workdir / "long.jsonl", tiny_records("prompt-completion"))
        done = qat(long, "--max-length", 8)
        assert done.code == ExitCode.BAD_DATA
        assert "long.jsonl:1" in done.error
        assert "more than 8 (--too-long" in done.error
        done = qat(long, "--max-length", 8, "--too-long", "drop")
        assert "no example left of the records" in done.error

    def test_an_architecture_without_linear_modules(self, qat: Qat, texts: Path, workdir: Path) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        folder = workdir / "gpt2"
        GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=2)).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        done = qat(texts, source=folder)
        assert done.code == ExitCode.BAD_DATA
        assert "GPT2LMHeadModel lacks linear modules in each of transformer.h" in done.error

    def test_a_teacher_of_another_vocabulary(self, qat: Qat, texts: Path, workdir: Path) -> None:
        other = build_tiny_model(workdir / "other", vocab_size=400)
        done = qat(texts, "--teacher", other)
        assert done.code == ExitCode.BAD_DATA
        assert "another vocabulary (384 tokens, 400 logits)" in done.error

    def test_a_loss_that_is_no_number(self, qat: Qat, texts: Path) -> None:
        done = qat(texts, "--max-steps", 6, "--learning-rate", "1e30", "--max-grad-norm", 0)
        assert done.code == ExitCode.GATE_FAILED
        assert not Path("out").exists()

    def test_weights_that_are_missing(self, qat: Qat, texts: Path, model: Path, workdir: Path) -> None:
        spoilt = Path(shutil.copytree(model, workdir / "spoilt"))
        tensors = load_file(spoilt / "model.safetensors")
        del tensors["model.layers.0.self_attn.q_proj.weight"]
        save_file(tensors, spoilt / "model.safetensors", metadata={"format": "pt"})
        done = qat(texts, source=spoilt)
        assert done.code == ExitCode.BAD_DATA
        assert "model.layers.0.self_attn.q_proj.weight" in done.error
