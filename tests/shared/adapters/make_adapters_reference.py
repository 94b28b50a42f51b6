"""Make the test data tests/shared/adapters/data/adapters_*.{safetensors,json} with the `adapters` library.

Run in an environment of its own, since the library needs transformers 4.57:

    pip install adapters==1.3.0 torch safetensors
    python tests/shared/adapters/make_adapters_reference.py tests/shared/adapters/data
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import adapters
import torch
from adapters import DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
from adapters.composition import Stack
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

COMMON = {"vocab_size": 40, "attn_implementation": "eager"}
LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, COMMON | LLAMA | {"num_key_value_heads": 2}),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config,
        COMMON | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16},
    ),
    "bert": (BertForMaskedLM, BertConfig, COMMON | LLAMA | {"max_position_embeddings": 16}),
}
STYLES = {
    "houlsby": DoubleSeqBnConfig(reduction_factor=4),
    "pfeiffer": SeqBnConfig(reduction_factor=4),
    "parallel": ParBnConfig(reduction_factor=4),
}


def randomise(model: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
    """Give the named adapter random weights and return copies of them by parameter name."""
    weights = {n: p for n, p in model.named_parameters() if f"adapters.{name}." in n}
    for parameter in weights.values():
        torch.nn.init.normal_(parameter, std=0.3)
    return {n: p.detach().clone() for n, p in weights.items()}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for model_type, (model_class, config_class, model_config) in MODELS.items():
        torch.manual_seed(0)
        model = model_class(config_class(**model_config)).eval()
        for parameter in model.parameters():  # norms and biases too, so that none is trivial
            torch.nn.init.normal_(parameter, mean=0.5 if parameter.ndim == 1 else 0.0, std=0.3)
        tensors = {f"base.{n}": p.detach().clone() for n, p in model.named_parameters()}
        input_ids = torch.randint(0, model_config["vocab_size"], (2, 9))
        tensors["input_ids"] = input_ids
        with torch.no_grad():
            tensors["logits.base"] = model(input_ids).logits
        adapters.init(model)
        for style, adapter_config in STYLES.items():
            if style == "parallel" and model_type != "bert":
                continue  # the library reads the stream before the norm there, the MLP reads it after
            names = [f"{style}_a", f"{style}_b"]
            for name in names:
                model.add_adapter(name, config=adapter_config)
                for key, weight in randomise(model, name).items():
                    tensors[f"adapter.{key}"] = weight
            # A stack of the library's parallel adapters keeps the last one's output only.
            setups = (
                {names[0]: names[0]}
                if style == "parallel"
                else {names[0]: names[0], f"{style}_stack": Stack(*names)}
            )
            for name, active in setups.items():
                model.set_active_adapters(active)
                with torch.no_grad():
                    tensors[f"logits.{name}"] = model(input_ids).logits
        stem = folder / f"adapters_{model_type}"
        save_file({n: t.contiguous() for n, t in tensors.items()}, stem.with_suffix(".safetensors"))
        about = {"adapters": adapters.__version__, "model_config": model_config}
        stem.with_suffix(".json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
