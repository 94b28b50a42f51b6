"""One adapter into its base, or several into one: what is refused, what is made, what is compared."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneutils.shared.device import resolve_device, resolve_dtype

# isort: split
import torch

from tuneutils.shared import models
from tuneutils.shared.artifact import Artifact, Input, describe_input, load_manifest
from tuneutils.shared.command import Run, Summary
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.tools.adapter_merge import combine, compare, stream
from tuneutils.tools.adapter_merge.adapter import Adapter, Factors, open_adapter, same_base
from tuneutils.tools.adapter_merge.base import Base
from tuneutils.tools.adapter_merge.in_memory import merge_in_memory
from tuneutils.tools.adapter_merge.save import save_adapter

if TYPE_CHECKING:
    from tuneutils.tools.adapter_merge.cli import Params


@dataclass
class Combined:
    """Several adapters made one: an update a module, with its error against the true weighted sum."""

    updates: dict[str, stream.Update]
    errors: dict[str, float | None]


def merge(run: Run[Params]) -> Summary:
    """The whole tool; see ``Params``."""
    weights, into = _check_arguments(run)
    adapters = [open_adapter(_resolve(path, run.params.model)) for path in run.inputs]
    same_base(adapters)
    several = len(adapters) > 1 or into == "adapter" or bool(run.params.weight)
    if several:
        _check_summable(adapters)
    with Base(adapters[0].base) as base:
        kind = "adapter" if into == "adapter" else "model"
        with run.artifact(kind, _inputs(run, adapters)) as art:
            art.licence = art.inputs[0].licence
            if several:
                metrics = _merge_several(run, art, adapters, weights, base, into)
            else:
                metrics = _merge_one(run, art, adapters[0], base)
            art.metrics = metrics
    return {"output": run.output, "kind": kind, "metrics": metrics}


def _check_arguments(run: Run[Params]) -> tuple[list[float], str]:
    params, count = run.params, len(run.inputs)
    into = params.into if params.into != "auto" else "base" if count == 1 else "adapter"
    if params.weight and len(params.weight) != count:
        raise ToolError(
            f"{len(params.weight)} --weight for {count} adapters; give one for each, in their order",
            code=ExitCode.USAGE,
        )
    if params.density is not None and params.method not in combine.DENSE:
        raise ToolError(f"--density has no meaning for --method {params.method}", code=ExitCode.USAGE)
    if params.rank is not None and (params.method in ("cat", "linear") or into == "base"):
        where = "--into base" if into == "base" else f"--method {params.method}"
        raise ToolError(f"--rank has no meaning for {where}", code=ExitCode.USAGE)
    return list(params.weight) or [1.0] * count, into


def _resolve(given: str, model: str | None) -> models.ModelRef:
    """An adapter on the base it names, or on ``--model``, which must be the recorded one."""
    path = Path(given)
    if path.is_dir() and not (path / "adapter_config.json").is_file():
        raise ToolError(f"{given}: no adapter here (no adapter_config.json)")
    if model is None:
        ref = models.resolve(given)
    else:
        if not path.is_dir():
            raise ToolError(f"{given}: no such folder", code=ExitCode.MISSING_INPUT)
        models.check_safetensors(path, "adapter_model")
        manifest = load_manifest(path) if (path / "artifact.json").is_file() else {}
        ref = models.ModelRef(given, "adapter", given, base=models.resolve(model), manifest=manifest)
        recorded = next((i for i in manifest.get("inputs", []) if i["role"] == "model"), None)
        if recorded and models.model_input(model).sha256 != recorded["sha256"]:
            raise ToolError(
                f"{given}: was trained on {recorded['path']} ({recorded['sha256'][:12]}), "
                f"and --model {model} is another; merge it into the one it was trained on"
            )
    if ref.kind != "adapter":
        raise ToolError(f"{given}: a {ref.kind}, not an adapter folder")
    if ref.base is not None and ref.base.kind == "adapter":
        raise ToolError(f"{given}: its base {ref.base.given} is itself an adapter; merge that first")
    return ref


def _check_summable(adapters: Sequence[Adapter]) -> None:
    for adapter in adapters:
        if reason := adapter.only_lora():
            raise ToolError(
                f"{adapter.path}: {reason}; merge it alone into its base: adapter-merge {adapter.path} -o OUT"
            )


def _inputs(run: Run[Params], adapters: Sequence[Adapter]) -> list[Input]:
    base = adapters[0].base
    made = [models.model_input(base.given) if base.kind == "hub" else describe_input("model", base.given)]
    made += [describe_input("adapter", path) for path in run.inputs]
    if run.params.check and run.params.check_records:
        made.append(describe_input("check-records", run.params.check_records))
    return made


def _stored(run: Run[Params]) -> torch.dtype | None:
    name = run.params.dtype_stored
    return None if name == "source" else getattr(torch, name)


def _merge_one(run: Run[Params], art: Artifact, adapter: Adapter, base: Base) -> dict[str, Any]:
    reason = adapter.needs_peft()
    if reason is None and base.unknown_layout():
        reason = "the base's files name its weights otherwise than its class does"
    if reason is None:
        counts = stream.write_model(base, adapter.path, stream.plan(adapter, base), art.dir, _stored(run))
    else:
        run.log.warning("%s: merging with the whole model in memory", reason)
        counts = merge_in_memory(base, adapter.path, art.dir, _stored(run))
    metrics: dict[str, Any] = {"in_memory": reason is not None, **counts}
    if run.params.check:
        found = _check(run, base, [adapter], [1.0], _load_model(run, str(art.dir)))
        compare.gate(found, run.params.max_kl, run.params.max_kl_share, _compute(run)[1])
        metrics["logits"] = found
    return metrics


def _merge_several(
    run: Run[Params],
    art: Artifact,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    base: Base,
    into: str,
) -> dict[str, Any]:
    if base.unknown_layout():
        raise ToolError(
            f"{base.folder}: names its weights otherwise than its class does; merge one at a time"
        )
    params = run.params
    made = _combine(run, adapters, weights, base, into)
    _log_errors(run, made.errors)
    metrics: dict[str, Any] = {"relative_error": _summary(made.errors)}
    art.extra["relative_errors"] = made.errors
    if into == "base":
        planned = stream.plan_updates(made.updates, adapters[0], base)
        metrics.update(stream.write_model(base, adapters[0].path, planned, art.dir, _stored(run)))
        load = _load_model(run, str(art.dir))
    else:
        factors = {m: u for m, u in made.updates.items() if isinstance(u, Factors)}
        save_adapter(factors, adapters, base, art.dir, _stored(run) or torch.float32)
        metrics["rank"] = max(f.a.shape[0] for f in factors.values())
        schemes = {a.manifest.get("quantization") for a in adapters}
        if len(schemes) == 1 and None not in schemes:
            art.extra["quantization"] = schemes.pop()
        load = _load_adapted(run, base, [str(art.dir)], [1.0])
    if params.check:
        found = _check(run, base, adapters, weights, load)
        if params.method in ("cat", "linear"):
            compare.gate(found, params.max_kl, params.max_kl_share, _compute(run)[1])
        metrics["logits"] = found
    return metrics


def _combine(
    run: Run[Params], adapters: Sequence[Adapter], weights: Sequence[float], base: Base, into: str
) -> Combined:
    """Every module's parts, combined; an adapter without a module counts as zero there."""
    params = run.params
    parts: dict[str, list[combine.Weighted]] = {}
    for index, (adapter, weight) in enumerate(zip(adapters, weights)):
        for module, factors in stream.module_factors(adapter, base).items():
            parts.setdefault(module, []).append(combine.Weighted(weight, factors, index))
    made = Combined({}, {})
    density = params.density or combine.DEFAULT_DENSITY.get(params.method, 1.0)
    with run.progress(len(parts), params.method, "layer") as progress:
        for module in sorted(parts, key=_natural):
            truth = combine.weighted_sum(parts[module])
            if params.method in combine.DENSE:
                make = partial(combine.combine_dense, parts[module], params.method, density, run.seed, module)
                update, error = _dense(params, make, truth, into)
            else:
                update = _low_rank(params, truth, parts[module])
                error = combine.relative_error(update, truth)
            made.updates[module] = update
            made.errors[module] = None if error is None else float(f"{error:.3g}")
            progress.update()
    return made


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in name.split(".")]


def _low_rank(params: Params, truth: Factors, parts: Sequence[combine.Weighted]) -> Factors:
    if params.method == "cat":
        return truth
    if params.method == "linear":
        return combine.truncate(truth, None)
    largest = max(p.factors.a.shape[0] for p in parts)
    return combine.truncate(truth, params.rank or largest)


def _dense(
    params: Params, make: Callable[[], torch.Tensor], truth: Factors, into: str
) -> tuple[stream.Update, float | None]:
    """A matrix by TIES or DARE: factorised for an adapter; for a base made again when it is written."""
    delta = make()
    if into == "adapter":
        low = combine.factorise(delta, params.rank or truth.a.shape[0], truth)
        return low, combine.relative_error(low, truth)
    error = combine.relative_error_dense(delta, truth.b @ truth.a)
    if truth.transposed:
        return stream.Dense(truth.shape, lambda: make().T), error
    return stream.Dense(truth.shape, make), error


def _summary(errors: dict[str, float | None]) -> dict[str, float | int]:
    known = [e for e in errors.values() if e is not None]
    if not known:
        return {"layers": len(errors)}
    return {"mean": float(f"{sum(known) / len(known):.3g}"), "max": max(known), "layers": len(errors)}


def _log_errors(run: Run[Params], errors: dict[str, float | None]) -> None:
    width = max(map(len, errors))
    run.log.info("%-*s  relative error against the weighted sum", width, "layer")
    for module, error in errors.items():
        run.log.info("%-*s  %s", width, module, "the sum is zero" if error is None else f"{error:.2e}")
    found = _summary(errors)
    if "mean" in found:
        run.log.info("mean %.2e, max %.2e over %d layers", found["mean"], found["max"], found["layers"])


def _load_model(run: Run[Params], folder: str) -> Callable[[], Any]:
    where, dtype = _compute(run)
    return lambda: models.load_base(models.resolve(folder), where, dtype)


def _load_adapted(
    run: Run[Params],
    base: Base,
    folders: Sequence[str],
    weights: Sequence[float],
    scheme: str | None = None,
) -> Callable[[], Any]:
    where, dtype = _compute(run)
    return lambda: _adapted(models.load_base(base.ref, where, dtype, scheme), folders, weights)


def _adapted(plain: Any, folders: Sequence[str], weights: Sequence[float]) -> Any:
    """The base with adapters on it through PEFT, each scaled by its weight, all active at once."""
    names = [f"merge{i}" for i in range(len(folders))]
    model = models.load_adapter(plain, folders[0], names[0])
    for name, folder in zip(names[1:], folders[1:]):
        model.load_adapter(folder, adapter_name=name)
    if len(names) > 1 or weights[0] != 1:
        _scale(model, dict(zip(names, weights)))
    return model.eval()


def _scale(model: Any, weights: dict[str, float]) -> None:
    model.base_model.set_adapter(list(weights))
    for module in model.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):
            scaling.update({name: scaling[name] * w for name, w in weights.items() if name in scaling})


def _compute(run: Run[Params]) -> tuple[torch.device, torch.dtype]:
    where = resolve_device(run.device)
    return where, torch.float32 if run.dtype == "auto" else resolve_dtype(run.dtype, where)


def _check(
    run: Run[Params],
    base: Base,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    load_after: Callable[[], Any],
) -> dict[str, Any]:
    """Compare base plus weighted adapters with what was made, and with the base alone for scale."""
    ref = models.ModelRef(str(adapters[0].path), "adapter", str(adapters[0].path), base=base.ref)
    texts = compare.check_texts(run.params.check_records, run.on_error)
    batches = compare.encode(models.load_tokenizer(ref), texts, base.vocab_size())
    if not batches:
        raise ToolError("nothing to compare logits on: every text is empty; see --check-records")
    folders = [str(a.path) for a in adapters]
    logits = partial(compare.logits_of, batches=batches)

    def base_and_before(model: Any) -> tuple[compare.Logits, compare.Logits]:
        return logits(model), logits(_adapted(model, folders, weights))

    where, dtype = _compute(run)
    load_plain = partial(models.load_base, base.ref, where, dtype)
    plain, before = compare.measured(load_plain, base_and_before)
    after = compare.measured(load_after, logits)
    found: dict[str, Any] = compare.compare(before, after)
    found["effect_kl"] = compare.compare(before, plain)["mean_kl"]
    scheme = adapters[0].manifest.get("quantization")
    if scheme and len(adapters) == 1:
        if importlib.util.find_spec("bitsandbytes") is None:
            run.log.warning("bitsandbytes is not installed: not compared with the 4-bit model")
        else:
            quantised = compare.measured(_load_adapted(run, base, folders, weights, scheme), logits)
            found["against_4bit"] = {"scheme": scheme, **compare.compare(quantised, after)}
    _log_logits(run, found)
    return found


def _log_logits(run: Run[Params], found: dict[str, Any]) -> None:
    line = "%s: mean KL %.2e nats a token, max |Δlogit| %.2e, top-1 agreement %.4f over %d tokens"
    keys = ("mean_kl", "max_abs_logit_difference", "top1_agreement", "n_tokens")
    run.log.info(line, "logits before and after", *(found[k] for k in keys))
    run.log.info("the adapter itself: mean KL %.2e", found["effect_kl"])
    if four := found.get("against_4bit"):
        run.log.info(line, f"against the {four['scheme']} model", *(four[k] for k in keys))
