"""``model-import``: folders, GGUF, the builtin tiny model, pad tokens, refusals and reruns."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import Result, tiny_tokenizer

Import = Callable[..., Result]


@pytest.fixture
def model_import(click_cli: Callable[..., Result], workdir: Path) -> Import:
    return lambda *args, **keywords: click_cli("model-import", *args, **keywords)


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {k: v for p in sorted(folder.glob("*.safetensors")) for k, v in load_file(p).items()}


def assert_equal_tensors(one: dict[str, Any], other: dict[str, Any]) -> None:
    import torch

    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**content, **changes}.items() if v is not None}))


@pytest.fixture
def copy(tiny_model: Path, workdir: Path) -> Path:
    return shutil.copytree(tiny_model, workdir / "in")


def test_folder_keeps_every_tensor(model_import: Import, copy: Path, workdir: Path) -> None:
    done = model_import("in", "-o", "out", "--licence", "MIT", "--json")
    assert done.code == 0, done.stderr
    assert_equal_tensors(tensors(workdir / "out"), tensors(copy))
    manifest = json.loads((workdir / "out" / "artifact.json").read_text())
    assert (manifest["kind"], manifest["licence"], manifest["source"]) == ("model", "MIT", "in")
    assert manifest["model"]["parameters"] == sum(t.numel() for t in tensors(copy).values())
    assert manifest["changes"] == []
    assert "logits equal" in done.stderr


def test_nothing_local_is_left_in_the_files(model_import: Import, copy: Path, workdir: Path) -> None:
    edit(copy / "config.json", _name_or_path="/home/me/model")
    edit(copy / "tokenizer_config.json", name_or_path="/home/me/model")
    assert model_import("in", "-o", "out").code == 0
    for path in (workdir / "out").glob("*.json"):
        assert "/home/me" not in path.read_text()
        assert str(workdir) not in path.read_text()


def test_repeat_is_byte_identical_and_rerun_is_left(model_import: Import, copy: Path, workdir: Path) -> None:
    assert model_import("in", "-o", "out").code == 0
    before = {p.name: p.read_bytes() for p in (workdir / "out").iterdir()}
    assert "up to date" in model_import("in", "-o", "out").stderr
    assert model_import("in", "-o", "out", "--force").code == 0
    assert {p.name: p.read_bytes() for p in (workdir / "out").iterdir()} == before
    assert model_import("in", "-o", "out", "--dtype-stored", "bfloat16").code == 73


def test_dtype_and_shards(model_import: Import, copy: Path, workdir: Path) -> None:
    import torch

    args = ("--dtype-stored", "bfloat16", "--max-shard-size", "20KB")
    assert model_import("in", "-o", "out", *args).code == 0
    assert len(list((workdir / "out").glob("*.safetensors"))) > 1
    assert_equal_tensors(
        tensors(workdir / "out"), {k: v.to(torch.bfloat16) for k, v in tensors(copy).items()}
    )
    assert json.loads((workdir / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def loaded_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def pad_ids(folder: Path) -> set[int]:
    found = {
        json.loads((folder / f).read_text())["pad_token_id"]
        for f in ("config.json", "generation_config.json")
    }
    return found | {loaded_tokenizer(folder).pad_token_id}


def test_pad_equal_to_eos_becomes_an_unused_special_token(
    model_import: Import, copy: Path, workdir: Path
) -> None:
    edit(copy / "tokenizer_config.json", pad_token="<|im_end|>")
    edit(copy / "config.json", pad_token_id=3)
    done = model_import("in", "-o", "out")
    assert "pad token '<|im_end|>' → '<|pad|>' (id 1)" in done.stderr
    assert pad_ids(workdir / "out") == {1}
    assert_equal_tensors(tensors(workdir / "out"), tensors(copy))


def test_without_an_unused_special_token_the_embedding_grows(model_import: Import, workdir: Path) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    content = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] != "<|pad|>"
    inner = Tokenizer.from_str(json.dumps(content))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=384, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, eos_token_id=3, tie_word_embeddings=False)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(workdir / "in")
    tokenizer.add_special_tokens({"unk_token": "<|unk|>"})
    tokenizer.save_pretrained(workdir / "in")
    edited = json.loads((workdir / "in" / "tokenizer.json").read_text())
    edited["added_tokens"] = [t for t in edited["added_tokens"] if t["content"] != "<|pad|>"]
    del edited["model"]["vocab"]["<|pad|>"]
    edited["model"]["vocab"]["zz"] = 1
    (workdir / "in" / "tokenizer.json").write_text(json.dumps(edited))
    done = model_import("in", "-o", "out")
    assert done.code == 0, done.stderr
    assert "vocabulary 384 → 385 rows" in done.stderr
    assert pad_ids(workdir / "out") == {384}
    before, after = tensors(workdir / "in"), tensors(workdir / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name][:384], before[name])
        torch.testing.assert_close(after[name][384], before[name].mean(dim=0))


def test_pickles_are_refused(model_import: Import, copy: Path, workdir: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    done = model_import("in", "-o", "out")
    assert done.code == 65
    assert "only pickled weights (pytorch_model.bin)" in done.error
    assert not (workdir / "out").exists()


def test_missing_weights_are_refused(model_import: Import, copy: Path, workdir: Path) -> None:
    from safetensors.torch import save_file

    kept = tensors(copy)
    del kept["model.layers.1.mlp.up_proj.weight"]
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    done = model_import("in", "-o", "out")
    assert done.code == 65
    assert "model.layers.1.mlp.up_proj.weight" in done.error


def test_cut_off_weights_are_refused(model_import: Import, copy: Path) -> None:
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert model_import("in", "-o", "out").code == 65


@pytest.mark.parametrize(
    ("change", "said", "code"),
    [
        ({"architectures": ["NovelForCausalLM"]}, "'NovelForCausalLM' is not in transformers", 69),
        ({"model_type": "novel", "architectures": None}, "cannot be read", 65),
    ],
)
def test_unknown_architecture(
    model_import: Import, copy: Path, change: dict[str, Any], said: str, code: int
) -> None:
    edit(copy / "config.json", **change)
    done = model_import("in", "-o", "out")
    assert (done.code, said in done.error) == (code, True), done.stderr


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ("absent", 66, "no such file"),
        ("empty", 66, "no config.json"),
        ("file.gguf", 65, "not a GGUF file"),
        ("cut.gguf", 65, "this GGUF cannot be read"),
        ("builtin:piqa", 66, "no such builtin model; there are smollm2-135m-instruct, tiny-llama"),
        ("builtin:tiny-lama", 66, "no such builtin model (did you mean 'tiny-llama'?)"),
    ],
)
def test_what_is_no_model(model_import: Import, workdir: Path, source: str, code: int, said: str) -> None:
    (workdir / "empty").mkdir()
    (workdir / "file.gguf").write_bytes(b"nothing")
    (workdir / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    done = model_import(source, "-o", "out")
    assert (done.code, said in done.error) == (code, True), done.stderr


def write_gguf(folder: Path, target: Path, pre: str) -> None:
    """The model of ``folder`` as llama.cpp's converter would write it, in float32."""
    import gguf
    import torch

    config = json.loads((folder / "config.json").read_text())
    content = json.loads((folder / "tokenizer.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    vocabulary = sorted(content["model"]["vocab"].items(), key=lambda item: item[1])
    special = {t["content"] for t in content["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([t for t, _ in vocabulary])
    writer.add_token_types(
        [gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t, _ in vocabulary]
    )
    writer.add_token_merges([" ".join(m) for m in content["model"]["merges"]])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(3)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(3)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in tensors(folder).items():
        if "q_proj" in name or "k_proj" in name:
            n = heads if "q_proj" in name else kv_heads
            tensor = tensor.reshape(n, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.to(torch.float32).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_equals_the_model_it_was_made_from(model_import: Import, copy: Path, workdir: Path) -> None:
    write_gguf(copy, workdir / "m.gguf", "gpt-2")
    done = model_import("m.gguf", "-o", "out")
    assert done.code == 0, done.stderr
    assert_equal_tensors(tensors(workdir / "out"), tensors(copy))
    assert pad_ids(workdir / "out") == {1}
    text = "Many hands 10, 9, 8 — Größe 東京"
    assert loaded_tokenizer(workdir / "out")(text).input_ids == loaded_tokenizer(copy)(text).input_ids


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_cut_off_gguf_is_refused(model_import: Import, copy: Path, workdir: Path, share: float) -> None:
    write_gguf(copy, workdir / "m.gguf", "gpt-2")
    content = (workdir / "m.gguf").read_bytes()
    (workdir / "m.gguf").write_bytes(content[: int(len(content) * share)])
    done = model_import("m.gguf", "-o", "out")
    assert done.code == 65
    assert "cannot be read" in done.error
    assert not (workdir / "out").exists()


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        # What tokenizers of these families give, by their published tokenizer.json.
        ("smollm", ["a", "ĠĠ", "1", "2", "3", "4"]),
        ("llama-bpe", ["a", "Ġ", "Ġ", "123", "4"]),
        ("qwen2", ["a", "Ġ", "Ġ", "1", "2", "3", "4"]),
    ],
)
def test_pre_tokenizers(name: str, pieces: list[str]) -> None:
    from tuneutils.tools.model_import.gguf_tokenizer import pre_tokenizer

    assert [p for p, _ in pre_tokenizer(name).pre_tokenize_str("a  1234")] == pieces


def test_unknown_pre_tokenizer_is_told_of(model_import: Import, copy: Path, workdir: Path) -> None:
    write_gguf(copy, workdir / "m.gguf", "novel-bpe")
    assert "pre-tokenizer 'novel-bpe' is not known" in model_import("m.gguf", "-o", "out").stderr


def test_tiny_llama_depends_on_the_seed_alone(model_import: Import, workdir: Path) -> None:
    for output, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert model_import("builtin:tiny-llama", "-o", output, "--seed", seed).code == 0
    files = {name: {p.name: p.read_bytes() for p in (workdir / name).iterdir()} for name in "abc"}
    assert files["a"] == files["b"]
    assert {n for n in files["a"] if files["a"][n] != files["c"][n]} == {"model.safetensors", "artifact.json"}
    tokenizer = loaded_tokenizer(workdir / "a")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    text = "What is the capital? 東京 é"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_dry_run_loads_nothing(cli: Callable[..., Result], workdir: Path) -> None:
    done = cli("model-import", "builtin:tiny-llama", "-o", "out", "--dry-run", cwd=workdir)
    assert done.code == 0
    assert not (workdir / "out").exists()


@pytest.mark.slow
def test_smollm2(cli: Callable[..., Result], workdir: Path) -> None:
    done = cli("model-import", "builtin:smollm2-135m-instruct", "-o", "out", "--json", cwd=workdir)
    assert done.code == 0, done.stderr
    summary = done.json()
    assert summary["parameters"] == 134_515_008
    assert (summary["pad_token"], summary["eos_token"]) == ("<empty_output>", "<|im_end|>")
    assert pad_ids(workdir / "out") == {16}
    assert loaded_tokenizer(workdir / "out").tokenize("a  2") == ["a", "ĠĠ", "2"]
