"""Fusing from top to bottom: adapters, their base and records in, one adapter out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tuneutils.shared.command import Run
from tuneutils.shared.device import dtype_name, resolve_device, resolve_dtype, seed_everything
from tuneutils.shared.examples import Examples, encode_all
from tuneutils.shared.fitting import Fitting, check_patience, fit
from tuneutils.shared.models import (
    ModelRef,
    check_base,
    context_length,
    load_config,
    load_tokenizer,
    model_input,
    parameter_counts,
)
from tuneutils.shared.record_source import open_source
from tuneutils.shared.supervise import LEARNABLE, check_eos
from tuneutils.shared.tuning import base_to_tune, hush_others, load_frozen, save_tuned
from tuneutils.tools.adapter_fuse.adapters import names_of, open_adapters
from tuneutils.tools.adapter_fuse.params import TrainParams

if TYPE_CHECKING:
    from tuneutils.shared.adapters.fusion.compose import Part

#: A gate has few parameters, each of which moves a whole adapter.
LEARNING_RATES = {"attention": 1e-4, "gate": 1e-3}


def train(run: Run[TrainParams]) -> dict[str, Any]:
    """Run ``adapter-fuse train``; returns the summary.

    Raises:
        ToolError: bad input, with its place; nothing is written then.
    """
    params = run.params
    hush_others(run)
    base, refs = _check(params)
    parts = _read(refs, params)
    source = open_source(run, run.inputs, "records", formats=LEARNABLE)
    heldout = open_source(run, [params.heldout], "heldout", formats=LEARNABLE) if params.heldout else None
    inputs = [
        model_input(params.model),
        *(model_input(ref.given, "adapter") for ref in refs),
        *source.inputs,
        *(heldout.inputs if heldout else []),
    ]
    tokenizer = load_tokenizer(base, trust_remote_code=params.trust_remote_code)
    context = context_length(base, trust_remote_code=params.trust_remote_code)
    with run.artifact("adapter", inputs) as art:
        art.licence = inputs[0].licence
        examples = encode_all(run, source, tokenizer, context)
        check_eos(examples.encoded, tokenizer, examples.without_end)
        held = encode_all(run, heldout, tokenizer, context) if heldout else Examples([])
        where = resolve_device(run.device)
        dtype = resolve_dtype(run.dtype, where)
        seed_everything(run.seed)
        model = _fused_model(run, base, refs, parts, where, dtype)
        art.extra.update(method=params.method, adapters=names_of(refs), dtype=dtype_name(dtype))
        if refs[0].quantization:
            art.extra["quantization"] = refs[0].quantization
        fitting = Fitting(run, art, model, tokenizer, examples, held, where, dtype)
        trainer = fit(
            fitting,
            params.method,
            learning_rate=_learning_rate(params),
            trainer_class=fusion_trainer(params.value_penalty),
        )
        save_tuned(art, trainer, tokenizer)
    return {"output": run.output, "metrics": art.metrics}


def plan(run: Run[TrainParams]) -> dict[str, Any]:
    """Trainable and total parameters, counted on a base without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    params = run.params
    base, refs = _check(params)
    parts = _read(refs, params)
    made: dict[str, Any] = {"adapters": names_of(refs), "learning_rate": _learning_rate(params)}
    if base.kind == "gguf":
        return made
    config = load_config(base, trust_remote_code=params.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=params.trust_remote_code)
        counts = parameter_counts(_composed(model.requires_grad_(False), parts, params))
    return made | {
        "trainable_parameters": counts["trainable"],
        "total_parameters": counts["total"],
    }


def _check(params: TrainParams) -> tuple[ModelRef, list[ModelRef]]:
    check_patience(params)
    refs = open_adapters(params.adapter)
    base = base_to_tune(params.model)
    check_base(refs[0], base, "that of --model")
    return base, refs


def _settings(params: TrainParams) -> dict[str, Any]:
    return {"attention_size": params.attention_size, "normalize_query": params.normalize_query}


def _learning_rate(params: TrainParams) -> float:
    return LEARNING_RATES[params.kind] if params.learning_rate is None else params.learning_rate


def _read(refs: list[ModelRef], params: TrainParams) -> list[Part]:
    """The adapters' weights, found to go together."""
    from tuneutils.shared.adapters.fusion.compose import composed_config, read_part

    parts = [read_part(ref.path, name) for ref, name in zip(refs, names_of(refs), strict=True)]
    composed_config(parts, params.kind, **_settings(params))
    return parts


def _fused_model(
    run: Run[TrainParams], base: ModelRef, refs: list[ModelRef], parts: list[Part], where: Any, dtype: Any
) -> Any:
    params = run.params
    model = load_frozen(base, where, dtype, refs[0].quantization, params.trust_remote_code)
    model = _composed(model, parts, params)
    if params.gradient_checkpointing:
        model.enable_input_require_grads()
    return model


def _composed(model: Any, parts: list[Part], params: TrainParams) -> Any:
    from tuneutils.shared.adapters.fusion.compose import compose

    return compose(model, parts, params.kind, **_settings(params))


def fusion_trainer(value_penalty: float) -> Any:
    """The trainer whose loss also keeps the value matrices near the identity.

    Pfeiffer et al. (2021), section 3.2.2, regularise V lest it add capacity; the penalty and its weight are
    those of the `adapters` library: ``0.01 * Σ ‖V − I‖²_F`` over all places.
    """
    from tuneutils.shared.adapters.fusion.layer import fusion_layers
    from tuneutils.shared.training import ResumableTrainer

    class FusionTrainer(ResumableTrainer):
        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, *args, **kwargs)
            layers = fusion_layers(self.accelerator.unwrap_model(model)).values()
            penalty = sum(mixer.penalty() for layer in layers for mixer in layer.fusion_mixer.values())
            # The step's gradient is the sum over its micro-batches.
            return loss + value_penalty * penalty / self.args.gradient_accumulation_steps

    return FusionTrainer
