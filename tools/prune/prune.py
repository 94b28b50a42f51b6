"""Pruning from top to bottom: a model and calibration records in, a pruned model and its report out."""

from __future__ import annotations

import csv
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip

from tuneutils.shared.artifact import Artifact, describe_input, log_event, work_dir, write_json
from tuneutils.shared.calibration import calibration_ids
from tuneutils.shared.command import Run
from tuneutils.shared.device import resolve_device, resolve_dtype, seed_everything
from tuneutils.shared.errors import ToolError
from tuneutils.shared.models import (
    ModelRef,
    load_adapter,
    load_base,
    load_config,
    load_tokenizer,
    model_input,
    parameter_counts,
    stored_format,
)
from tuneutils.shared.records import BadRecord, Reader
from tuneutils.shared.supervise import LEARNABLE, Encoded, encode
from tuneutils.shared.weights import check_finite
from tuneutils.tools.prune.params import SPARSE, Params
from tuneutils.tools.prune.plan import check_options, shares_of


def prune(run: Run[Params]) -> dict[str, Any]:
    """Run ``prune``; returns the summary.

    Raises:
        ToolError: bad input, with its place; nothing is written then.
    """
    params = run.params
    ref = check_options(params)
    shares = shares_of(params)
    inputs = [model_input(params.model), *(describe_input("calibration", p) for p in run.inputs)]
    inputs += [describe_input("heldout", params.heldout)] if params.heldout else []
    with run.artifact("model", inputs) as art:
        art.licence = inputs[0].licence
        seed_everything(run.seed)
        tokenizer = load_tokenizer(ref, trust_remote_code=params.trust_remote_code)
        sequences = _heldout(run, tokenizer) if params.heldout else []
        ids = calibration_ids(
            run.inputs,
            tokenizer,
            rows=params.calibration_rows,
            length=params.calibration_length,
            seed=run.seed,
            template=params.template,
            on_error=run.on_error,
            quarantine=work_dir(run.output or "") / "calibration.quarantine.jsonl",
        )
        model = _load(run, ref, torch.float32)
        counts = [parameter_counts(model)["total"]]
        if params.method in SPARSE:
            from tuneutils.tools.prune.weights import prune_weights

            rows = prune_weights(run, model, ids, shares)
        else:
            from tuneutils.tools.prune.structure import prune_structure

            model, rows = prune_structure(run, model, ids)
        counts.append(parameter_counts(model)["total"])
        art.metrics.update(original_parameters=counts[0], total_parameters=counts[1], zeros=_zeros(model))
        _save(run, art, ref, model, tokenizer, rows)
        _judge(run, art, ref, model, tokenizer, sequences)
    return {"output": run.output, "metrics": art.metrics}


def _load(run: Run[Params], ref: ModelRef, dtype: torch.dtype) -> Any:
    # Some formats are dequantized as they are loaded: only their files tell.
    if stored_format(ref.root) is not None:
        raise ToolError(f"{ref.given}: is quantized already; prune first, then quantize")
    model = load_base(ref.root, resolve_device(run.device), dtype, None, run.params.trust_remote_code)
    if ref.kind == "adapter":
        model = load_adapter(model, ref.path).merge_and_unload()
    for name, parameter in model.named_parameters():
        check_finite(ref.given, name, parameter)
    return model.requires_grad_(False).eval()


def _heldout(run: Run[Params], tokenizer: Any) -> list[Encoded]:
    """One sequence for each record, cut to ``--max-length``."""
    assert run.params.heldout is not None
    made = []
    for item in Reader([run.params.heldout], formats=LEARNABLE).located():
        try:
            made.append(encode(item.record, tokenizer, run.params.max_length, template=run.params.template))
            if not made[-1].learnt:
                raise ValueError(f"nothing in it is scored within {run.params.max_length} tokens")
        except ValueError as exc:
            raise BadRecord(item.place, str(exc)) from exc
    return made


def _zeros(model: Any) -> int:
    """Weights of the decoder's matrices that are zero."""
    from tuneutils.shared.layerwise import decoder_of

    return sum(int((m.weight == 0).sum()) for m in decoder_of(model).linears().values())


def _save(
    run: Run[Params], art: Artifact, ref: ModelRef, model: Any, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    """The model in the precision that it came in, and the table of what went, layer by layer."""
    stored = getattr(load_config(ref).get_text_config(), "dtype", None) or torch.float32
    model.to(stored).save_pretrained(art.dir)
    tokenizer.save_pretrained(art.dir)
    with open(art.dir / "sparsity.csv", "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    art.extra["method"] = run.params.method
    try:
        from tuneutils.tools.prune.plot import draw
    except ModuleNotFoundError:
        run.log.warning("no plot: the package 'matplotlib' is not installed")
        return
    draw(rows, art.dir / "sparsity.png")


def _judge(
    run: Run[Params], art: Artifact, ref: ModelRef, model: Any, tokenizer: Any, sequences: list[Encoded]
) -> None:
    """The pruned model beside the original: what it cost, and into the run log what it gained."""
    from tuneutils.shared.divergences_model import compare_models
    from tuneutils.shared.speed_up import speed_up
    from tuneutils.tools.prune.report import describe, one_line

    if not sequences and not run.params.speed:
        return
    dtype = resolve_dtype(run.dtype, resolve_device(run.device))
    original, model = _load(run, ref, dtype), model.to(dtype)
    if sequences:
        before, after = compare_models(original, [model], sequences, pad_id=int(tokenizer.pad_token_id))
        made = describe(before, after, run.seed)
        write_json(art.dir / "report.json", made)
        art.metrics["heldout"] = {name: value["value"] for name, value in made["pruned"].items()}
        run.log.info("%s", one_line(made))
    if run.params.speed:
        measured = speed_up(original, model, int(tokenizer.pad_token_id))
        log_event(run, event="speed", **measured)
        for what, value in measured.items():
            run.log.info("%s: %.2f times the original's speed", what, value["speed_up"]["value"])
