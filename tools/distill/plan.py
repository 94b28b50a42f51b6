"""What a run would train and need, and which options do not go together."""

from __future__ import annotations

from typing import Any

from tuneutils.shared.command import Run
from tuneutils.shared.device import dtype_name, resolve_device, resolve_dtype
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.models import ModelRef, load_config, parameter_counts, resolve
from tuneutils.shared.narrowing import (
    Shape,
    check_sizes,
    parse_layers,
    student_config,
    uniform_layers,
)
from tuneutils.shared.processes import world_size
from tuneutils.tools.distill.params import Params


def check_options(params: Params) -> tuple[ModelRef, ModelRef | None]:
    """Refuse options that do not go together; gives the teacher, and the student where one is given.

    Raises:
        ToolError: exit 2, or what ``models.resolve`` raises.
    """
    cuts = {
        "--student-layers": params.student_layers,
        "--keep-layers": params.keep_layers,
        "--student-hidden-size": params.student_hidden_size,
        "--student-intermediate-size": params.student_intermediate_size,
        "--student-kv-heads": params.student_kv_heads,
    }
    given = [name for name, value in cuts.items() if value is not None]
    if params.student and given:
        raise ToolError(f"--student is there already; {given[0]} would cut it", code=ExitCode.USAGE)
    if not params.student and not given:
        raise ToolError(
            "which student? --student MODEL, or --student-layers N to cut one from the teacher",
            code=ExitCode.USAGE,
        )
    if params.student_layers is not None and params.keep_layers is not None:
        raise ToolError("--keep-layers names the layers; leave --student-layers out", code=ExitCode.USAGE)
    if params.temperature == 0:
        raise ToolError("--temperature 0: must be above 0", code=ExitCode.USAGE)
    if world_size() > 1:
        raise ToolError("distill runs in one process; start it without a launcher", code=ExitCode.USAGE)
    _check_loss(params)
    teacher = resolve(params.model)
    return teacher, resolve(params.student) if params.student else None


def _check_loss(params: Params) -> None:
    matches = params.hidden_weight > 0 or params.attention_weight > 0
    if params.loss == "ce" and (matches or params.top_k):
        raise ToolError(
            "--loss ce learns from labels alone; leave --top-k, --hidden-weight and --attention-weight at 0",
            code=ExitCode.USAGE,
        )
    if params.loss == "uld" and matches:
        raise ToolError(
            "--loss uld: tokens of two tokenizers cannot be matched layer by layer; leave the weights at 0",
            code=ExitCode.USAGE,
        )
    if params.top_k and matches:
        raise ToolError(
            "--top-k caches distributions, not hidden states or attention; leave it at 0 to match those",
            code=ExitCode.USAGE,
        )
    if params.data == "student" and (params.top_k or params.loss in ("ce", "uld")):
        raise ToolError(
            "--data student asks the teacher about new answers: no --top-k, and a loss on its distributions",
            code=ExitCode.USAGE,
        )


def shape_of(params: Params, config: Any) -> Shape:
    """The student's shape; which layers stay by block influence is not known yet, and left uniform.

    Raises:
        ToolError: exit 2, a size that the teacher does not have.
    """
    count = config.get_text_config().num_hidden_layers
    layers = None
    if params.keep_layers is not None:
        layers = parse_layers(params.keep_layers, count)
    elif params.student_layers is not None:
        if params.student_layers > count:
            raise ToolError(
                f"--student-layers {params.student_layers}: the teacher has {count}", code=ExitCode.USAGE
            )
        layers = uniform_layers(count, params.student_layers)
    shape = Shape(
        layers, params.student_hidden_size, params.student_intermediate_size, params.student_kv_heads
    )
    check_sizes(config, shape)
    return shape


def plan(run: Run[Params]) -> dict[str, Any]:
    """Parameters of both, and an estimate of the peak memory in bytes."""
    import torch
    from transformers import AutoModelForCausalLM

    params = run.params
    teacher, student = check_options(params)
    dtype = resolve_dtype(run.dtype, resolve_device(run.device))
    config = load_config(teacher, trust_remote_code=params.trust_remote_code)
    made = load_config(student) if student else student_config(config, shape_of(params, config))
    counts = []
    for which in (config, made):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(which, trust_remote_code=params.trust_remote_code)
        counts.append(parameter_counts(model)["total"])
    return {
        "dtype": dtype_name(dtype),
        "teacher_parameters": counts[0],
        "student_parameters": counts[1],
        "memory_estimate_bytes": memory_estimate(params, made.get_text_config(), counts, dtype.itemsize),
    }


def memory_estimate(params: Params, config: Any, counts: list[int], itemsize: int) -> int:
    """The teacher's weights, the student's with gradients and Adam's moments, and activations, in bytes.

    Activations per token and layer: about 34 hidden-size values with the feed-forward block at four times
    the width (Korthikanti et al. 2022, arXiv 2205.05198, section 4.1, in values of two bytes).
    """
    tokens = params.batch_size * params.max_length
    activations = tokens * config.num_hidden_layers * 17 * config.hidden_size * itemsize
    return int(counts[0] * itemsize + counts[1] * (16 + itemsize) + activations)
