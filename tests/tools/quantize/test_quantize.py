"""What the tool writes, loaded by the other libraries; what it says of it; what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import Result, build_tiny_model, tiny_records, write_jsonl

from tuneutils.shared.quantizers import Grid, fake_quantize, fit

pytest.importorskip("compressed_tensors")
Quantize = Callable[..., Result]
SCHEMES = {
    "int8": ("int8",),
    "rtn": ("rtn", "--group-size", "16"),
    "rtn-symmetric": ("rtn", "--group-size", "16", "--symmetric"),
    "rtn-3bit": ("rtn", "--bits", "3", "--group-size", "32"),
    "gptq": ("gptq", "--group-size", "16"),
    "gptq-rows": ("gptq", "--group-size", "0", "--bits", "8", "--symmetric"),
    "awq": ("awq", "--group-size", "16"),
    "mixed": ("mixed", "--group-size", "16", "--budget", "6.5"),
    "int8-dynamic": ("int8-dynamic",),
    "nf4": ("nf4",),
    "fp4-double": ("fp4-double",),
    "llm-int8": ("llm-int8",),
}


def reload(folder: Path | str, dtype: torch.dtype = torch.float32) -> Any:
    """The artifact as Transformers loads it, its weights ready to be looked at."""
    from transformers import AutoModelForCausalLM

    loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return loaded.eval()


def manifest(folder: str = "out") -> dict[str, Any]:
    return json.loads(Path(folder, "artifact.json").read_text())


def matrix_names(model: Path) -> list[str]:
    return [n.removesuffix(".weight") for n in load_file(model / "model.safetensors") if "_proj" in n]


def weight_of(module: Any) -> torch.Tensor:
    """A loaded module's weights as it computes with them."""
    if type(module).__name__ == "Linear4bit":
        from bitsandbytes import functional

        return functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    if type(module).__name__ == "Linear8bitLt":
        scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
        return module.weight.data.float() * scale[:, None] / 127
    return module.weight.detach().float()


@pytest.mark.parametrize("case", SCHEMES)
def test_transformers_loads_what_was_written(case: str, model: Path, quantize: Quantize) -> None:
    assert quantize(model, *SCHEMES[case]).code == 0
    ids = torch.arange(5, 21)[None]
    loaded = reload("out")
    if case in ("mixed", "int8-dynamic"):  # decompressed at the first forward
        loaded(ids)
    modules = dict(loaded.named_modules())
    original = load_file(model / "model.safetensors")
    found = manifest()["layers"]
    assert set(found) == set(matrix_names(model))
    for name in matrix_names(model):
        before, after = original[f"{name}.weight"], weight_of(modules[name])
        unweighted = float((before - after).square().sum() / before.square().sum())
        assert 0 < unweighted < 0.1
        if manifest()["metrics"]["error"]["weighted_by"] == "nothing":
            assert found[name]["error"] == pytest.approx(unweighted, rel=2e-3)
    with torch.no_grad():
        logits = reload("out")(ids).logits
        base = reload(model)(ids).logits
    cosine = torch.nn.functional.cosine_similarity(logits.flatten(), base.flatten(), dim=0)
    assert cosine > 0.9


@pytest.mark.parametrize(
    ("symmetric", "dtype"), [(s, d) for s in (True, False) for d in ("float32", "bfloat16")]
)
def test_rounding_to_nearest_is_loaded_bit_exactly(
    symmetric: bool, dtype: str, model: Path, quantize: Quantize
) -> None:
    flag = "--symmetric" if symmetric else "--no-symmetric"
    assert quantize(model, "rtn", "--group-size", "16", flag, "--dtype-stored", dtype).code == 0
    loaded = dict(reload("out", getattr(torch, dtype)).named_parameters())
    grid = Grid(4, 16, symmetric)
    for name in matrix_names(model):
        weight = load_file(model / "model.safetensors")[f"{name}.weight"]
        expected = fake_quantize(weight, grid, fit(weight, grid)).to(getattr(torch, dtype))
        assert torch.equal(loaded[f"{name}.weight"], expected)


@pytest.mark.parametrize("scheme", ["nf4", "nf4-double", "fp4", "llm-int8"])
def test_bitsandbytes_own_quantization_is_the_same(scheme: str, model: Path, quantize: Quantize) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    assert quantize(model, scheme).code == 0
    if scheme == "llm-int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=scheme[:3],
            bnb_4bit_use_double_quant=scheme.endswith("double"),
        )
    theirs = AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.bfloat16)
    ours, theirs = dict(reload("out", torch.bfloat16).named_modules()), dict(theirs.named_modules())
    for name in matrix_names(model):
        assert torch.equal(ours[name].weight.data, theirs[name].weight.data)
        assert torch.equal(weight_of(ours[name]), weight_of(theirs[name]))


def test_bits_per_weight_are_the_bytes_on_disk(model: Path, quantize: Quantize) -> None:
    assert quantize(model, "rtn", "--group-size", "16").code == 0
    metrics = manifest()["metrics"]
    data = sum(t.numel() * t.element_size() for t in load_file("out/model.safetensors").values())
    weights = sum(t.numel() for t in load_file(model / "model.safetensors").values())
    assert (metrics["bytes"], metrics["weights"]) == (data, weights)
    assert metrics["bits_per_weight"] == pytest.approx(8 * data / weights, abs=1e-4)
    file = Path("out/model.safetensors").stat().st_size
    assert 0 < file - data < 8192


def test_embeddings_are_counted_and_can_be_quantized(model: Path, tied: Path, quantize: Quantize) -> None:
    args = ("rtn", "--group-size", "16")
    for source, name in ((model, "own"), (tied, "tied")):
        assert quantize(source, *args, out=f"plain-{name}").code == 0
        assert quantize(source, *args, "--embeddings", out=f"small-{name}").code == 0
        plain, small = manifest(f"plain-{name}")["metrics"], manifest(f"small-{name}")["metrics"]
        assert small["weights"] == plain["weights"]
        assert small["bits_per_weight"] < plain["bits_per_weight"]
        loaded, original = reload(f"small-{name}"), load_file(source / "model.safetensors")
        embedding = original["model.embed_tokens.weight"]
        expected = fake_quantize(embedding, Grid(4, 16, False)).bfloat16().float()
        assert torch.equal(loaded.get_input_embeddings().weight.data, expected)
    assert torch.equal(loaded.get_output_embeddings().weight.data, expected)
    assert loaded.config.tie_word_embeddings is False


def test_calibrated_errors_are_below_those_of_rounding(model: Path, texts: Path, quantize: Quantize) -> None:
    calibrate = ("--calibration", texts, "--calibration-rows", "8", "--calibration-length", "32")
    errors = {}
    for scheme in ("rtn", "gptq", "awq"):
        assert quantize(model, scheme, "--group-size", "16", *calibrate, out=scheme).code == 0
        assert manifest(scheme)["metrics"]["error"]["weighted_by"] == "calibration"
        errors[scheme] = {n: layer["error"] for n, layer in manifest(scheme)["layers"].items()}
    below = [errors["gptq"][n] <= errors["rtn"][n] for n in errors["rtn"]]
    assert sum(below) >= 0.95 * len(below)
    assert sum(errors["awq"].values()) < sum(errors["rtn"].values())


def test_a_mixed_model_keeps_its_budget(model: Path, quantize: Quantize) -> None:
    assert quantize(model, "mixed", "--group-size", "16", "--budget", "6.5").code == 0
    layers, original = manifest()["layers"], load_file(model / "model.safetensors")
    sizes = {name: original[f"{name}.weight"].numel() for name in layers}
    stored_shapes = 16 * 8 / 1  # bits of each matrix's weight_shape, which no budget counts
    spent = sum(layers[n]["bits"] * sizes[n] - stored_shapes for n in layers) / sum(sizes.values())
    assert 5.0 < spent <= 6.5
    assert len({round(layer["bits"]) for layer in layers.values()}) == 2


def test_what_is_skipped_stays(model: Path, quantize: Quantize) -> None:
    assert quantize(model, "rtn", "--group-size", "16", "--skip", "*.down_proj").code == 0
    loaded, original = reload("out"), load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(loaded.get_parameter(name), original[name].bfloat16().float())
    assert all("down_proj" not in n for n in manifest()["layers"])


def test_the_calibration_data_are_inputs(model: Path, texts: Path, quantize: Quantize) -> None:
    import hashlib

    assert quantize(model, "gptq", "--group-size", "16").code == 0
    found = {i["role"]: i["sha256"] for i in manifest()["inputs"]}
    assert found["calibration"] == hashlib.sha256(texts.read_bytes()).hexdigest()
    assert quantize(model, "gptq", "--group-size", "16", "--seed", "1", out="other").code == 0
    assert manifest("other")["files"]["model.safetensors"] != manifest()["files"]["model.safetensors"]


class TestRefusals:
    def test_already_quantized(self, model: Path, quantize: Quantize) -> None:
        assert quantize(model, "int8").code == 0
        again = quantize(Path("out"), "int8", out="twice")
        assert again.code == 65
        assert "already quantized (compressed-tensors)" in again.error

    def test_widths_that_do_not_divide(self, model: Path, quantize: Quantize) -> None:
        done = quantize(model, "rtn", "--group-size", "48")
        assert done.code == 65
        assert "model.layers.0.self_attn.q_proj" in done.error
        assert "64 wide, no multiple of --group-size 48" in done.error
        assert "--group-size 16 or 32 or 64 works" in done.error

    def test_widths_that_bitsandbytes_gets_wrong(self, tiny_model: Path, quantize: Quantize) -> None:
        done = quantize(tiny_model, "nf4")
        assert done.code == 65
        assert "32 wide, no multiple of bitsandbytes' block of 64" in done.error

    def test_calibration_that_is_missing_short_or_of_another_kind(
        self, model: Path, tmp_path: Path, texts: Path, quantize: Quantize, click_cli: Any
    ) -> None:
        done = click_cli("quantize", model, "-o", "out", "--scheme", "gptq")
        assert (done.code, "needs --calibration RECORDS" in done.error) == (2, True)
        done = quantize(model, "gptq", "--group-size", "16", "--calibration", texts)
        assert (done.code, "too few to calibrate on 128 rows of 512" in done.error) == (65, True)
        path = write_jsonl(tmp_path / "p.jsonl", tiny_records("parallel"))
        done = quantize(model, "gptq", "--group-size", "16", "--calibration", path)
        assert (done.code, "p.jsonl:1: needs the fields" in done.error) == (65, True)

    def test_not_a_number(self, model: Path, tmp_path: Path, quantize: Quantize) -> None:
        spoilt = Path(shutil.copytree(model, tmp_path / "spoilt"))
        tensors = load_file(spoilt / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("inf")
        save_file(tensors, spoilt / "model.safetensors", metadata={"format": "pt"})
        done = quantize(spoilt, "rtn", "--group-size", "16")
        assert done.code == 65
        assert "model.layers.1.mlp.up_proj.weight has 1 values that are NaN or infinite" in done.error
        assert not Path("out").exists()

    def test_another_architecture(self, tmp_path: Path, texts: Path, quantize: Quantize) -> None:
        from support import tiny_tokenizer
        from transformers import GPT2Config, GPT2LMHeadModel

        folder = tmp_path / "gpt2"
        GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=2)).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        done = quantize(folder, "rtn", "--group-size", "16")
        assert done.code == 65
        assert "GPT2LMHeadModel lacks linear modules in each of transformer.h" in done.error

    def test_a_missing_package(
        self, model: Path, quantize: Quantize, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import importlib.util

        real = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else real(n, *a)
        )
        done = quantize(model, "nf4")
        assert done.code == 69
        assert "pip install 'tuneutils[quantize]'" in done.error

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("mixed",), "mixed needs --budget"),
            (("rtn", "--budget", "4"), "rtn takes no --budget"),
            (("mixed", "--budget", "4.1", "--group-size", "16"), "the smallest choice takes 5.000 bits"),
            (("nf4", "--embeddings"), "keeps them in full precision"),
            (("rtn", "--skip", "*"), "--skip leaves nothing"),
        ],
    )
    def test_options_that_contradict(
        self, args: tuple[str, ...], message: str, model: Path, quantize: Quantize
    ) -> None:
        done = quantize(model, *args)
        assert done.code == 2
        assert re.search(message, done.error)


@pytest.mark.slow
def test_memory_is_one_layer_above_what_reading_takes(tmp_path: Path, cli: Any) -> None:
    """A model of 24 layers, 25 MB each in float32: the peak stays far below one copy."""
    model = build_tiny_model(
        tmp_path / "m", hidden_size=768, intermediate_size=2048, num_hidden_layers=24, num_attention_heads=12,
        num_key_value_heads=12,
    )  # fmt: skip
    size = (model / "model.safetensors").stat().st_size
    small = build_tiny_model(tmp_path / "s", hidden_size=768, intermediate_size=2048, num_hidden_layers=1,
                             num_attention_heads=12, num_key_value_heads=12)  # fmt: skip
    peaks = []
    for source in (small, model):
        out = tmp_path / f"{source.name}-out"
        assert cli("quantize", source, "--scheme", "rtn", "-o", out, "--dtype", "float32").code == 0
        log = tmp_path / ".work" / out.name / "run.jsonl"
        peaks.append(json.loads(log.read_text().splitlines()[-1])["peak_rss_bytes"])
    assert peaks[1] - peaks[0] < 0.35 * size
