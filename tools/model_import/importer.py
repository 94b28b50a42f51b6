"""Load a model from any source, repair its special tokens, store it as safetensors, prove it unchanged."""

from __future__ import annotations

import json
import logging
import os
import re
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneutils.shared import device
from tuneutils.shared.artifact import Input, write_json
from tuneutils.shared.command import Run, Summary
from tuneutils.shared.errors import ExitCode, ToolError, require
from tuneutils.shared.sources import UNKNOWN, Resolved, resolve
from tuneutils.tools.model_import.cli import Params
from tuneutils.tools.model_import.gguf_tokenizer import restore_pre_tokenizer
from tuneutils.tools.model_import.special_tokens import ensure_pad_token

TINY = "builtin:tiny-llama"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
SHARD_SIZE = re.compile(r"\d+(\.\d+)?\s*[KMGT]?i?B", flags=re.IGNORECASE)
#: Keys that say where a file happened to be loaded from, not what it is.
TOKENIZER_NOISE = ("is_local", "local_files_only", "name_or_path", "tokenizer_file")
CONFIG_NOISE = ("_name_or_path", "_model_name_or_path", "name_or_path")
GENERATION_NOISE = ("_from_model_config", "output_attentions", "output_hidden_states")
#: Transformers' value for "no limit known".
NO_LIMIT = 1e29


@dataclass
class Loaded:
    """A model and its tokenizer in memory, with the manifest's entry for their source."""

    model: Any
    tokenizer: Any
    given: Input
    revision: str | None = None
    warning: str | None = None


def import_model(run: Run[Params]) -> Summary:
    """Import ``run.inputs[0]`` into the artifact ``run.output``."""
    params = run.params
    if not SHARD_SIZE.fullmatch(params.max_shard_size.strip()):
        raise ToolError(
            f"--max-shard-size {params.max_shard_size!r}: write a size such as 2GB", code=ExitCode.USAGE
        )
    source = one_source(run.inputs)
    resolved = None if source == TINY else resolve(source, "model")
    given = _tiny_input(params) if resolved is None else resolved.as_input("source", params.licence)
    with run.artifact("model", [given]) as art:
        if given.licence == UNKNOWN:
            run.log.warning("%s declares no licence; name it with --licence", source)
        _quieten(run)
        loaded = _load(resolved, given, params, run.seed)
        if loaded.warning:
            run.log.warning("%s: %s", source, loaded.warning)
        changes = ensure_pad_token(loaded.model, loaded.tokenizer)
        for change in changes:
            run.log.info("%s", change)
        _save(loaded, art.dir, params.max_shard_size)
        if params.verify:
            _require_same_logits(loaded.model, art.dir)
        facts = describe_model(loaded.model, loaded.tokenizer)
        art.licence, art.source = given.licence, given.source
        art.extra.update(model=facts, changes=changes, revision=loaded.revision)
        art.metrics = {"parameters": facts["parameters"]}
        run.log.info(
            "%s: %s parameters, %s, context %s, vocabulary %s, licence %s%s",
            facts["architecture"], f"{facts['parameters']:,}", facts["dtype"], facts["context"],
            facts["vocabulary"], given.licence, "; logits equal after reloading" if params.verify else "",
        )  # fmt: skip
    return {
        "output": run.output,
        "source": given.source,
        "sha256": given.sha256,
        "licence": given.licence,
        **facts,
    }


def one_source(inputs: tuple[str, ...]) -> str:
    if len(inputs) != 1:
        raise ToolError(f"takes one SOURCE, got {len(inputs)}", code=ExitCode.USAGE)
    return inputs[0]


def _tiny_input(params: Params) -> Input:
    from tuneutils.tools.model_import.tiny import recipe_sha256

    return Input("source", TINY, recipe_sha256(), None, params.licence or "Apache-2.0", TINY)


def _load(resolved: Resolved | None, given: Input, params: Params, seed: int) -> Loaded:
    if resolved is None:
        from tuneutils.tools.model_import.tiny import build

        model, tokenizer = build(seed)
        loaded = Loaded(model, tokenizer, given)
    else:
        path = resolved.path
        model, tokenizer, warning = _load_gguf(path) if path.is_file() else _load_folder(path)
        loaded = Loaded(model, tokenizer, given, resolved.revision, warning)
    if params.dtype_stored != "source":
        _convert(loaded.model, params.dtype_stored)
    loaded.model.eval()
    return loaded


def _convert(model: Any, dtype: str) -> None:
    """Convert the weights only: ``model.to`` would round the rotary frequencies too, which are not stored."""
    import torch

    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))


def _load_gguf(path: Path) -> tuple[Any, Any, str | None]:
    """Weights dequantised to float32; config, tokenizer and chat template from the GGUF metadata."""
    if not _is_gguf(path):
        raise ToolError(f"{path}: not a GGUF file; a model is a folder with safetensors, or one GGUF file")
    require("gguf", "gguf")
    import torch
    from transformers import AutoConfig, AutoTokenizer, GgufConfig

    where = {"gguf_file": path.name}
    try:
        config = AutoConfig.from_pretrained(path.parent, **where)
        model_class = _model_class(config)
        model, report = model_class.from_pretrained(
            path.parent,
            **where,
            config=config,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **where, config=config)
    except (ValueError, LookupError, NotImplementedError, OSError, struct.error) as exc:
        raise ToolError(f"{path}: this GGUF cannot be read: {_first_line(exc)}") from exc
    _require_complete(path, report)
    return model, tokenizer, restore_pre_tokenizer(tokenizer, path)


def _is_gguf(path: Path) -> bool:
    with open(path, "rb") as stream:
        return stream.read(4) == b"GGUF"


def _load_folder(path: Path) -> tuple[Any, Any, str | None]:
    """A Transformers folder with safetensors, in the precision that it is stored in."""
    if not (path / "config.json").is_file():
        raise ToolError(f"{path}: no config.json, so no model folder", code=ExitCode.MISSING_INPUT)
    if (path / "adapter_config.json").is_file():
        raise ToolError(f"{path}: a PEFT adapter, not a model; merge it with adapter-merge first")
    if not any(path.glob("*.safetensors")):
        pickled = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
        raise ToolError(
            f"{path}: only pickled weights ({', '.join(pickled)}); they are never loaded: use safetensors"
            if pickled
            else f"{path}: no *.safetensors"
        )
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(path)
        model, report = _model_class(config).from_pretrained(
            path, dtype="auto", use_safetensors=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (ValueError, KeyError, OSError, SafetensorError) as exc:
        raise ToolError(f"{path}: this model cannot be read: {_first_line(exc)}") from exc
    _require_complete(path, report)
    return model, tokenizer, None


def _model_class(config: Any) -> Any:
    """The class that ``config.architectures`` names, so that heads are neither lost nor invented."""
    import transformers

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    if config.architectures:
        raise ToolError(
            f"architecture {config.architectures[0]!r} is not in transformers {transformers.__version__}; "
            "code from a repository is not run",
            code=ExitCode.UNAVAILABLE,
        )
    return transformers.AutoModelForCausalLM


def _require_complete(path: Path, report: dict[str, Any]) -> None:
    """Transformers fills missing weights with random numbers; that is refused here."""
    missing = sorted(report.get("missing_keys") or ())
    wrong = sorted(str(k[0]) for k in report.get("mismatched_keys") or ())
    if missing or wrong:
        shown = ", ".join((missing + wrong)[:3])
        raise ToolError(f"{path}: {len(missing) + len(wrong)} weights are missing or misshapen ({shown}, …)")


def _save(loaded: Loaded, folder: Path, max_shard_size: str) -> None:
    model, tokenizer = loaded.model, loaded.tokenizer
    context = getattr(model.config, "max_position_embeddings", None)
    if context and tokenizer.model_max_length > NO_LIMIT:
        tokenizer.model_max_length = context
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    _strip(folder / "tokenizer_config.json", TOKENIZER_NOISE)
    _strip(folder / "config.json", CONFIG_NOISE)
    _strip(folder / "generation_config.json", GENERATION_NOISE)
    for path in folder.iterdir():
        path.chmod(0o644)


def _strip(path: Path, keys: tuple[str, ...]) -> None:
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, {k: v for k, v in content.items() if k not in keys})


def _require_same_logits(model: Any, folder: Path) -> None:
    """Reload what was written and compare the outputs on a fixed input; they must be equal.

    Raises:
        ToolError: they differ (1).
    """
    import torch

    again = type(model).from_pretrained(folder, dtype=model.dtype).eval()
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(1, 33).mul(7919).remainder(size)[None]
    with torch.inference_mode():
        before, after = model(input_ids=ids)[0], again(input_ids=ids)[0]
    difference = (before - after).abs().max().item()
    if difference != 0.0 or not torch.isfinite(before).all():
        raise ToolError(
            f"{folder}: reloaded logits differ by {difference}; the model was not stored",
            code=ExitCode.GATE_FAILED,
        )


def describe_model(model: Any, tokenizer: Any) -> dict[str, Any]:
    """What the model is, for the manifest and the log."""
    config = model.config
    return {
        "architecture": type(model).__name__,
        "parameters": model.num_parameters(),
        "dtype": device.dtype_name(model.dtype),
        "context": getattr(config, "max_position_embeddings", None),
        "vocabulary": model.get_input_embeddings().weight.shape[0],
        "tokens": len(tokenizer),
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "chat_template": tokenizer.chat_template is not None,
    }


def _first_line(exc: Exception) -> str:
    return " ".join(str(exc).split())[:200]


def _quieten(run: Run[Params]) -> None:
    """The libraries' own progress bars only on a terminal, their notices only with ``-v``."""
    if run.quiet or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers.utils import logging as library_logging

    if not run.verbose:
        library_logging.set_verbosity_error()
        library_logging.disable_progress_bar()
        logging.getLogger("gguf").setLevel(logging.ERROR)
