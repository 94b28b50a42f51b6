"""Packages against their source, each in its own runtime."""

from __future__ import annotations

import json
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support import (
    PROVERBS,
    Result,
    build_tiny_model,
    environment,
    tiny_records,
    tiny_tokenizer,
    tool_args,
    write_jsonl,
)

from tuneutils.shared.artifact import verify
from tuneutils.shared.engines import runtimes
from tuneutils.shared.engines.client import EngineProcess
from tuneutils.shared.errors import GateFailed, ToolError
from tuneutils.shared.models import load_model, load_tokenizer, resolve
from tuneutils.shared.records import Reader
from tuneutils.shared.weights import Weights
from tuneutils.tools.edge_export import gguf_model, gguf_vocab, parity

Cli = Callable[..., Result]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
WIDE = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.2}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip

llama_cpp = pytest.mark.skipif(not runtimes.installed("llama.cpp"), reason="run edge-export runtime first")
onnx = pytest.mark.skipif(not runtimes.installed("onnxruntime-genai"), reason="needs the extra edge")
openvino = pytest.mark.skipif(not runtimes.installed("openvino-genai"), reason="needs the extra edge")
executorch = pytest.mark.skipif(not runtimes.installed("executorch"), reason="needs the extra executorch")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with tied embeddings, widths of whole blocks and logits that differ."""
    return build_tiny_model(tmp_path_factory.mktemp("edge") / "tied", tie_word_embeddings=True, **WIDE)


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("edge") / "text.jsonl", tiny_records("text"))


def build(folder: Path, name: str, **fields: Any) -> Path:
    """A tiny random model of any architecture; norms are not at their start value either."""
    tokenizer = tiny_tokenizer()
    given = {
        "vocab_size": len(tokenizer), "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
        "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 1, **WIDE, **fields,
    }  # fmt: skip
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = getattr(transformers, f"{name}ForCausalLM")(config(**given))
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def to_gguf(folder: Path, target: Path, precision: str = "f32") -> Path:
    ref = resolve(str(folder))
    gguf_model.write_gguf(Weights(ref), load_tokenizer(ref), target, precision)
    return target


def both_logprobs(folder: Path, engine: str, package: Path, scratch: Path) -> tuple[Any, Any]:
    """Log-probabilities of one text by Transformers and by the runtime."""
    loaded = load_model(str(folder), dtype="float32")
    ids = loaded.tokenizer.encode("Still waters run deep, and rivers find the sea.")[:40]
    with torch.no_grad():
        source = loaded.model(torch.tensor([ids])).logits[0]
    with EngineProcess(engine, package, ONE_THREAD) as process:
        (found,) = process.logits([ids], scratch)
    return source.log_softmax(-1), torch.from_numpy(found).log_softmax(-1)


@llama_cpp
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Llama", {"tie_word_embeddings": True}),
        ("Llama", {"attention_bias": True}),
        ("Llama", {"rope_parameters": LLAMA3}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 32}),
        ("Gemma", {}),
        ("Gemma2", {"query_pre_attn_scalar": 16}),
        ("Gemma3", {"num_hidden_layers": 6, "query_pre_attn_scalar": 16, "sliding_window": 16}),
    ],
)
def test_llama_cpp_computes_what_transformers_does(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    folder = build(tmp_path / "model", name, **fields)
    wanted, found = both_logprobs(folder, "llama.cpp", to_gguf(folder, tmp_path / "m.gguf"), tmp_path)
    kl = (wanted.exp() * (wanted - found)).sum(-1)
    assert kl.max() < 2e-4  # keys and values are float16 in llama.cpp's cache
    assert wanted.std() > 0.5


def test_permute_pairs_the_halves_of_each_head() -> None:
    rows = torch.arange(8.0)[:, None]
    assert gguf_model.permute(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_tied_head_is_stored_once(model: Path, tmp_path: Path) -> None:
    import gguf

    path = to_gguf(model, tmp_path / "m.gguf", "bf16")
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert "token_embd.weight" in tensors
    assert "output.weight" not in tensors
    stored = load_model(str(model), dtype="float32").model.get_input_embeddings().weight
    bits = torch.from_numpy(tensors["token_embd.weight"].data.copy()).view(torch.bfloat16)
    assert torch.equal(bits, stored.detach().bfloat16())


@llama_cpp
def test_the_package_has_all_that_it_needs(click_cli: Cli, model: Path, heldout: Path, workdir: Path) -> None:
    args = ("--heldout", heldout, "--scheme", "q8-0", "--threads", "1")
    done = click_cli("edge-export", model, *args, "-o", "out", "--json")
    assert done.code == 0, done.stderr
    found = done.json()
    assert {p.name for p in Path("out").iterdir()} == {
        "artifact.json", "chat.json", "example.py", "model.gguf",
        "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert 8 * found["tensor_types"]["Q8_0"]["bytes"] / found["tensor_types"]["Q8_0"]["parameters"] == 8.5
    assert found["agreement"]["value"] > 0.9
    assert found["kl"]["value"] < 0.01
    assert found["tokenized_alike"] == 1.0
    assert found["parameters"] == sum(p.numel() for p in load_model(str(model)).model.parameters())
    chat = json.loads(Path("out/chat.json").read_text())
    assert chat == {
        "before": "<|im_start|>user\n", "after": "<|im_end|>\n<|im_start|>assistant\n",
        "stop": [3], "context": 128,
    }  # fmt: skip


@llama_cpp
def test_the_example_answers_as_the_source_does(
    click_cli: Cli, model: Path, heldout: Path, workdir: Path
) -> None:
    args = ("--heldout", heldout, "--scheme", "f32", "--threads", "1", "-o", "out")
    done = click_cli("edge-export", model, *args)
    assert done.code == 0, done.stderr
    program = [sys.executable, "-I", "out/example.py", str(runtimes.llama_cpp_folder()), "Measure twice"]
    said = subprocess.run(program, capture_output=True, check=True, timeout=200)
    wanted = greedy_answer(model, "Measure twice").split()
    assert wanted
    assert said.stdout.decode("utf-8", "replace").split()[:3] == wanted[:3]


def greedy_answer(model: Path, prompt: str) -> str:
    loaded = load_model(str(model), dtype="float32")
    chat = [{"role": "user", "content": prompt}]
    ids = loaded.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    made = loaded.model.generate(ids, max_new_tokens=32, do_sample=False)[0, ids.shape[1] :]
    return str(loaded.tokenizer.decode(made, skip_special_tokens=True))


@llama_cpp
def test_a_damaged_weight_is_caught(model: Path, heldout: Path, tmp_path: Path) -> None:
    import gguf

    path = to_gguf(model, tmp_path / "m.gguf")
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_down.weight")
    with open(path, "r+b") as stream:
        stream.seek(tensor.data_offset)
        stream.write(np.zeros(int(tensor.n_elements), np.float32).tobytes())
    loaded = load_model(str(model), dtype="float32")
    records = list(Reader([str(heldout)], formats=("text",)).located())
    texts = parity.windows(loaded, records, tokens=200, max_length=100, template="auto")
    with EngineProcess("llama.cpp", path, ONE_THREAD) as engine:
        found = parity.metrics(parity.compare(loaded, engine, texts, tmp_path), seed=0)
    with pytest.raises(GateFailed, match="KL"):
        parity.check_gate({**found, "tokenized_alike": 1.0}, 0.95, 0.02, None)


@llama_cpp
def test_a_kill_while_the_runtime_checks_leaves_no_package_and_no_process(
    click_cli: Cli, model: Path, heldout: Path, workdir: Path
) -> None:
    args = ("--heldout", str(heldout), "--scheme", "q8-0", "--threads", "1", "-o", "out")
    process = subprocess.Popen(
        [sys.executable, *tool_args("edge-export"), str(model), *args],
        env=environment(),
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not list(workdir.glob(".out.*.tmp/chat.json")):
        time.sleep(0.002)  # the model's file is whole, and llama.cpp is about to load it
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not Path("out").exists()
    done = click_cli("edge-export", model, *args)
    assert done.code == 0, done.stderr
    assert verify(Path("out")) == []
    assert not list(workdir.glob(".out.*"))
    deadline = time.monotonic() + 60
    while (left := runtimes_of(workdir)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def runtimes_of(folder: Path) -> list[str]:
    """Command lines of runtimes that serve a file below a folder (Linux; elsewhere none are seen)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if "shared.engines" in line and str(folder) in line:
            found.append(line)
    return found


@llama_cpp
def test_a_tied_model_is_exported_with_one_matrix_for_both(
    click_cli: Cli, model: Path, heldout: Path, workdir: Path
) -> None:
    done = click_cli("edge-export", model, "--heldout", heldout, "--scheme", "f32", "-o", "out", "--json")
    assert done.code == 0, done.stderr
    source = load_model(str(model)).model
    assert source.get_input_embeddings().weight is source.get_output_embeddings().weight
    stored = sum(row["parameters"] for row in done.json()["tensor_types"].values())
    assert stored == sum(p.numel() for p in source.parameters())
    assert done.json()["bits_per_weight"] == pytest.approx(32)


@llama_cpp
def test_a_package_below_the_threshold_is_refused(
    click_cli: Cli, model: Path, heldout: Path, workdir: Path
) -> None:
    args = ("--heldout", heldout, "--scheme", "q4-0", "--max-kl", "1e-6", "--threads", "1", "-o", "out")
    done = click_cli("edge-export", model, *args)
    assert done.code == 1
    assert "--max-kl 1e-06" in done.error
    assert not any(workdir.iterdir())


def test_windows_stop_at_the_number_of_tokens(model: Path, heldout: Path) -> None:
    loaded = load_model(str(model), dtype="float32")
    records = list(Reader([str(heldout)], formats=("text",)).located())
    texts = parity.windows(loaded, records, tokens=50, max_length=20, template="auto")
    scored = [sum(x != -100 for x in w.labels[1:]) for cut in texts for w in cut]
    assert sum(scored) == 50
    assert max(len(w.input_ids) for cut in texts for w in cut) <= 20


def test_an_absent_runtime_names_the_line_that_installs_it(
    click_cli: Cli, model: Path, heldout: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEUTILS_LLAMA_CPP", str(workdir / "none"))
    done = click_cli("edge-export", model, "--heldout", heldout, "-o", "out")
    assert done.code == 69
    assert done.error.endswith("run: edge-export runtime")
    monkeypatch.setitem(runtimes.WHEELS, "onnxruntime-genai", ("no_such_module", "edge"))
    done = click_cli("edge-export", model, "--heldout", heldout, "--target", "onnx", "-o", "out")
    assert done.code == 69
    assert "pip install 'tuneutils[edge]'" in done.error


class LocalPrebuilt:
    """A local folder in place of the npm package, with a hash that is not its own."""

    def __init__(self, folder: Path) -> None:
        self.source = f"{folder}/*#sha256={'0' * 64}"


def test_the_runtime_is_checked_against_its_hash(
    click_cli: Cli, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workdir / "libs").mkdir()
    (workdir / "libs" / "libllama.so").write_bytes(b"not the library")
    here = platform.system(), platform.machine()
    monkeypatch.setattr(runtimes, "PREBUILT", {here: LocalPrebuilt(workdir / "libs")})
    monkeypatch.setenv("TUNEUTILS_LLAMA_CPP", str(workdir / "into"))
    done = click_cli("edge-export", "runtime")
    assert done.code == 65
    assert "SHA-256" in done.error
    assert not (workdir / "into").exists()


@llama_cpp
def test_a_width_that_no_block_divides_is_told(click_cli: Cli, heldout: Path, workdir: Path) -> None:
    folder = build_tiny_model(workdir / "m", hidden_size=64, intermediate_size=40)
    args = ("--heldout", heldout, "--min-agreement", "0", "--max-kl", "100", "--threads", "1", "--json")
    done = click_cli("edge-export", folder, *args, "--scheme", "q8-0", "-o", "out")
    assert done.code == 0, done.stderr
    types = done.json()["tensor_types"]  # rows of 40 are no whole blocks of 32: left in half precision
    assert types["F16"]["parameters"] == 2 * 64 * 40


def test_refusals(click_cli: Cli, model: Path, heldout: Path, workdir: Path) -> None:
    from safetensors.torch import load_file, save_file

    damaged = build_tiny_model(workdir / "nan")
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ToolError, match=r"layers\.1\.mlp\.up_proj"):
        to_gguf(damaged, workdir / "m.gguf")
    other = build_tiny_model(workdir / "act", hidden_act="gelu")
    with pytest.raises(ToolError, match="activation is gelu"):
        to_gguf(other, workdir / "m.gguf")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["FalconForCausalLM"]}))
    with pytest.raises(ToolError, match="FalconForCausalLM"):
        to_gguf(other, workdir / "m.gguf")
    (other / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq"}})
    )
    with pytest.raises(ToolError, match="already quantized"):
        to_gguf(other, workdir / "m.gguf")
    done = click_cli("edge-export", model, "--heldout", heldout, "--scheme", "int4", "-o", "out")
    assert done.code == 2


def test_pre_tokenizers_are_named_or_refused() -> None:
    byte = {"type": "ByteLevel", "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    chain = {"type": "Sequence", "pretokenizers": [digits, byte]}
    assert gguf_vocab.pre_tokenizer({"pre_tokenizer": byte}, "m") == "gpt-2"
    assert gguf_vocab.pre_tokenizer({"pre_tokenizer": chain}, "m") == "smollm"
    with pytest.raises(ToolError, match="Whitespace"):
        gguf_vocab.pre_tokenizer({"pre_tokenizer": {"type": "Whitespace"}}, "m")


@llama_cpp
def test_a_byte_fallback_tokenizer_cuts_alike(tmp_path: Path) -> None:
    """The Llama 2 kind: pieces with ▁ and bytes, merged in llama.cpp by scores made of the merges' ranks."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = build_tiny_model(tmp_path / "model", vocab_size=640)
    special = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{b:02X}>" for b in range(256))]
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=560, special_tokens=special, show_progress=False)
    inner.train_from_iterator(PROVERBS[:6], trainer)
    state = json.loads(inner.to_str())
    state["added_tokens"] = state["added_tokens"][:4]
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
    ).save_pretrained(folder)  # fmt: skip
    tokenizer = load_tokenizer(str(folder))
    texts = [*PROVERBS[:6], "Many birds ate 12 worms.", "Größe 東"]
    with EngineProcess("llama.cpp", to_gguf(folder, tmp_path / "m.gguf"), ONE_THREAD) as engine:
        assert engine.tokenize(texts) == [tokenizer.encode(t, add_special_tokens=False) for t in texts]


@onnx
@pytest.mark.parametrize(("scheme", "bits"), [("fp32", 32.0), ("int8", None), ("int4", 5.0)])
def test_onnx(
    scheme: str, bits: float | None, click_cli: Cli, model: Path, heldout: Path, workdir: Path
) -> None:
    args = ("--heldout", heldout, "--target", "onnx", "--scheme", scheme, "--threads", "1")
    loose = ("--min-agreement", "0", "--max-kl", "50") if scheme == "int4" else ()
    done = click_cli("edge-export", model, *args, *loose, "-o", "out", "--json")
    assert done.code == 0, done.stderr
    if bits is not None:
        assert done.json()["bits_per_weight"] == pytest.approx(bits, abs=0.2)
    if scheme == "fp32":
        wanted, found = both_logprobs(model, "onnxruntime-genai", Path("out"), workdir)
        assert torch.allclose(wanted, found, atol=1e-4)
        program = [sys.executable, "-I", "out/example.py", "Measure"]
        said = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
        assert said.returncode == 0, said.stderr


@openvino
@llama_cpp
def test_openvino(click_cli: Cli, model: Path, heldout: Path, workdir: Path) -> None:
    args = ("--heldout", heldout, "--target", "openvino", "--scheme", "q8-0", "--threads", "1")
    done = click_cli("edge-export", model, *args, "-o", "out", "--json")
    assert done.code == 0, done.stderr
    matrices = sum(p.numel() for p in load_model(str(model)).model.parameters() if p.ndim == 2)
    assert done.json()["tensor_types"]["U8"]["parameters"] == matrices
    assert done.json()["kl"]["value"] < 0.02


@executorch
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_executorch(click_cli: Cli, model: Path, heldout: Path, workdir: Path) -> None:
    args = ("--heldout", heldout, "--target", "executorch", "--scheme", "int8", "--threads", "1")
    done = click_cli("edge-export", model, *args, "-o", "out", "--json")
    assert done.code == 0, done.stderr
    linear = [p.numel() for n, p in load_model(str(model)).model.named_parameters() if "_proj" in n]
    vocabulary = load_model(str(model)).model.get_input_embeddings().weight.numel()
    assert done.json()["tensor_types"]["INT8"]["parameters"] == sum(linear) + vocabulary  # the head too
    assert done.json()["kl"]["value"] < 0.02
    wanted, found = both_logprobs(model, "executorch", Path("out/model.pte"), workdir)
    assert (wanted.exp() * (wanted - found)).sum(-1).max() < 0.05
    program = [sys.executable, "-I", "out/example.py", "Measure twice"]
    said = subprocess.run(program, capture_output=True, check=True, timeout=300)
    words = said.stdout.decode("utf-8", "replace").split()
    assert words[:2] == greedy_answer(model, "Measure twice").split()[:2]


def test_executorch_that_is_absent_names_the_line_that_installs_it(
    click_cli: Cli, model: Path, heldout: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(runtimes.WHEELS, "executorch", ("no_such_module", "executorch"))
    done = click_cli("edge-export", model, "--heldout", heldout, "--target", "executorch", "-o", "out")
    assert done.code == 69
    assert "pip install 'tuneutils[executorch]'" in done.error
    assert not Path("out").exists()


def test_executorch_int4_needs_whole_groups(
    click_cli: Cli, heldout: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(runtimes.WHEELS, "executorch", ("json", "executorch"))  # refused before it is asked
    folder = build_tiny_model(workdir / "m", hidden_size=64, intermediate_size=40)
    args = ("--heldout", heldout, "--target", "executorch", "--scheme", "int4", "-o", "out")
    done = click_cli("edge-export", folder, *args)
    assert done.code == 65
    assert "intermediate_size 40 is no multiple of 32" in done.error
    assert not Path("out").exists()


@llama_cpp
def test_a_file_that_the_runtime_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ToolError, match=r"llama\.cpp cannot load it"):
        EngineProcess("llama.cpp", tmp_path / "m.gguf", ONE_THREAD)
