"""A merged adapter as a folder that PEFT loads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from tuneutils.tools.adapter_merge.adapter import Adapter, Factors
from tuneutils.tools.adapter_merge.base import Base, copy_tokenizer
from tuneutils.tools.adapter_merge.tensorfile import Spec, write_tensors


def save_adapter(
    factors: Mapping[str, Factors], adapters: Sequence[Adapter], base: Base, to: Path, dtype: torch.dtype
) -> None:
    """Write factors as plain LoRA whose scaling is 1; modules may differ in rank."""
    tensors: dict[str, torch.Tensor] = {}
    for module, update in sorted(factors.items()):
        stem = f"base_model.model.{module}"
        names = (
            ("lora_embedding_A", "lora_embedding_B")
            if update.embedding
            else ("lora_A.weight", "lora_B.weight")
        )
        tensors[f"{stem}.{names[0]}"], tensors[f"{stem}.{names[1]}"] = update.a, update.b

    def slices(name: str) -> Iterator[torch.Tensor]:
        yield tensors[name]

    specs = {name: Spec(dtype, tuple(t.shape)) for name, t in tensors.items()}
    write_tensors(to / "adapter_model.safetensors", specs, slices)
    config = _config(factors, adapters, base)
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (to / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    for adapter in adapters:
        if (adapter.path / "tokenizer_config.json").is_file():
            copy_tokenizer(adapter.path, to)
            break


def _config(factors: Mapping[str, Factors], adapters: Sequence[Adapter], base: Base) -> dict[str, object]:
    ranks = {module: update.a.shape[0] for module, update in factors.items()}
    largest = max(ranks.values())
    different = {module: rank for module, rank in sorted(ranks.items()) if rank != largest}
    given = adapters[0].config
    return {
        "peft_type": "LORA",
        "task_type": given.get("task_type"),
        "base_model_name_or_path": given.get("base_model_name_or_path") or base.ref.given,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": different,
        "alpha_pattern": different,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "fan_in_fan_out": any(module in base.structure.conv1d for module in factors),
        "target_modules": sorted(factors),
    }
