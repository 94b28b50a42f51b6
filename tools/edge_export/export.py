"""The export from top to bottom: a model in, a checked package out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import Artifact, describe_input, write_json
from tuneutils.shared.command import Run
from tuneutils.shared.engines.client import EngineProcess
from tuneutils.shared.engines.runtimes import require_engine
from tuneutils.shared.errors import ExitCode, ToolError, require
from tuneutils.shared.models import load_model, load_tokenizer, model_input, resolve
from tuneutils.shared.records import Reader
from tuneutils.tools.edge_export import parity
from tuneutils.tools.edge_export.gguf_model import TensorTypes
from tuneutils.tools.edge_export.gguf_vocab import end_tokens
from tuneutils.tools.edge_export.params import SCHEMES, Params

FORMATS = ("text", "prompt-completion", "messages")
EXAMPLES = Path(__file__).parent / "examples"
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True)
class Built:
    """What a target wrote.

    Attributes:
        engine: the runtime that loads it.
        model: the file or folder inside the package that the runtime loads.
        types: what the weights really are.
        example: the example program, of ``examples/``.
        context: tokens that fit, where that is less than the model's own context.
    """

    engine: str
    model: str
    types: TensorTypes
    example: str
    context: int | None = None


@dataclass(frozen=True)
class Job:
    """What a target's builder is given."""

    weights: Any
    tokenizer: Any
    folder: Path
    scheme: str
    params: Params
    environment: dict[str, str]


#: Target → (runtime, builder's module). The builder is ``build(job) -> Built``.
BUILDERS = {
    "gguf": ("llama.cpp", "gguf_target"),
    "onnx": ("onnxruntime-genai", "onnx_target"),
    "openvino": ("openvino-genai", "openvino_target"),
    "executorch": ("executorch", "executorch_target"),
}


def bits_of(scheme: str) -> int:
    """The nominal bits of a scheme: the first number in its name."""
    return int("".join(c for c in scheme.partition("-")[0] if c.isdigit()))


def export(run: Run[Params]) -> dict[str, Any]:
    """Run ``edge-export package``; returns the summary.

    Raises:
        ToolError: an absent runtime (69), a model or held-out file that cannot be used, or
            a package that does not follow its source (1).
    """
    from tuneutils.shared.weights import Weights

    params = run.params
    scheme = params.scheme or SCHEMES[params.target][0]
    if scheme not in SCHEMES[params.target]:
        raise ToolError(
            f"--scheme {scheme}: --target {params.target} has {', '.join(SCHEMES[params.target])}",
            code=ExitCode.USAGE,
        )
    engine, _ = BUILDERS[params.target]
    require_engine(engine)
    require("gguf", "gguf")
    (given,) = run.inputs
    ref = resolve(given)
    weights = Weights(ref)
    records = list(Reader([params.heldout], formats=FORMATS, on_error=run.on_error).located())
    inputs = [model_input(given), describe_input("heldout", params.heldout)]
    with run.artifact("edge", inputs) as art:
        tokenizer = load_tokenizer(ref)
        environment = {"OMP_NUM_THREADS": str(params.threads)} if params.threads else {}
        built = _builder(params.target)(Job(weights, tokenizer, art.dir, scheme, params, environment))
        _companions(art, weights.folder, built)
        _chat(art, tokenizer, weights, built.context)
        found = _check(run, art, built, given, records, environment)
        _describe(art, ref.manifest, params.target, scheme, built, _parameters(weights))
        art.metrics.update({k: v for k, v in found.items() if k != "first_unlike"})
        least, most = parity.limits(bits_of(scheme))
        parity.check_gate(
            found,
            least if params.min_agreement is None else params.min_agreement,
            most if params.max_kl is None else params.max_kl,
            found.pop("first_unlike", None),
        )
    _log(run, built, art.metrics)
    return {"output": run.output, "target": params.target, "scheme": scheme, **art.metrics}


def _builder(target: str) -> Callable[[Job], Built]:
    import importlib

    module = importlib.import_module(f"tuneutils.tools.edge_export.{BUILDERS[target][1]}")
    made: Callable[[Job], Built] = module.build
    return made


def _companions(art: Artifact, folder: Path, built: Built) -> None:
    """Tokenizer and chat template for those who want them apart, and the example program."""
    for name in COMPANIONS:
        if (folder / name).is_file() and not (art.dir / name).exists():
            shutil.copyfile(folder / name, art.dir / name)
    shutil.copyfile(EXAMPLES / built.example, art.dir / "example.py")


def _chat(art: Artifact, tokenizer: Any, weights: Any, context: int | None) -> None:
    """``chat.json``: what stands before and after a user's message, what ends the answer, how much fits.

    For runtimes without a template engine; it is the chat template, rendered.
    """
    mark = "\u241eprompt\u241e"
    before, after = "", ""
    if tokenizer.chat_template is not None:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
        )
        before, _, after = str(text).partition(mark)
    context = context or weights.config.get("max_position_embeddings")
    chat = {"before": before, "after": after, "stop": end_tokens(tokenizer, weights), "context": context}
    write_json(art.dir / "chat.json", chat)


def _check(
    run: Run[Params], art: Artifact, built: Built, given: str, records: list[Any], environment: dict[str, str]
) -> dict[str, Any]:
    """Parity with the source, the source in float32 unless ``--dtype`` says otherwise."""
    params = run.params
    dtype = "float32" if run.dtype == "auto" else run.dtype
    loaded = load_model(given, device=run.device, dtype=dtype)
    texts = parity.windows(
        loaded, records, tokens=params.parity_tokens, max_length=params.max_length, template=params.template
    )
    run.log.info("comparing %d records in %s", len(texts), built.engine)
    with EngineProcess(built.engine, art.dir / built.model, environment) as engine:
        alike, first = parity.tokenized_alike(loaded, engine, texts)
        items = parity.compare(loaded, engine, texts, art.dir)
    return {**parity.metrics(items, run.seed), "tokenized_alike": alike, "first_unlike": first}


def _parameters(weights: Any) -> int:
    """Of the source; tied ones once."""
    skeleton = weights.skeleton()
    tied = set(getattr(skeleton, "all_tied_weights_keys", {}) or {})
    named = skeleton.named_parameters(remove_duplicate=False)
    return sum(p.numel() for name, p in named if name not in tied)


def _describe(art: Artifact, source: Any, target: str, scheme: str, built: Built, parameters: int) -> None:
    """Sizes, and where it all comes from. Bits are per parameter of the source, so that a copy counts."""
    art.licence, art.source = source.get("licence"), source.get("source")
    art.extra["edge"] = {"target": target, "scheme": scheme, "engine": built.engine, "model": built.model}
    weights = sum(row["bytes"] for row in built.types.types.values())
    art.metrics.update(
        bytes=sum(p.stat().st_size for p in art.dir.rglob("*") if p.is_file()),
        parameters=parameters,
        bits_per_weight=float(f"{8 * weights / parameters:.6g}"),
        weight_bytes=built.types.read_bytes,
        tensor_types=built.types.types,
    )


def _log(run: Run[Params], built: Built, found: dict[str, Any]) -> None:
    run.log.info(
        "%s: %.3f bits a weight (%s); agreement %.4f, KL %.4g nats a token in %s",
        run.output,
        found["bits_per_weight"],
        ", ".join(f"{name} {row['parameters']:,}" for name, row in built.types.types.items()),
        found["agreement"]["value"],
        found["kl"]["value"],
        built.engine,
    )
