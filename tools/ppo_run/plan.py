"""What a run would train and need, counted on a model without weights."""

from __future__ import annotations

from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads
from tuneutils.shared.command import Run
from tuneutils.shared.device import dtype_name, resolve_device, resolve_dtype
from tuneutils.shared.methods import apply_method, check_method
from tuneutils.shared.models import load_tokenizer, parameter_counts, resolve
from tuneutils.tools.ppo_run.actors import learning_rates
from tuneutils.tools.ppo_run.params import Params
from tuneutils.tools.ppo_run.rewards import kind_of

#: They start from a text's activations, which a model without weights does not have.
FROM_ACTIVATIONS = ("prefix", "prompt")


def plan(run: Run[Params]) -> dict[str, Any]:
    """Episodes, steps, learning rates, parameters, and an estimate of the peak memory in bytes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    params = run.params
    check_method(params)
    base = resolve(params.model)
    dtype = resolve_dtype(run.dtype, resolve_device(run.device))
    policy_rate, value_rate = learning_rates(params)
    shown: dict[str, Any] = {
        "dtype": dtype_name(dtype),
        "episodes": params.updates * params.batch_size,
        "optimizer_steps": params.updates * params.ppo_epochs * params.minibatches,
        "learning_rate": policy_rate,
        "value_learning_rate": value_rate,
    }
    if base.kind == "gguf" or params.method in FROM_ACTIVATIONS:
        return shown
    config = AutoConfig.from_pretrained(base.path, revision=base.revision)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
        counts = parameter_counts(apply_method(model, load_tokenizer(base), params, "."))
    memory = memory_estimate(params, config, counts, dtype.itemsize)
    return {
        **shown,
        "trainable_parameters": counts["trainable"],
        "total_parameters": counts["total"],
        "memory_estimate_bytes": memory,
    }


def memory_estimate(params: Params, config: Any, counts: dict[str, int], itemsize: int) -> int:
    """Weights of all models, gradients, Adam's moments and a micro-batch's activations, in bytes.

    A reward model is taken to be as large as the policy. With every weight trained the reference and the
    value model are copies. Activations: 17 values a token, layer and hidden unit, for prompts as long as
    the responses (see Korthikanti et al. 2022, equation 1).
    """
    total, trainable = counts["total"], counts["trainable"]
    full, has_model = params.method == "full", kind_of(params.reward) == "model"
    stored = 4 + itemsize if full else itemsize  # the reference is in the precision of the products
    weights = total * stored + (total * (itemsize + 4 * full) if has_model else 0)
    learnt = trainable * (2 if has_model and params.value != "policy" else 1)
    tokens = params.micro_batch_size * 2 * params.max_new_tokens
    activations = tokens * config.hidden_size * 17 * itemsize * config.num_hidden_layers
    chunk_of_logits = 2 * 32 * 2**20
    learning = 10 if full and itemsize == 2 else 12  # gradient and moments, the first in bfloat16
    return int(weights + learning * learnt + activations + chunk_of_logits)
