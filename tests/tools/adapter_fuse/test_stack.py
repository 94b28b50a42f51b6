"""Stacks: trained under a task, put together from folders, and their language swapped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support import Result
from transformers import AutoModelForCausalLM

from tuneutils.shared.models import load_model

from .conftest import run_tool

Fuse = Callable[..., Result]
Made = dict[str, Path]
IDS = torch.tensor([[5, 9, 40, 7, 100, 30]])


def logits(folder: str) -> torch.Tensor:
    with torch.inference_mode():
        return load_model(folder, device="cpu", dtype="float32").model(IDS).logits


def natively_stacked(base: Path, first: Path, second: Path) -> torch.Tensor:
    """Logits of the two adapters loaded side by side by PEFT, and made active in this order."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(model, first, adapter_name="first")
    peft.load_adapter(second, adapter_name="second")
    peft.base_model.set_adapter(["first", "second"])
    with torch.inference_mode():
        return peft.eval()(IDS).logits


def test_a_stack_is_what_peft_makes_of_both_adapters_in_that_order(
    fuse: Fuse, made: Made, tiny_model: Path
) -> None:
    assert fuse("stack", made["mad-x-a"], made["pfeiffer-b"]).code == 0
    expected = natively_stacked(tiny_model, made["mad-x-a"], made["pfeiffer-b"])
    torch.testing.assert_close(logits("out"), expected)
    assert fuse("stack", made["pfeiffer-b"], made["mad-x-a"], output="reversed").code == 0
    assert not torch.allclose(logits("reversed"), expected, atol=1e-3)


def test_a_task_is_trained_on_a_frozen_language_which_is_then_swapped(
    fuse: Fuse, made: Made, tiny_model: Path, workdir: Path
) -> None:
    from tuneutils.shared.adapters import BottleneckConfig

    options = ("-m", tiny_model, "--dtype", "float32", "--device", "cpu", "--method", "pfeiffer")
    steps = ("--max-steps", 3, "--learning-rate", "0.05", "--reduction-factor", 8)
    done = run_tool(
        *("lora-tune", made["prompt-completion"], *options, *steps),
        *("--under", made["mad-x-a"], "-o", "task"),
    )
    assert done.code == 0, done.stderr
    stored = load_file("task/adapter_model.safetensors")
    language = load_file(made["mad-x-a"] / "adapter_model.safetensors")
    for key, tensor in language.items():
        assert torch.equal(stored[key.replace(".bottleneck_", ".fusion_experts.0.bottleneck_")], tensor), key
    task = {k.replace(".fusion_top", ""): t for k, t in stored.items() if ".fusion_top." in k}
    assert len(language) + len(task) == len(stored)
    manifest = json.loads(Path("task/artifact.json").read_text())
    assert manifest["metrics"]["trainable_parameters"] == sum(t.numel() for t in task.values())
    assert any(t.abs().max() > 0 for k, t in task.items() if "bottleneck_up.weight" in k)
    assert {i["role"] for i in manifest["inputs"]} == {"model", "records", "under"}

    # The top by itself, as a plain bottleneck adapter, for PEFT to put on the other language.
    from safetensors.torch import save_file

    config = BottleneckConfig(style="pfeiffer", reduction_factor=8, task_type="CAUSAL_LM")
    config.target_modules = r"model\.layers\.\d+"
    config.save_pretrained("alone")
    save_file(task, "alone/adapter_model.safetensors")
    assert fuse("stack", made["mad-x-b"], "task", output="swapped").code == 0
    torch.testing.assert_close(
        logits("swapped"), natively_stacked(tiny_model, made["mad-x-b"], workdir / "alone")
    )


def test_stacks_of_two_languages_stand_side_by_side_as_chat_switches_them(
    fuse: Fuse, made: Made, tiny_model: Path
) -> None:
    expected = {}
    for language in ("mad-x-a", "mad-x-b"):
        assert fuse("stack", made[language], made["pfeiffer-b"], output=language).code == 0
        expected[language] = logits(language)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, "mad-x-a", adapter_name="adapter-mad-x-a").eval()
    model.load_adapter("mad-x-b", adapter_name="adapter-mad-x-b")
    with torch.inference_mode():
        for language in ("mad-x-b", "mad-x-a"):
            model.set_adapter(f"adapter-{language}")
            torch.testing.assert_close(model(IDS).logits, expected[language])
        with model.disable_adapter():
            bare = model(IDS).logits
        torch.testing.assert_close(bare, AutoModelForCausalLM.from_pretrained(tiny_model)(IDS).logits)


def test_a_task_starts_as_its_language_alone(made: Made, tiny_model: Path, workdir: Path) -> None:
    from tuneutils.shared.adapters import BottleneckConfig
    from tuneutils.shared.adapters.fusion.compose import read_part, stack_on

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    config = BottleneckConfig(style="pfeiffer", task_type="CAUSAL_LM")
    model = stack_on(base, read_part(made["mad-x-a"], "language"), config, "task").eval()
    alone = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model), made["mad-x-a"]
    ).eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS).logits, alone(IDS).logits)


@pytest.mark.parametrize(
    ("method", "under", "code", "message"),
    [
        ("lora", "pfeiffer-a", 2, "--under goes with --method"),
        ("pfeiffer", "lora-a", 2, "only bottlenecks or only LoRAs"),
        ("houlsby", "pfeiffer-a", 2, "styles houlsby and pfeiffer"),
        ("pfeiffer", "nowhere", 66, "--under nowhere: no such adapter folder"),
    ],
)
def test_what_no_task_can_stand_on_is_named(
    method: str, under: str, code: int, message: str, made: Made, tiny_model: Path, workdir: Path
) -> None:
    place = made.get(under, Path(under))
    args = (made["text"], "-m", tiny_model, "--method", method, "--under", place, "-o", "out")
    done = run_tool("lora-tune", *args, "--dtype", "float32", "--max-steps", 1)
    assert done.code == code, done.stderr
    assert message in done.stderr
    assert not Path("out").exists()


def test_adapters_of_different_layers_are_not_stacked(fuse: Fuse, made: Made, tiny_model: Path) -> None:
    from peft import get_peft_model

    from tuneutils.shared.adapters import BottleneckConfig

    config = BottleneckConfig(style="pfeiffer", layers_to_transform=[1], task_type="CAUSAL_LM")
    partial = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    partial.peft_config["default"].base_model_name_or_path = str(tiny_model)
    partial.save_pretrained("partial")
    done = fuse("stack", made["mad-x-a"], "partial")
    assert done.code == 2
    assert "adapt different modules, such as model.layers.0" in done.stderr


def test_loras_are_not_stacked(fuse: Fuse, made: Made) -> None:
    done = fuse("stack", made["lora-a"], made["lora-b"])
    assert done.code == 2
    assert "LoRAs only add up" in done.stderr
