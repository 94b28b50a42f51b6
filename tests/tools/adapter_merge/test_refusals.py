"""What must not be merged, and what must not be left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
)
from safetensors.torch import load_file, save_file
from support import environment, tool_args
from transformers import AutoModelForCausalLM, AutoTokenizer

from tuneutils.shared.errors import GateFailed
from tuneutils.tools.adapter_merge import compare

LINEAR = ["q_proj", "v_proj", "down_proj"]


def nothing_left(name: str = "out") -> bool:
    return not any(p.name == name or p.name.startswith(f".{name}.") for p in Path.cwd().iterdir())


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3), "PREFIX_TUNING"),
        (PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3), "PROMPT_TUNING"),
    ],
)
def test_methods_that_are_no_weights(config, kind, bases, adapt, click_cli) -> None:
    adapter = adapt(bases["llama"], config)
    done = click_cli("adapter-merge", adapter, "-o", "out")
    assert done.code == 65
    assert kind in done.error
    assert "keep it as an adapter" in done.error
    assert nothing_left()


def test_bottleneck_adapter(bases, adapt, click_cli) -> None:
    from tuneutils.shared.adapters.bottleneck import BottleneckConfig

    adapter = adapt(bases["llama"], BottleneckConfig(task_type="CAUSAL_LM"))
    done = click_cli("adapter-merge", adapter, "-o", "out")
    assert done.code == 65
    assert "not linear" in done.error


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (LoraConfig(target_modules=LINEAR, use_dora=True), "DoRA"),
        (LoraConfig(target_modules=LINEAR, modules_to_save=["lm_head"]), "lm_head"),
        (LoraConfig(target_modules=LINEAR, trainable_token_indices=[3]), "token rows"),
    ],
)
def test_what_does_not_add_up(config, word, bases, adapt, click_cli) -> None:
    plain = adapt(bases["llama"], LoraConfig(target_modules=LINEAR), "plain")
    other = adapt(bases["llama"], config, "other")
    done = click_cli("adapter-merge", plain, other, "-o", "out")
    assert done.code == 65
    assert word in done.error
    assert "adapter-merge other -o OUT" in done.error
    assert nothing_left()


def test_adapters_of_different_bases(bases, adapt, click_cli) -> None:
    one = adapt(bases["llama"], LoraConfig(target_modules=LINEAR), "one")
    two = adapt(bases["sharded"], LoraConfig(target_modules=LINEAR), "two")
    done = click_cli("adapter-merge", one, two, "-o", "out")
    assert done.code == 65
    assert "only adapters of one base" in done.error


def test_another_base_of_other_shapes(bases, adapt, click_cli, other_tiny_model) -> None:
    adapter = adapt(bases["llama"], LoraConfig(target_modules=LINEAR))
    done = click_cli("adapter-merge", adapter, "-m", str(other_tiny_model), "-o", "out")
    assert done.code == 65
    assert "does not fit its base" in done.error
    done = click_cli("adapter-merge", adapter, "-m", str(bases["gpt2"]), "-o", "out")
    assert done.code == 65
    assert "no parameter" in done.error
    assert nothing_left()


def test_another_base_of_the_same_shapes_by_hash(bases, adapt, click_cli) -> None:
    from tuneutils.shared.artifact import describe_input

    adapter = adapt(bases["llama"], LoraConfig(target_modules=LINEAR))
    recorded = describe_input("model", bases["llama"]).as_json()
    manifest = {"schema": 1, "kind": "adapter", "inputs": [recorded], "files": {}}
    Path(adapter, "artifact.json").write_text(json.dumps(manifest))
    assert click_cli("adapter-merge", adapter, "-o", "fits").code == 0
    assert click_cli("adapter-merge", adapter, "-m", str(bases["llama"]), "-o", "fits2").code == 0
    done = click_cli("adapter-merge", adapter, "-m", str(bases["sharded"]), "-o", "out")
    assert done.code == 65
    assert "is another" in done.error


def test_base_stored_in_four_bits(bases, adapt, click_cli) -> None:
    adapter = adapt(bases["llama"], LoraConfig(target_modules=LINEAR))
    shutil.copytree(bases["llama"], "small")
    config = json.loads(Path("small/config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    Path("small/config.json").write_text(json.dumps(config))
    done = click_cli("adapter-merge", adapter, "-m", "small", "-o", "out")
    assert done.code == 65
    assert "bitsandbytes" in done.error
    assert "--model" in done.error


def test_adapter_that_is_not_finite(bases, adapt, click_cli) -> None:
    adapter = adapt(bases["llama"], LoraConfig(target_modules=LINEAR))
    path = f"{adapter}/adapter_model.safetensors"
    tensors = load_file(path)
    tensors[next(iter(tensors))][0, 0] = float("nan")
    save_file(tensors, path)
    done = click_cli("adapter-merge", adapter, "-o", "out")
    assert done.code == 65
    assert "not finite" in done.error
    assert nothing_left()


def test_cut_off_adapter(bases, adapt, click_cli) -> None:
    adapter = adapt(bases["llama"], LoraConfig(target_modules=LINEAR))
    path = Path(adapter, "adapter_model.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    done = click_cli("adapter-merge", adapter, "-o", "out")
    assert done.code == 65
    assert "cut off" in done.error


def test_rounding_that_outweighs_the_adapter(bases, adapt, click_cli) -> None:
    """A weak adapter vanishes in bfloat16's last place; the gate says so, and float32 keeps it."""
    adapter = adapt(bases["llama"], LoraConfig(target_modules=LINEAR, r=2), std=0.0003)
    done = click_cli("adapter-merge", adapter, "-o", "out", "--dtype-stored", "bfloat16")
    assert done.code == 1
    assert "lost the adapter" in done.error
    assert nothing_left()
    assert click_cli("adapter-merge", adapter, "-o", "out").code == 0


@pytest.mark.parametrize("wrong", ["twice", "half", "never"])
def test_gate_refuses_a_wrong_merge(wrong, bases, adapt) -> None:
    adapter = adapt(bases["llama"], LoraConfig(target_modules=LINEAR), std=0.02)
    ids = [torch.arange(4, 36)[None]]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["llama"]), adapter).eval()
    before = compare.logits_of(model, ids)
    with model.disable_adapter():
        plain = compare.logits_of(model, ids)
    for layer in model.modules():
        if hasattr(layer, "get_delta_weight"):
            delta = layer.get_delta_weight("default")
            layer.get_base_layer().weight.data += delta * {"twice": 2, "half": 0.5, "never": 0}[wrong]
    with model.disable_adapter():
        after = compare.logits_of(model, ids)
    found = compare.compare(before, after)
    found["effect_kl"] = compare.compare(before, plain)["mean_kl"]
    with pytest.raises(GateFailed):
        compare.gate(found, 0.01, 0.1)


def test_compare_by_hand() -> None:
    """KL((½,½) ‖ (¼,¾)) = ½ ln(4/3); one of two rows agrees on the best token."""
    before = [torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()]
    after = [torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()]
    found = compare.compare(before, after)
    assert found["mean_kl"] == pytest.approx(0.5 * 0.2876820724517809 / 2, abs=1e-7)
    assert found["top1_agreement"] == 0.5
    assert found["max_abs_logit_difference"] == pytest.approx(0.693147, abs=1e-5)
    with pytest.raises(GateFailed):
        compare.gate({**found, "mean_kl": float("nan"), "effect_kl": 1.0}, 0.01, 0.1)


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("--weight", "1", "--weight", "2"), "2 --weight for 1"),
        (("--density", "0.5", "--into", "adapter"), "--density"),
        (("--rank", "3"), "--rank"),
        (("--into", "adapter", "--method", "cat", "--rank", "3"), "--rank"),
        (("--method", "mean"), "mean"),
    ],
)
def test_usage(args, word, bases, adapt, click_cli) -> None:
    adapter = adapt(bases["llama"], LoraConfig(target_modules=LINEAR))
    done = click_cli("adapter-merge", adapter, "-o", "out", *args)
    assert done.code == 2
    assert word in done.error


def test_missing_and_not_an_adapter(bases, workdir, click_cli) -> None:
    assert click_cli("adapter-merge", "nowhere/x/y", "-o", "out").code == 66
    done = click_cli("adapter-merge", str(bases["llama"]), "-o", "out")
    assert done.code == 65
    assert "no adapter here" in done.error


def test_check_records(bases, adapt, click_cli) -> None:
    from support import tiny_records, write_jsonl

    adapter = adapt(bases["llama"], LoraConfig(target_modules=LINEAR))
    records = write_jsonl(Path("records.jsonl"), tiny_records("messages", 5))
    done = click_cli("adapter-merge", adapter, "-o", "out", "--check-records", str(records))
    assert done.code == 0, done.stderr
    manifest = json.loads(Path("out/artifact.json").read_text())
    assert manifest["metrics"]["logits"]["n_texts"] == 5
    assert manifest["inputs"][-1]["role"] == "check-records"


def test_without_check(bases, adapt, click_cli) -> None:
    adapter = adapt(bases["llama"], LoraConfig(target_modules=LINEAR))
    assert click_cli("adapter-merge", adapter, "-o", "out", "--no-check").code == 0
    assert "logits" not in json.loads(Path("out/artifact.json").read_text())["metrics"]


def test_qlora_goes_into_the_full_precision_base(adapt, click_cli) -> None:
    pytest.importorskip("bitsandbytes")
    from support import build_tiny_model

    base = build_tiny_model(Path("base"), hidden_size=128, intermediate_size=256)
    adapter = adapt(base, LoraConfig(target_modules=LINEAR))
    manifest = {"schema": 1, "kind": "adapter", "inputs": [], "files": {}, "quantization": "nf4"}
    Path(adapter, "artifact.json").write_text(json.dumps(manifest))
    done = click_cli("adapter-merge", adapter, "-o", "out")
    assert done.code == 0, done.stderr
    found = json.loads(Path("out/artifact.json").read_text())["metrics"]["logits"]
    assert found["mean_kl"] < 1e-8 < found["against_4bit"]["mean_kl"]
    assert found["against_4bit"]["scheme"] == "nf4"
    assert {t.dtype for t in load_file("out/model.safetensors").values()} == {torch.float32}


def test_killed_while_writing(bases, adapt, workdir) -> None:
    """A big base, killed as soon as its first output shard grows; nothing has the final name."""
    from support import build_tiny_model

    base = build_tiny_model(workdir / "base", hidden_size=512, intermediate_size=4096, num_hidden_layers=6)
    adapter = adapt(base, LoraConfig(target_modules=LINEAR))
    command = [sys.executable, *tool_args("adapter-merge"), adapter, "-o", "out", "--no-check"]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(p.stat().st_size for p in workdir.glob(".out.*.tmp/*.safetensors")):
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.002)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not Path("out").exists()
    done = subprocess.run(command, env=environment(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert not list(workdir.glob(".out.*"))
    assert AutoTokenizer.from_pretrained("out")
