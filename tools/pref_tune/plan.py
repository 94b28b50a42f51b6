"""What a run would train and need, counted on a model without weights; and options that do not fit."""

from __future__ import annotations

from typing import Any

from tuneutils.shared.command import Run
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.methods import (
    apply_method,
    check_method,
    learning_rate,
    peft_options,
)
from tuneutils.shared.models import (
    ModelRef,
    context_length,
    load_config,
    load_tokenizer,
    parameter_counts,
    resolve,
)
from tuneutils.shared.tuning import memory_estimate
from tuneutils.tools.pref_tune.params import TrainParams

#: Lower than for supervised learning: the loss is on whole sequences, and the model must stay near itself.
LEARNING_RATES = {"full": 1e-6, "lora": 5e-5, "qlora": 5e-5}
#: Methods that pass a cache of keys and values, which recomputed layers would extend a second time.
CACHED = ("prefix", "prefix-tuning", "cartridge")
VIRTUAL = ("prefix", "p-tuning", "prompt")


def check_options(params: TrainParams) -> ModelRef:
    """Refuse options that do not go together; gives the model to align.

    Raises:
        ToolError: exit 2, or what ``models.resolve`` raises.
    """
    check_method(params)
    if params.gradient_checkpointing and params.method in CACHED:
        raise ToolError(
            f"--gradient-checkpointing: {params.method} passes a cache, which recomputed layers would extend",
            code=ExitCode.USAGE,
        )
    if params.method in ("lora", "qlora") and str(peft_options(params).get("init_lora_weights")) == "pissa":
        raise ToolError("--peft-option init_lora_weights=pissa: changes the reference", code=ExitCode.USAGE)
    if params.loss == "kto" and params.batch_size < 2:
        raise ToolError(
            "--loss kto --batch-size 1: z₀ of one answer is its own reward; take 2 or more",
            code=ExitCode.USAGE,
        )
    if params.margin_scale and params.loss in ("kto", "ipo", "orpo"):
        raise ToolError(f"--margin-scale: --loss {params.loss} takes no margins", code=ExitCode.USAGE)
    base = resolve(params.model)
    if base.kind == "adapter":
        raise ToolError(
            f"{params.model}: is an adapter; merge it into its base first (adapter-merge)",
            code=ExitCode.USAGE,
        )
    if params.reward_model is not None:
        resolve(params.reward_model)
        if not params.answers:
            raise ToolError("--reward-model: has no answers to judge; --answers is 0", code=ExitCode.USAGE)
    return base


def rate(params: TrainParams) -> float:
    """The peak learning rate given, or the method's own for alignment."""
    if params.learning_rate is None and params.method in LEARNING_RATES:
        return LEARNING_RATES[params.method]
    return learning_rate(params)


def text_limit(params: TrainParams, base: ModelRef) -> int:
    """Tokens that a text may have: the model's positions less those that virtual tokens take."""
    context = context_length(base, trust_remote_code=params.trust_remote_code)
    taken = params.virtual_tokens if params.method in VIRTUAL else 0
    return min(params.max_length, (context or params.max_length + taken) - taken)


def plan(run: Run[TrainParams]) -> dict[str, Any]:
    """Trainable and total parameters, and an estimate of the peak memory in bytes."""
    from tuneutils.shared.device import dtype_name, resolve_device, resolve_dtype

    import torch  # isort: skip
    from transformers import AutoModelForCausalLM

    params = run.params
    base = check_options(params)
    dtype = resolve_dtype(run.dtype, resolve_device(run.device))
    shown = {"dtype": dtype_name(dtype), "learning_rate": rate(params), "loss": params.loss}
    if base.kind == "gguf" or params.method in ("prefix", "prompt"):
        return shown  # these start from weights that a plan does not load
    config = load_config(base, trust_remote_code=params.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=params.trust_remote_code
        )
        counts = parameter_counts(
            apply_method(model.requires_grad_(False), load_tokenizer(base), params, ".")
        )
    return {
        **shown,
        "trainable_parameters": counts["trainable"],
        "total_parameters": counts["total"],
        "memory_estimate_bytes": memory_estimate(
            params, config, counts, dtype.itemsize, 2 * params.batch_size * params.max_length
        ),
    }
