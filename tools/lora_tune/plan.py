"""What a run would train and need, counted on a model without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tuneutils.shared.command import Run
from tuneutils.shared.device import dtype_name, resolve_device, resolve_dtype
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.fitting import check_patience
from tuneutils.shared.methods import apply_method, check_method, learning_rate, quantization
from tuneutils.shared.models import (
    ModelRef,
    check_base,
    load_config,
    load_tokenizer,
    parameter_counts,
    resolve,
)
from tuneutils.shared.tuning import base_to_tune, memory_estimate
from tuneutils.tools.lora_tune.params import Params

#: Methods that pass a cache of keys and values, which recomputed layers would extend a second time.
CACHED = ("prefix", "prefix-tuning", "cartridge")

#: Methods of which one adapter can be trained on top of another.
BOTTLENECKS = ("houlsby", "pfeiffer", "parallel", "mad-x")


def check_options(params: Params) -> ModelRef:
    """Refuse options that do not go together; gives the model to tune.

    Raises:
        ToolError: exit 2, or what ``models.resolve`` raises.
    """
    check_method(params)
    check_patience(params)
    if params.gradient_checkpointing and params.method in CACHED:
        raise ToolError(
            f"--gradient-checkpointing: {params.method} passes a cache, which recomputed layers would extend",
            code=ExitCode.USAGE,
        )
    base = base_to_tune(params.model)
    if params.under is not None:
        _check_under(params, params.under, base)
    return base


def _check_under(params: Params, under: str, base: ModelRef) -> None:
    if params.method not in BOTTLENECKS:
        raise ToolError(f"--under goes with --method {', '.join(BOTTLENECKS)}", code=ExitCode.USAGE)
    if not Path(under).is_dir():
        raise ToolError(f"--under {under}: no such adapter folder", code=ExitCode.MISSING_INPUT)
    ref = resolve(under)
    if ref.kind != "adapter":
        raise ToolError(f"--under {under}: is a model, no adapter (no adapter_config.json)")
    check_base(ref, base, "that of --model")
    if ref.quantization != quantization(params):
        raise ToolError(
            f"--under {under}: made on a base stored as {ref.quantization or 'full precision'}; "
            "give the same --quantization"
        )


def plan(run: Run[Params]) -> dict[str, Any]:
    """Trainable and total parameters, and an estimate of the peak memory in bytes."""
    import torch
    from transformers import AutoModelForCausalLM

    params = run.params
    base = check_options(params)
    dtype = resolve_dtype(run.dtype, resolve_device(run.device))
    if base.kind == "gguf":
        return {"dtype": dtype_name(dtype), "learning_rate": learning_rate(params)}
    config = load_config(base, trust_remote_code=params.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=params.trust_remote_code
        )
        model.requires_grad_(False)
        bare = params.__class__(**{**vars(params), "pissa": False})
        if params.method in ("prefix", "prompt"):
            counts = _prompt_counts(model, params)
        else:
            counts = parameter_counts(apply_method(model, load_tokenizer(base), bare, ".", params.under))
    return {
        "dtype": dtype_name(dtype),
        "learning_rate": learning_rate(params),
        "trainable_parameters": counts["trainable"],
        "total_parameters": counts["total"],
        "memory_estimate_bytes": memory_estimate(
            params, config, counts, dtype.itemsize, params.batch_size * params.max_length
        ),
    }


def _prompt_counts(model: Any, params: Params) -> dict[str, int]:
    """Prefix and prompt start from a text's activations, which a model without weights does not have."""
    config = model.config
    total = parameter_counts(model)["total"]
    if params.method == "prompt":
        added = params.virtual_tokens * config.hidden_size
    else:
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        added = params.virtual_tokens * 2 * config.num_hidden_layers * heads * head_dim
    return {"trainable": added, "total": total + added}
