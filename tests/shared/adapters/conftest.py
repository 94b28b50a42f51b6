from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tuneutils.shared.adapters import BottleneckConfig

HIDDEN, LAYERS, VOCAB = 32, 2, 64


@pytest.fixture
def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def adapted(base: LlamaForCausalLM) -> Callable[..., PeftModel]:
    """Make a model whose adapters have non-trivial random weights."""

    def make(style: str, names: tuple[str, ...] = ("default",), **options: Any) -> PeftModel:
        model = None
        for name in names:
            config = BottleneckConfig(
                style=style, **{"reduction_factor": 4, "task_type": "CAUSAL_LM"} | options
            )
            if model is None:
                model = get_peft_model(base, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
        torch.manual_seed(2)
        for key, parameter in model.named_parameters():
            if "bottleneck_" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        return model.eval()

    return make
