"""What a run would train and need, counted on a model without weights; and options that do not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tuneutils.shared.command import Run
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.methods import apply_method, check_method, learning_rate
from tuneutils.shared.models import ModelRef, context_length, load_config, parameter_counts, resolve
from tuneutils.tools.rm_train.params import TrainParams

#: Methods that leave no weights to merge, as whoever loads the artifact does.
UNMERGEABLE = ("houlsby", "pfeiffer", "parallel", "bottleneck", "llama-adapter", "adaption-prompt")
VIRTUAL = ("prefix", "prefix-tuning", "prompt", "prompt-tuning", "p-tuning", "cartridge", "cpt")


def check_options(params: TrainParams) -> ModelRef:
    """Refuse options that do not go together; gives the model to start from.

    Raises:
        ToolError: exit 2, or what ``models.resolve`` raises.
    """
    check_method(params)
    if params.method in (*UNMERGEABLE, *VIRTUAL):
        raise ToolError(
            f"--method {params.method}: cannot be merged into a reward model; use lora, ia3 or full",
            code=ExitCode.USAGE,
        )
    if params.method == "qlora":
        raise ToolError(
            "--method qlora: reward models are loaded in full precision; use lora", code=ExitCode.USAGE
        )
    if params.merge and params.method == "full":
        raise ToolError("--merge: --method full has nothing to merge", code=ExitCode.USAGE)
    base = resolve(params.model)
    if base.kind == "adapter":
        raise ToolError(
            f"{params.model}: is an adapter; merge it into its base first (adapter-merge)",
            code=ExitCode.USAGE,
        )
    if base.kind == "gguf":
        raise ToolError(f"{params.model}: a GGUF file; import it first (model-import)", code=ExitCode.USAGE)
    return base


def text_limit(params: TrainParams, base: ModelRef) -> int:
    """Tokens that a text may have."""
    context = context_length(base, trust_remote_code=params.trust_remote_code)
    return min(params.max_length, context or params.max_length)


def with_head(params: TrainParams) -> TrainParams:
    """The parameters for ``shared.methods``: PEFT then trains and saves a classifier's head too."""
    if params.method == "full":
        return params
    return replace(params, peft_option=("task_type=SEQ_CLS", *params.peft_option))


def plan(run: Run[TrainParams]) -> dict[str, Any]:
    """Trainable and total parameters, and an estimate of the peak memory in bytes."""
    from tuneutils.shared.device import dtype_name, resolve_device, resolve_dtype

    import torch  # isort: skip
    from transformers import AutoModelForSequenceClassification

    params = run.params
    base = check_options(params)
    dtype = resolve_dtype(run.dtype, resolve_device(run.device))
    config = load_config(base, trust_remote_code=params.trust_remote_code)
    config.num_labels = 1
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, dtype=dtype).requires_grad_(False)
        counts = parameter_counts(apply_method(model, None, with_head(params), "."))  # type: ignore[arg-type]
    return {
        "dtype": dtype_name(dtype),
        "learning_rate": learning_rate(params),
        "trainable_parameters": counts["trainable"],
        "total_parameters": counts["total"],
        "memory_estimate_bytes": memory_estimate(params, config, counts, dtype.itemsize),
    }


def memory_estimate(params: TrainParams, config: Any, counts: dict[str, int], itemsize: int) -> int:
    """Weights, gradients, Adam's two moments, and the activations of both sides of a batch, in bytes.

    Activations per token and layer: about 17 values of the hidden size, one with gradient checkpointing
    (Korthikanti et al. 2022, equation 1, without the attention scores).
    """
    trainable = counts["trainable"]
    stored = 4 if params.method == "full" else itemsize
    weights = (counts["total"] - trainable) * stored + trainable * 4
    tokens = 2 * params.batch_size * params.max_length
    per_layer = config.hidden_size * (1 if params.gradient_checkpointing else 17) * itemsize
    return int(weights + 12 * trainable + tokens * per_layer * config.num_hidden_layers)
