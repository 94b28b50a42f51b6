"""Merging by PEFT's own code, with the whole model in memory: for methods without a streaming rule."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tuneutils.shared import models
from tuneutils.shared.errors import ToolError
from tuneutils.tools.adapter_merge.base import Base, copy_companions, copy_tokenizer

SHARD_SIZE = "5GB"


def merge_in_memory(base: Base, adapter: Path, to: Path, dtype: torch.dtype | None) -> dict[str, int]:
    """Load in float32, ``merge_and_unload``, round once, save.

    Raises:
        ToolError: the method has no merge, or this adapter's settings have none.
    """
    cpu = torch.device("cpu")
    wrapped = models.load_adapter(models.load_base(base.ref, cpu, torch.float32), str(adapter))
    if not hasattr(wrapped.base_model, "merge_and_unload"):
        raise _not_mergeable(adapter, "its method has no merge")
    try:
        merged = wrapped.merge_and_unload(safe_merge=True)
    except (NotImplementedError, AttributeError, TypeError, ValueError, RuntimeError) as exc:
        raise _not_mergeable(adapter, " ".join(str(exc).split())[:200]) from exc
    merged = merged.to(dtype or base.stored_dtype())
    copy_companions(base.folder, adapter, to)
    merged.save_pretrained(to, max_shard_size=SHARD_SIZE)
    if (adapter / "tokenizer_config.json").is_file():
        copy_tokenizer(adapter, to)
    parameters = list(merged.parameters())
    return {"tensors": len(parameters), "bytes": sum(p.numel() * p.element_size() for p in parameters)}


def _not_mergeable(adapter: Path, reason: str) -> ToolError:
    kind = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"]
    return ToolError(f"{adapter}: {kind} cannot be merged ({reason}); keep it as an adapter beside its base")
