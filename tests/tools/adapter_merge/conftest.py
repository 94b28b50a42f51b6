"""Tiny bases and adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import build_tiny_model, tiny_tokenizer


@pytest.fixture
def randomise() -> Callable[..., None]:
    """``randomise(model, seed, std)``: add noise to whatever is trained."""
    return add_noise


def add_noise(model: Any, seed: int, std: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * std


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``llama`` (one shard), ``tied``, ``sharded`` (several shards), ``gpt2`` (Conv1D, tied, several shards)."""
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    root = tmp_path_factory.mktemp("bases")
    made = {
        "llama": build_tiny_model(root / "llama"),
        "tied": build_tiny_model(root / "tied", tie_word_embeddings=True),
    }
    tokenizer = tiny_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(made["llama"])
    model.save_pretrained(root / "sharded", max_shard_size="40KB")
    torch.manual_seed(3)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=128,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    for name, parameter in gpt2.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    gpt2.save_pretrained(root / "gpt2", max_shard_size="40KB")
    for name in ("sharded", "gpt2"):
        tokenizer.save_pretrained(root / name)
        made[name] = root / name
        assert len(list((root / name).glob("*.safetensors"))) > 2
    return made


@pytest.fixture
def adapt(workdir: Path) -> Callable[..., str]:
    """``adapt(base, config, name)``: a random adapter of a base, saved by PEFT."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    def make(base: Path, config: Any, name: str = "adapter", seed: int = 0, std: float = 0.1) -> str:
        torch.manual_seed(seed)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        add_noise(model, seed, std)
        model.save_pretrained(name)
        return name

    return make
