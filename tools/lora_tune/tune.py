"""Fine-tuning from top to bottom: records and a base model in, an adapter or a model out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import Artifact
from tuneutils.shared.command import Run
from tuneutils.shared.device import dtype_name, resolve_device, resolve_dtype, seed_everything
from tuneutils.shared.examples import Examples, encode_all, print_labels
from tuneutils.shared.fitting import Fitting, fit
from tuneutils.shared.methods import apply_method, learning_rate, quantization
from tuneutils.shared.models import ModelRef, context_length, load_tokenizer, model_input
from tuneutils.shared.record_source import open_source
from tuneutils.shared.supervise import LEARNABLE, Encoded, check_eos
from tuneutils.shared.tuning import hush_others, load_frozen, save_tuned, stored_dtype
from tuneutils.tools.lora_tune.params import Params
from tuneutils.tools.lora_tune.plan import check_options


def tune(run: Run[Params]) -> dict[str, Any]:
    """Run ``lora-tune``; returns the summary.

    Raises:
        ToolError: bad input, with its place; nothing is written then.
    """
    params = run.params
    hush_others(run)
    base = check_options(params)
    source = open_source(run, run.inputs, "records", formats=LEARNABLE)
    heldout = open_source(run, [params.heldout], "heldout", formats=LEARNABLE) if params.heldout else None
    inputs = [model_input(params.model), *source.inputs, *(heldout.inputs if heldout else [])]
    if params.under is not None:
        inputs.append(model_input(params.under, "under"))
    tokenizer = load_tokenizer(base, trust_remote_code=params.trust_remote_code)
    context = _context(base, params)
    if params.show_labels:
        return print_labels(run, encode_all(run, source, tokenizer, context), tokenizer)
    with run.artifact("model" if params.method == "full" else "adapter", inputs) as art:
        art.licence = inputs[0].licence
        examples = encode_all(run, source, tokenizer, context)
        check_eos(examples.encoded, tokenizer, examples.without_end)
        held = encode_all(run, heldout, tokenizer, context) if heldout else Examples([])
        _train(run, art, base, tokenizer, examples, held)
    return {"output": run.output, "metrics": art.metrics}


def _context(base: ModelRef, params: Params) -> int | None:
    """Tokens that an example may have: the model's positions less those that virtual tokens take."""
    positions = context_length(base, trust_remote_code=params.trust_remote_code)
    taken = params.virtual_tokens if params.method in ("prefix", "p-tuning", "prompt") else 0
    return None if positions is None else positions - taken


def _train(
    run: Run[Params], art: Artifact, base: ModelRef, tokenizer: Any, examples: Examples, held: Examples
) -> None:
    params = run.params
    seed_everything(run.seed)
    where = resolve_device(run.device)
    dtype = resolve_dtype(run.dtype, where)
    model = _prepare(run, base, tokenizer, examples.encoded[0], dtype, where, art.work)
    art.extra.update(method=params.method, dtype=dtype_name(dtype))
    if (scheme := quantization(params)) is not None:
        art.extra["quantization"] = scheme
    fitting = Fitting(run, art, model, tokenizer, examples, held, where, dtype)
    trainer = fit(fitting, params.method, learning_rate=learning_rate(params), lr_ratio=params.loraplus_ratio)
    start = {"path_initial_model_for_weight_conversion": str(art.work / "pissa_initial")}
    save_tuned(art, trainer, tokenizer, **(start if params.pissa else {}))


def _prepare(
    run: Run[Params], base: ModelRef, tokenizer: Any, first: Encoded, dtype: Any, where: Any, work: Path
) -> Any:
    """The base with the method applied; prefix and prompt start from what the first example is given."""
    params = run.params
    given = [i for i, label in zip(first.input_ids, first.labels, strict=True) if label < 0]
    text = params.init_text or tokenizer.decode(given or first.input_ids)
    stored = stored_dtype(params.method, dtype)
    model = load_frozen(base, where, stored, quantization(params), params.trust_remote_code)
    model = apply_method(model, tokenizer, params, text, params.under)
    if params.pissa:
        _save_initial(model, work)
    if params.gradient_checkpointing:
        model.enable_input_require_grads()
    return model


def _save_initial(model: Any, work: Path) -> None:
    """PiSSA moves part of the base into the adapter: keep its start, to save a plain LoRA at the end."""
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(work / "pissa_initial"))
    model.peft_config["default"].init_lora_weights = "pissa"
