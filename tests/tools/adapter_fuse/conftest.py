"""Adapters with random weights of the tiny model, and ``fuse``: adapter-fuse in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import Result, invoke, load_tool, tiny_records, write_jsonl

STYLES = ("pfeiffer", "lora", "mad-x")


def make_adapter(model: Path, folder: Path, style: str, seed: int, std: float = 0.3) -> Path:
    """Save an adapter whose every weight is random, as its own tuner saves it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tuneutils.shared.adapters import BottleneckConfig

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if style == "lora":
        config: Any = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    else:
        invertible = style == "mad-x"
        name = "pfeiffer" if invertible else style
        config = BottleneckConfig(style=name, bottleneck_size=4, invertible=invertible, task_type="CAUSAL_LM")
    torch.manual_seed(seed)
    made = get_peft_model(base, config)
    for parameter in made.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=std)
    made.peft_config["default"].base_model_name_or_path = str(model)
    made.save_pretrained(folder, save_embedding_layers=False)
    return folder


def run_tool(tool: str, *args: Any) -> Result:
    return invoke(load_tool(tool), *(str(a) for a in args))


@pytest.fixture(scope="package")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    """Two adapters of each kind, and records of two formats."""
    root = tmp_path_factory.mktemp("fuse")
    paths = {}
    for style in STYLES:
        for seed, letter in enumerate("ab"):
            name = f"{style}-{letter}"
            paths[name] = make_adapter(tiny_model, root / name, style, seed)
    for name in ("text", "prompt-completion"):
        paths[name] = write_jsonl(root / f"{name}.jsonl", tiny_records(name, 6))
    return paths


@pytest.fixture
def fuse(workdir: Path, tiny_model: Path) -> Callable[..., Result]:
    """``fuse("train", …)`` in float32 on the tiny model, for a few steps."""

    def call(verb: str, *args: Any, output: str = "out") -> Result:
        options: list[Any] = ["-o", output]
        if verb == "train":
            options += ["--dtype", "float32", "--device", "cpu"]
            options += [] if "-m" in args else ["-m", tiny_model]
            options += [] if "--max-steps" in args else ["--max-steps", 2]
        return run_tool("adapter-fuse", verb, *args, *options)

    return call
