"""Make the test data tests/shared/adapters/data/composition_*.{safetensors,json} with the `adapters` library.

AdapterFusion of two Pfeiffer adapters, their stack, and MAD-X in Llama: an invertible language adapter under a
task adapter. (In GPT-2 the library's invertible adapter acts on the sum of token and position embeddings.) Run
as ``make_adapters_reference.py`` is run, whose models it shares.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import adapters
import torch
from adapters import SeqBnConfig, SeqBnInvConfig
from adapters.composition import Fuse, Stack
from make_adapters_reference import MODELS
from safetensors.torch import save_file


def main(folder: Path) -> None:
    for model_type in ("llama", "gpt2"):
        model_class, config_class, model_config = MODELS[model_type]
        torch.manual_seed(1)
        model = model_class(config_class(**model_config)).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=0.5 if parameter.ndim == 1 else 0.0, std=0.3)
        tensors = {f"base.{n}": p.detach().clone() for n, p in model.named_parameters()}
        known = {id(p) for p in model.parameters()}
        tensors["input_ids"] = input_ids = torch.randint(0, model_config["vocab_size"], (2, 9))
        adapters.init(model)
        for name in ("a", "b"):
            model.add_adapter(name, config=SeqBnConfig(reduction_factor=4))
        if model_type == "llama":
            model.add_adapter("lang", config=SeqBnInvConfig(reduction_factor=4))
        model.add_adapter_fusion(Fuse("a", "b"), "dynamic")
        model.eval()  # the new modules, too: the library drops attention scores in training
        for name, parameter in model.named_parameters():
            if id(parameter) in known:
                continue
            # The paper's query and key have no bias, and the library's starts at zero.
            bias = name.endswith(("query.bias", "key.bias"))
            scores = name.endswith(("query.weight", "key.weight"))
            torch.nn.init.normal_(parameter, std=0.0 if bias else 0.1 if scores else 0.3)
            tensors[f"adapter.{name}"] = parameter.detach().clone()
        setups = {"a": "a", "fused": Fuse("a", "b"), "stack": Stack("b", "a")}
        if model_type == "llama":
            setups |= {"lang": "lang", "mad-x": Stack("lang", "a")}
        for setup, active in setups.items():
            model.set_active_adapters(active)
            with torch.no_grad():
                made = model(input_ids, output_adapter_fusion_attentions=setup == "fused")
                tensors[f"logits.{setup}"] = made.logits
                if setup in ("lang", "mad-x"):
                    # What the library's own CausalLMHead does; a model class's head leaves out the inverse.
                    hidden = model.model(input_ids).last_hidden_state
                    inverse = model.model.get_invertible_adapter()(hidden, rev=True)
                    tensors[f"logits.{setup}"] = model.lm_head(inverse)
            if setup == "fused":
                for layer, places in made.adapter_fusion_attentions["a,b"].items():
                    tensors[f"attention.{layer}"] = torch.as_tensor(places["output_adapter"])
        stem = folder / f"composition_{model_type}"
        save_file({n: t.contiguous() for n, t in tensors.items()}, stem.with_suffix(".safetensors"))
        about = {"adapters": adapters.__version__, "model_config": model_config}
        stem.with_suffix(".json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
