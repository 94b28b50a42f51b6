"""What a run would train and need, and which options do not go together."""

from __future__ import annotations

from typing import Any

from tuneutils.shared.command import Run
from tuneutils.shared.device import dtype_name, resolve_device, resolve_dtype
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.models import ModelRef, load_config, resolve
from tuneutils.shared.processes import world_size
from tuneutils.tools.qat_tune.params import Params


def check_options(params: Params) -> tuple[ModelRef, ModelRef | None]:
    """Refuse options that do not go together; gives the model, and the teacher where one is given.

    Raises:
        ToolError: exit 2, or what ``models.resolve`` raises.
    """
    if params.activations == "int8" and not params.symmetric:
        raise ToolError(
            "--activations int8: the format that rounds inputs has no zero points; add --symmetric",
            code=ExitCode.USAGE,
        )
    if params.loss == "ce" and (params.teacher or params.ce_weight):
        raise ToolError(
            "--loss ce learns from labels alone; leave --teacher and --ce-weight out", code=ExitCode.USAGE
        )
    if params.temperature == 0:
        raise ToolError("--temperature 0: must be above 0", code=ExitCode.USAGE)
    if params.scale_learning_rate is not None and not params.learn_scales:
        raise ToolError("--scale-learning-rate goes with --learn-scales", code=ExitCode.USAGE)
    if world_size() > 1:
        raise ToolError("qat-tune runs in one process; start it without a launcher", code=ExitCode.USAGE)
    return resolve(params.model), resolve(params.teacher) if params.teacher else None


def plan(run: Run[Params]) -> dict[str, Any]:
    """Trainable and total parameters, and an estimate of the peak memory in bytes."""
    import torch
    from transformers import AutoModelForCausalLM

    from tuneutils.shared.layerwise import decoder_of
    from tuneutils.shared.models import parameter_counts
    from tuneutils.shared.weights import Weights
    from tuneutils.tools.qat_tune.convert import lay_out, put_on_grid

    params = run.params
    ref, _ = check_options(params)
    dtype = resolve_dtype(run.dtype, resolve_device(run.device))
    weights = Weights(ref, trust_remote_code=params.trust_remote_code)
    config = load_config(ref, trust_remote_code=params.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=params.trust_remote_code)
        weights.check_names(model)
        total = parameter_counts(model)["total"]
        layout = lay_out(decoder_of(model, ref.given), weights, params)
        put_on_grid(model, layout, params)
    trainable = parameter_counts(model)["trainable"]
    return {
        "dtype": dtype_name(dtype),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "bits_per_weight_on_the_grid": round(layout.grid.bits_per_weight(config.hidden_size), 4),
        "memory_estimate_bytes": memory_estimate(
            params, config.get_text_config(), total, trainable, dtype.itemsize
        ),
    }


def memory_estimate(params: Params, config: Any, total: int, trainable: int, itemsize: int) -> int:
    """Float32 weights, the rounded ones, gradients, Adam's moments, the teacher, and activations, in bytes.

    Activations per token and layer: about 34 hidden-size values with the feed-forward block at four times
    the width (Korthikanti et al. 2022, arXiv 2205.05198, section 4.1, in values of two bytes).
    """
    teacher = 0 if params.loss == "ce" else total * itemsize
    tokens = params.batch_size * params.max_length
    activations = tokens * config.num_hidden_layers * 17 * config.hidden_size * itemsize
    return int(4 * total + 2 * total + 12 * trainable + teacher + activations)
