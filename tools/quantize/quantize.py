"""A model's weights on a grid, layer by layer: what is refused, what is made, what is written."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from tuneutils.shared.device import resolve_device, resolve_dtype

# isort: split
import torch
from torch import Tensor

from tuneutils.shared.artifact import Artifact, Input, describe_input, log_event
from tuneutils.shared.calibration import calibration_ids
from tuneutils.shared.command import Run, Summary
from tuneutils.shared.errors import ExitCode, ToolError, require
from tuneutils.shared.four_bit import BNB_SCHEMES
from tuneutils.shared.layerwise import Decoder, Step, layer_linears, open_decoder, walk
from tuneutils.shared.models import load_tokenizer, model_input, resolve
from tuneutils.shared.packing import CheckpointWriter, copy_companions, quantization_config
from tuneutils.shared.quantizers import Grid, relative_error, working_groups
from tuneutils.shared.weights import Weights, check_finite
from tuneutils.tools.quantize import awq, bnb
from tuneutils.tools.quantize.mixed import Matrix, allocate
from tuneutils.tools.quantize.schemes import Inputs, Layer, Stored, on_codebook, on_grid, round_nearest

if TYPE_CHECKING:
    from tuneutils.tools.quantize.cli import Params

CALIBRATED = ("gptq", "awq", "mixed")
BY_GROUP = ("rtn", "gptq", "awq", "mixed")
BNB = (*BNB_SCHEMES, "llm-int8")
# Rows that are no whole number of its blocks come out of bitsandbytes 0.50.2's CPU kernel wrong.
BNB_BLOCK = 64


def quantize(run: Run[Params]) -> Summary:
    """The whole tool; see ``Params``."""
    params = run.params
    _check_arguments(params)
    weights = Weights(resolve(run.inputs[0]), trust_remote_code=params.trust_remote_code)
    with run.artifact("model", _inputs(run)) as art:
        art.licence, art.source = art.inputs[0].licence, art.inputs[0].source
        started = time.monotonic()
        job = Job(run, weights)
        with CheckpointWriter(art.dir) as out:
            job.write_layers(out)
            job.write_ends(out)
            job.write_rest(out)
        copy_companions(weights, art.dir, job.config_changes())
        art.metrics, art.extra["layers"] = job.metrics(out.bytes), job.layers
        art.extra["compression"] = {"scheme": params.scheme, "method": "quantization"}
        _log(run, art, time.monotonic() - started)
    return {"output": run.output, "kind": "model", "metrics": art.metrics}


def _check_arguments(params: Params) -> None:
    if params.scheme in CALIBRATED and not params.calibration:
        raise ToolError(f"--scheme {params.scheme} needs --calibration RECORDS", code=ExitCode.USAGE)
    if (params.budget is None) == (params.scheme == "mixed"):
        word = "needs --budget" if params.scheme == "mixed" else "takes no --budget"
        raise ToolError(f"--scheme {params.scheme} {word}", code=ExitCode.USAGE)
    if params.embeddings and params.scheme not in ("int8", "rtn", "gptq", "awq"):
        raise ToolError(
            f"--embeddings: {params.scheme} keeps them in full precision; use int8, rtn, gptq or awq",
            code=ExitCode.USAGE,
        )
    if bad := [b for b in params.mixed_bits if b > 8]:
        raise ToolError(f"--mixed-bits {bad[0]}: at most 8", code=ExitCode.USAGE)
    if params.scheme in BNB:
        require("bitsandbytes", "quantize")


def _inputs(run: Run[Params]) -> list[Input]:
    made = [model_input(run.inputs[0])]
    return made + [describe_input("calibration", path) for path in run.params.calibration]


class Job:
    """One model being quantized.

    Attributes:
        targets: full names of the matrices on a grid; ``kept`` are the other linears.
        grids: name -> grid, for the schemes on uniform grids.
        layers: what the manifest says of each matrix.
    """

    def __init__(self, run: Run[Params], weights: Weights) -> None:
        self.run, self.params, self.weights = run, run.params, weights
        self.where = resolve_device(run.device)
        self.compute = resolve_dtype(run.dtype, self.where)
        self.decoder: Decoder = open_decoder(weights, dtype=self.compute, where=self.where)
        linears = self.decoder.linears()
        self.shapes = {name: (m.out_features, m.in_features) for name, m in linears.items()}
        self.kept = [n for n in linears if any(fnmatchcase(n, p) for p in self.params.skip)]
        self.targets = [n for n in linears if n not in set(self.kept)]
        if not self.targets:
            raise ToolError(f"{weights.given}: --skip leaves nothing to quantize", code=ExitCode.USAGE)
        self.stored = self._stored_dtype()
        self.layers: dict[str, dict[str, float]] = {}
        self.replaced: set[str] = set()
        self._check_widths()
        self.ids = self._calibration()
        self.grids = self._grids()

    def _stored_dtype(self) -> torch.dtype:
        if self.params.dtype_stored != "auto":
            return getattr(torch, self.params.dtype_stored)
        code, _ = self.weights.specs()[self.weights.key(f"{self.targets[0]}.weight")]
        return {"F16": torch.float16}.get(code, torch.bfloat16)

    def _check_widths(self) -> None:
        """Every matrix must be a whole number of groups (of bitsandbytes' blocks) wide."""
        size = self.params.group_size if self.params.scheme in BY_GROUP else 0
        if self.params.scheme in BNB_SCHEMES:
            size = BNB_BLOCK
        if not size:
            return
        if self.params.embeddings:
            embedding = self.decoder.model.get_input_embeddings()
            self.shapes |= dict.fromkeys(self._ends(), tuple(embedding.weight.shape))
        wanted = [*self.targets, *(self._ends() if self.params.embeddings else ())]
        bad = [name for name in wanted if self.shapes[name][1] % size]
        if not bad:
            return
        widths = {self.shapes[name][1] for name in wanted}
        fit = sorted(set.intersection(*(set(working_groups(w)) for w in widths)))
        named = f"{', '.join(bad[:3])}{f' and {len(bad) - 3} more' if len(bad) > 3 else ''}"
        if self.params.scheme in BNB_SCHEMES:
            reason, hint = f"bitsandbytes' block of {size}", "use rtn, gptq or awq"
        else:
            reason = f"--group-size {size}"
            hint = f"--group-size {' or '.join(map(str, fit)) if fit else 0} works"
        raise ToolError(
            f"{self.weights.given}: {len(bad)} matrices are {self.shapes[bad[0]][1]} wide, no multiple of "
            f"{reason}: {named}; {hint}, or --skip them"
        )

    def _calibration(self) -> Tensor | None:
        params = self.params
        if not params.calibration:
            return None
        tokenizer = load_tokenizer(resolve(self.weights.given), trust_remote_code=params.trust_remote_code)
        out = self.run.output
        return calibration_ids(
            params.calibration,
            tokenizer,
            rows=params.calibration_rows,
            length=params.calibration_length,
            seed=self.run.seed,
            on_error=self.run.on_error,
            quarantine=f"{out}.rejected.jsonl" if self.run.on_error == "quarantine" else None,
        )

    def _grids(self) -> dict[str, Grid]:
        params = self.params
        group = params.group_size or None
        # Matrices on several grids: the format's readers take no zero points then.
        symmetric = params.symmetric or params.scheme == "mixed"
        if params.scheme in ("int8", "int8-dynamic"):
            return dict.fromkeys(self.targets, Grid(8))
        if params.scheme in ("rtn", "gptq", "awq"):
            return dict.fromkeys(self.targets, Grid(params.bits, group, symmetric))
        if params.scheme != "mixed":
            return {}
        assert params.budget is not None
        choices = [Grid(bits, group, symmetric) for bits in sorted(set(params.mixed_bits))]
        return allocate(self._sensitivity(choices), choices, params.budget)

    def _sensitivity(self, choices: list[Grid]) -> dict[str, Matrix]:
        """What rounding each matrix alone to nearest costs its outputs, the model before it untouched."""
        found = {}
        for step, inputs in self._steps("sensitivity"):
            for name, weight in self._read(step).items():
                gram = inputs.gram(name)
                errors = {
                    grid.bits: relative_error(weight, round_nearest(weight, grid, None).dequantized(), gram)
                    for grid in choices
                }
                full = f"{step.name}.{name}"
                found[full] = Matrix(self.shapes[full], errors)
        return found

    def _steps(self, title: str) -> Iterator[tuple[Step, Inputs]]:
        """Each layer with its weights and, with calibration records, the statistics of its inputs."""
        count = len(self.decoder.layers)
        with self.run.progress(count, title, "layer") as progress:
            if self.ids is None:
                for index, layer in enumerate(self.decoder.layers):
                    name = f"{self.decoder.prefix}.{index}"
                    self.weights.fill(layer, name, self.compute, self.where)
                    yield Step(index, name, layer, torch.empty(0), {}, 1), Inputs([])
                    layer.to("meta")
                    progress.update()
                return
            for step in walk(self.decoder, self.ids, dtype=self.compute):
                yield step, Inputs.measure(step, magnitudes=self.params.scheme == "awq")
                progress.update()

    def _read(self, step: Step) -> dict[str, Tensor]:
        """A layer's target matrices as stored, in float32, by their names within the layer."""
        names = [n for n in layer_linears(step.layer) if f"{step.name}.{n}" in set(self.targets)]
        keys = {n: self.weights.key(f"{step.name}.{n}.weight") for n in names}
        read = self.weights.read(*keys.values())
        return {n: read[key].to(self.where).float() for n, key in keys.items()}

    def write_layers(self, out: CheckpointWriter) -> None:
        """Quantize and write every layer; each sees what the quantized ones before it give."""
        for step, inputs in self._steps(self.params.scheme):
            layer = Layer(step.name, self._read(step), inputs)
            if self.params.scheme == "awq":
                self._scale(step, layer, out)
            for name, made in self._quantized(layer):
                stored = self._as_loaded(made)
                full = f"{step.name}.{name}"
                error = relative_error(layer.weights[name], stored.weight, layer.inputs.gram(name))
                self.layers[full] = {"bits": stored.bits, "error": float(f"{error:.4g}")}
                out.put(stored.tensors)
                self.replaced.add(f"{full}.weight")
                step.linears[name].weight.data = stored.weight.to(self.compute)

    def _quantized(self, layer: Layer) -> Iterator[tuple[str, Stored]]:
        scheme = self.params.scheme
        if scheme in BNB:
            yield from on_codebook(layer, scheme, self.stored)
        else:
            grids = {name: self.grids[f"{layer.name}.{name}"] for name in layer.weights}
            yield from on_grid(layer, grids, self.params, self.stored)

    def _as_loaded(self, stored: Stored) -> Stored:
        """On a single grid, weights are dequantized as they are read, into the precision of their scales."""
        if self.params.scheme in ("int8", "rtn", "gptq", "awq"):
            stored.weight = stored.weight.to(self.stored).float()
        return stored

    def _scale(self, step: Step, layer: Layer, out: CheckpointWriter) -> None:
        """AWQ's scales, searched and applied pair by pair; norms that changed are written."""
        inner = {n for n, p in step.layer.named_parameters() if p.dim() == 1}
        keys = {n: self.weights.key(f"{step.name}.{n}") for n in inner}
        read = self.weights.read(*keys.values())
        vectors = {n.removesuffix(".weight"): read[key].to(self.where).float() for n, key in keys.items()}
        table = {**layer.weights, **vectors}
        for pair in awq.pairs(step.layer, self.decoder.model.config, step.name):
            if any(name not in layer.weights for name in pair.readers) or pair.writer not in table:
                continue
            first = pair.readers[0]
            scale = awq.search_scale(
                [table[name] for name in pair.readers],
                layer.inputs.gram(first),
                layer.inputs.magnitude(first),
                self.grids[f"{step.name}.{first}"],
                pair,
            )
            before = table[first]
            awq.apply_scale(table, pair, scale, self.stored)
            layer.inputs.rescale(pair.readers, (table[first] / before)[0])
        layer.weights = {name: table[name] for name in layer.weights}
        for name in vectors:
            full = f"{name}.weight" if f"{name}.weight" in inner else name
            step.layer.get_parameter(full).data = table[name].to(self.compute)
            out.put({f"{step.name}.{full}": table[name].to(self.stored)})
            self.replaced.add(f"{step.name}.{full}")

    def write_ends(self, out: CheckpointWriter) -> None:
        """Input embedding and output projection, rounded to nearest if that is asked for."""
        if not self.params.embeddings:
            return
        grid = next(iter(self.grids.values()))
        for name in self._ends():
            key = self.weights.key(f"{self.decoder.embedding if self.decoder.tied else name}.weight")
            matrix = self.weights.read(key)[key].float()
            check_finite(self.weights.given, name, matrix)
            stored = self._as_loaded(round_nearest(matrix, grid, None).stored(name, self.stored))
            error = relative_error(matrix, stored.weight)
            self.layers[name] = {"bits": stored.bits, "error": float(f"{error:.4g}")}
            out.put(stored.tensors)
            self.replaced.add(f"{name}.weight")
            self.grids[name] = grid
        if self.decoder.tied:
            self.run.log.info("embedding and head were tied: each is stored, %d bits a weight", grid.bits)

    def _ends(self) -> tuple[str, str]:
        return self.decoder.embedding, self.decoder.head

    def write_rest(self, out: CheckpointWriter) -> None:
        """What is not quantized, tensor by tensor, in the stored precision."""
        done = {self.weights.key(name) for name in self.replaced}
        names = {key: name for name, key in self.weights._keys.items()}
        if self.decoder.tied and f"{self.decoder.embedding}.weight" != f"{self.decoder.head}.weight":
            done.add(f"{self.decoder.head}.weight")
        for key in self.weights.files:
            if key in done:
                continue
            tensor = self.weights.read(key)[key]
            check_finite(self.weights.given, key, tensor)
            out.put({names.get(key, key): tensor.to(self.stored) if tensor.is_floating_point() else tensor})

    def config_changes(self) -> dict[str, Any]:
        """What changes in ``config.json``."""
        kept = [*self.kept, *([] if self.decoder.head in self.grids else [self.decoder.head])]
        if self.params.scheme in BNB:
            described = bnb.config(self.params.scheme, kept, self.stored)
        else:
            groups: dict[Grid, list[str]] = {}
            for name, grid in self.grids.items():
                groups.setdefault(grid, []).append(name)
            dynamic = self.params.scheme == "int8-dynamic"
            described = quantization_config(groups, kept, dynamic_inputs=dynamic)
        changes: dict[str, Any] = {
            "quantization_config": described,
            "dtype": str(self.stored).removeprefix("torch."),
            "torch_dtype": None,
        }
        if self.params.embeddings and self.decoder.tied:
            changes["tie_word_embeddings"] = False
        return changes

    def metrics(self, stored_bytes: int) -> dict[str, Any]:
        """Deterministic numbers for the manifest."""
        skipped = {f"{self.decoder.head}.weight"} if self.decoder.tied else set()
        names = [
            n for n, _ in self.decoder.model.named_parameters(remove_duplicate=False) if n not in skipped
        ]
        sizes = dict(self.decoder.model.named_parameters(remove_duplicate=False))
        weights = sum(sizes[n].numel() for n in names)
        on_grid_count = sum(self.shapes[n][0] * self.shapes[n][1] for n in self.targets)
        errors = [self.layers[n]["error"] for n in self.targets]
        return {
            "bytes": stored_bytes,
            "weights": weights,
            "bits_per_weight": round(8 * stored_bytes / weights, 4),
            "quantized_matrices": len(self.targets),
            "quantized_share": round(on_grid_count / weights, 4),
            "error": {
                "weighted_by": "calibration" if self.ids is not None else "nothing",
                "mean": float(f"{sum(errors) / len(errors):.4g}"),
                "max": max(errors),
            },
        }


def _log(run: Run[Params], art: Artifact, seconds: float) -> None:
    found = art.metrics
    run.log.info(
        "%.3f bits a weight over all %d weights, %.1f MB; error %s mean, %s max (share of %s)",
        found["bits_per_weight"],
        found["weights"],
        found["bytes"] / 1e6,
        found["error"]["mean"],
        found["error"]["max"],
        "the outputs' energy" if found["error"]["weighted_by"] == "calibration" else "the weights' squares",
    )
    log_event(
        run,
        event="quantize",
        seconds=round(seconds, 2),
        cpu_seconds=round(time.process_time(), 2),
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
