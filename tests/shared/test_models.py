"""What a model's name stands for, and what is refused before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import build_tiny_model, tiny_tokenizer

from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.models import (
    context_length,
    load_config,
    load_model,
    load_tokenizer,
    own_pad_token,
    parameter_counts,
    resolve,
)


@pytest.fixture
def base(workdir: Path, tiny_model: Path) -> Path:
    """A copy of the tiny model in the working directory."""
    return Path(shutil.copytree(tiny_model, workdir / "base")).relative_to(workdir)


def save_adapter(folder: Path, base: Path, recorded: str | None = None, **manifest: Any) -> Path:
    """A LoRA of the base; with ``recorded``, as an artifact whose manifest names its base by hash."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    made = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    made.save_pretrained(folder)
    if recorded is not None:
        inputs = [{"role": "model", "path": str(base), "sha256": recorded}]
        files: dict[str, Any] = {}
        text = json.dumps({"schema": 1, "kind": "adapter", "inputs": inputs, "files": files, **manifest})
        (folder / "artifact.json").write_text(text)
    return folder


def refusal(given: str | Path) -> ToolError:
    with pytest.raises(ToolError) as caught:
        resolve(str(given))
    assert str(given).split("/")[0] in str(caught.value)
    return caught.value


def test_a_folder(base: Path) -> None:
    ref = resolve(str(base))
    assert (ref.kind, ref.path, ref.root, ref.quantization) == ("folder", "base", ref, None)


def test_a_gguf_file_and_a_folder_of_one(workdir: Path) -> None:
    (workdir / "m").mkdir()
    (workdir / "m" / "a.gguf").write_bytes(b"GGUF")
    assert resolve("m/a.gguf").kind == resolve("m").kind == "gguf"
    assert resolve("m").path == "m/a.gguf"
    (workdir / "m" / "b.gguf").write_bytes(b"GGUF")
    assert refusal("m").code == ExitCode.BAD_DATA
    assert resolve("m/b.gguf").path == "m/b.gguf"


@pytest.mark.parametrize(
    ("given", "path", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name@main", "org/name", "main"),
        ("org/name@refs/pr/1", "org/name", "refs/pr/1"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct@12fd25f", "HuggingFaceTB/SmolLM2-135M-Instruct", "12fd25f"),
    ],
)
def test_a_hub_id(given: str, path: str, revision: str | None, workdir: Path) -> None:
    ref = resolve(given)
    assert (ref.kind, ref.path, ref.revision) == ("hub", path, revision)


@pytest.mark.parametrize("given", ["absent", "a/b/c", "./absent", "builtin:smollm2-135m-instruct", "org/"])
def test_nothing_of_that_name(given: str, workdir: Path) -> None:
    error = refusal(given)
    assert error.code == ExitCode.MISSING_INPUT
    assert ("model-import" in str(error)) == (":" in given)


def test_files_and_folders_that_are_no_model(workdir: Path) -> None:
    (workdir / "notes.txt").write_text("x")
    assert refusal("notes.txt").code == ExitCode.BAD_DATA
    (workdir / "empty").mkdir()
    assert refusal("empty").code == ExitCode.BAD_DATA


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.ckpt", "m.pkl"])
def test_pickles_are_refused(name: str, base: Path) -> None:
    (base / "model.safetensors").rename(base / name)
    error = refusal(base)
    assert error.code == ExitCode.BAD_DATA
    assert f"{name}: pickled weights are refused" in str(error)
    (base / name).unlink()
    assert refusal(base).code == ExitCode.MISSING_INPUT


def test_pickles_beside_safetensors_are_not_read(base: Path) -> None:
    (base / "pytorch_model.bin").write_bytes(b"not a pickle")
    assert resolve(str(base)).kind == "folder"
    assert load_model(str(base), dtype="float32").model.config.hidden_size == 32


def test_an_adapter_leads_to_its_base(workdir: Path, base: Path) -> None:
    save_adapter(workdir / "adapter", base)
    ref = resolve("adapter")
    assert (ref.kind, ref.base and ref.base.path, ref.root.path) == ("adapter", "base", "base")
    (workdir / "adapter" / "adapter_model.safetensors").rename(workdir / "adapter" / "adapter_model.bin")
    assert "pickled" in str(refusal("adapter"))


def test_an_adapter_whose_base_is_gone_or_not_named(workdir: Path, base: Path) -> None:
    save_adapter(workdir / "adapter", base)
    shutil.rmtree(base)
    error = refusal("adapter")
    assert error.code == ExitCode.MISSING_INPUT
    assert "'base' is not there; run from the folder it was made in" in str(error)
    config = workdir / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    assert "does not name its base" in str(refusal("adapter"))


def test_an_adapter_of_an_adapter(workdir: Path, base: Path) -> None:
    save_adapter(workdir / "first", base)
    save_adapter(workdir / "second", base)
    config = workdir / "second" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "first"}))
    assert "is itself an adapter; merge that first (adapter-merge)" in str(refusal("second"))


def test_an_adapter_whose_base_has_changed(workdir: Path, base: Path) -> None:
    from tuneutils.shared.artifact import sha256_tree

    save_adapter(workdir / "adapter", base, sha256_tree(base), quantization="nf4")
    assert resolve("adapter").quantization == "nf4"
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    error = refusal("adapter")
    assert error.code == ExitCode.BAD_DATA
    assert "its base base has changed since the adapter was made; train it again" in str(error)


def test_an_adapter_for_another_width(workdir: Path, base: Path, other_tiny_model: Path) -> None:
    save_adapter(workdir / "adapter", other_tiny_model)
    config = workdir / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "base"}))
    with pytest.raises(ToolError, match=r"adapter: does not fit its base model: .*size mismatch"):
        load_model("adapter", dtype="float32")


def test_a_loaded_adapter_computes_what_peft_computes(workdir: Path, base: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    save_adapter(workdir / "adapter", base)
    loaded = load_model("adapter", dtype="float32", device="cpu")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "adapter").eval()
    ids = torch.arange(4, 20)[None]
    assert torch.equal(loaded.model(ids).logits, plain(ids).logits)
    assert not loaded.model.training
    assert loaded.pad_id != loaded.tokenizer.eos_token_id
    assert (loaded.dtype, loaded.device.type) == (torch.float32, "cpu")


def test_a_damaged_model_is_one_line(base: Path) -> None:
    (base / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0damaged!")
    with pytest.raises(ToolError, match="base: cannot load"):
        load_model(str(base), dtype="float32")
    (base / "config.json").write_text("{")
    with pytest.raises(ToolError, match="base: cannot load"):
        load_config(resolve(str(base)))


def test_weights_that_are_missing_are_not_made_up(workdir: Path, base: Path) -> None:
    """Transformers and PEFT start them at random, with a warning."""
    from safetensors.torch import load_file, save_file

    save_adapter(workdir / "adapter", base)
    for path, name in (
        (workdir / "adapter" / "adapter_model.safetensors", "lora_A"),
        (base / "model.safetensors", "layers.1.mlp.up_proj"),
    ):
        weights = load_file(path)
        gone = next(key for key in weights if name in key)
        save_file({k: v for k, v in weights.items() if k != gone}, path, metadata={"format": "pt"})
        with pytest.raises(ToolError, match=name):
            load_model("adapter", dtype="float32")


def test_the_context_is_the_configs(base: Path) -> None:
    assert context_length(resolve(str(base))) == 128


def test_the_pad_token_is_never_eos(base: Path) -> None:
    config = json.loads((base / "tokenizer_config.json").read_text())
    for pad in ("<|im_end|>", None):
        (base / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": pad}))
        tokenizer = load_tokenizer(str(base))
        assert tokenizer.pad_token == "<|pad|>"
        assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_tokenizer_without_eos_is_refused(base: Path) -> None:
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))
    with pytest.raises(ToolError, match="no EOS token"):
        load_tokenizer(str(base))


def test_a_free_special_token_pads() -> None:
    """Neither one that the template writes nor one with a meaning of its own."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|spare|>"]})
    assert own_pad_token(tokenizer) == "<|pad|>"
    tokenizer.chat_template += "<|pad|>"
    assert own_pad_token(tokenizer) == "<|spare|>"
    tokenizer.chat_template += "<|spare|>"
    with pytest.raises(ToolError, match="no token to pad with but EOS; import the model with model-import"):
        own_pad_token(tokenizer)


def test_parameters_are_counted_as_what_they_stand_for(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    expected = sum(p.numel() for p in model.parameters())
    assert parameter_counts(model) == {"total": expected, "trainable": expected}
    pytest.importorskip("bitsandbytes")
    wide = str(build_tiny_model(tmp_path / "wide", hidden_size=64, intermediate_size=128))
    expected = parameter_counts(load_model(wide, dtype="float32").model)["total"]
    packed = load_model(wide, dtype="float32", quantization="nf4").model.requires_grad_(False)
    assert parameter_counts(packed) == {"total": expected, "trainable": 0}


def test_4bit_rows_that_bitsandbytes_reads_wrongly_on_a_cpu(tiny_model: Path) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ToolError, match=r"self_attn.q_proj is 32 wide, no multiple of 64") as caught:
        load_model(str(tiny_model), device="cpu", dtype="float32", quantization="nf4")
    assert caught.value.code == 65


@pytest.mark.parametrize(
    ("method", "package"), [("bitsandbytes", "bitsandbytes"), ("compressed-tensors", "compressed_tensors")]
)
def test_quantized_weights_without_the_package_that_reads_them(
    method: str, package: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == package else real(n, *a))
    with pytest.raises(ToolError, match=rf"{package}.*pip install 'tuneutils\[quantize\]'") as caught:
        load_model(str(base))
    assert caught.value.code == 69
