"""What a run would train and need, counted on a model without weights; and options that do not fit."""

from __future__ import annotations

from typing import Any

from tuneutils.shared.command import Run
from tuneutils.shared.device import dtype_name, resolve_device, resolve_dtype
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.methods import apply_method, check_method, learning_rate
from tuneutils.shared.models import ModelRef, load_config, load_tokenizer, parameter_counts
from tuneutils.shared.tuning import base_to_tune, memory_estimate
from tuneutils.tools.cpt_run import units
from tuneutils.tools.cpt_run.params import Params

#: Methods whose virtual tokens or cache would stand before a row, not before each document in it.
VIRTUAL = ("prefix", "prefix-tuning", "prompt", "prompt-tuning", "p-tuning", "cartridge")


def check_options(run: Run[Params], world: int = 1) -> ModelRef:
    """Refuse options that do not go together; gives the model to go on with.

    Raises:
        ToolError: exit 2, or what ``models.resolve`` raises.
    """
    params = run.params
    check_method(params)
    lengths = {"--tokens": params.tokens is not None, "--budget": params.budget is not None}
    lengths["--epochs"] = run.sources.get("epochs", "default") != "default"
    given = [name for name, used in lengths.items() if used]
    refusals = [
        (len(given) > 1, f"{' and '.join(given)}: how long to learn is said once"),
        (params.budget and world > 1, "--budget is measured by one process; with several give --tokens"),
        (params.method in VIRTUAL, f"--method {params.method}: virtual tokens are no place for a domain"),
        (params.max_forgetting and not params.general, "--max-forgetting needs --general"),
        (params.eval_every and not (params.eval or params.general), "--eval-every needs --eval or --general"),
        (
            params.embeddings == "freeze" and params.method != "full",
            "--embeddings freeze goes with --method full; other methods leave them as they are",
        ),
    ]
    for refused, why in refusals:
        if refused:
            raise ToolError(why, code=ExitCode.USAGE)
    if params.budget:
        units.seconds(params.budget)
    if params.max_forgetting:
        units.share(params.max_forgetting, "--max-forgetting")
    return base_to_tune(params.model)


def with_embeddings(model: Any, tokenizer: Any, params: Params) -> Any:
    """The model with the method in place and the embeddings trained or frozen as ``--embeddings`` says.

    A PEFT method trains a copy of them (``modules_to_save``); where the head is tied, they stay tied.
    """
    if params.method == "full":
        model.requires_grad_(True)
        if params.embeddings == "freeze":
            model.get_input_embeddings().requires_grad_(False)
            model.get_output_embeddings().requires_grad_(False)
        return model
    if params.embeddings == "train":
        wanted = {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
        names = [name.rsplit(".", 1)[-1] for name, module in model.named_modules() if id(module) in wanted]
        tied = bool(model.config.tie_word_embeddings)
        kept = f"modules_to_save=[{', '.join(names[:1] if tied else names)}]"
        added = (kept, "ensure_weight_tying=true") if tied else (kept,)
        params = params.__class__(**{**vars(params), "peft_option": (*params.peft_option, *added)})
    return apply_method(model, tokenizer, params, ".")


def plan(run: Run[Params]) -> dict[str, Any]:
    """Trainable and total parameters, and an estimate of the peak memory in bytes."""
    import torch
    from transformers import AutoModelForCausalLM

    params = run.params
    base = check_options(run)
    dtype = resolve_dtype(run.dtype, resolve_device(run.device))
    shown: dict[str, Any] = {"dtype": dtype_name(dtype), "learning_rate": learning_rate(params)}
    if base.kind == "gguf":
        return shown
    config = load_config(base, trust_remote_code=params.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=params.trust_remote_code
        )
        model.requires_grad_(False)
        counts = parameter_counts(with_embeddings(model, load_tokenizer(base), params))
    return shown | {
        "trainable_parameters": counts["trainable"],
        "total_parameters": counts["total"],
        "memory_estimate_bytes": memory_estimate(
            params, config, counts, dtype.itemsize, params.batch_size * params.max_length
        ),
    }
