"""A base model as files on disk, and what its architecture says of them, without loading weights."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from tuneutils.shared.errors import ToolError
from tuneutils.shared.models import ModelRef
from tuneutils.tools.adapter_merge.tensorfile import Spec, TensorFile

INDEX = "model.safetensors.index.json"
COPIED = (".json", ".jinja", ".txt", ".model")
TOKENIZER = ("token", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "spiece")


def local_folder(ref: ModelRef) -> Path:
    """The base's folder; a Hub id is downloaded into the Hub's cache.

    Raises:
        ToolError: the base is a GGUF file, or is itself stored quantised.
    """
    if ref.kind == "gguf":
        raise ToolError(f"{ref.given}: a GGUF file is no base to merge into; import it first: model-import")
    if ref.kind == "hub":
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", *(f"*{s}" for s in COPIED)]
        folder = Path(snapshot_download(ref.path, revision=ref.revision, allow_patterns=patterns))
    else:
        folder = Path(ref.path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method", "quantised")
        raise ToolError(
            f"{ref.given}: its weights are stored quantised ({method}); merging into them ruins quality: "
            "name the full-precision model with --model"
        )
    return folder


@dataclass(frozen=True)
class Structure:
    """What the model class says, from a copy without data.

    Attributes:
        conv1d: modules that store their weight as (in, out).
        tied: parameter → the one that it shares its data with.
        parameters: names of all parameters, tied ones included.
        embedding: the input embedding's module.
        prefix: the base model's attribute (``model``, ``transformer``), which older files leave out.
    """

    conv1d: frozenset[str]
    tied: dict[str, str]
    parameters: frozenset[str]
    embedding: str
    prefix: str


def structure(folder: Path) -> Structure:
    """Build the model on the meta device and read its structure."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as exc:
        raise ToolError(f"{folder}: no causal language model: {' '.join(str(exc).split())[:200]}") from exc
    names = {id(module): name for name, module in model.named_modules()}
    return Structure(
        frozenset(n for n, m in model.named_modules() if isinstance(m, Conv1D)),
        dict(model.all_tied_weights_keys),
        frozenset(n for n, _ in model.named_parameters(remove_duplicate=False)),
        names[id(model.get_input_embeddings())],
        model.base_model_prefix,
    )


class Base:
    """The tensors of a base model's shards, by the names that the model class uses."""

    def __init__(self, ref: ModelRef) -> None:
        self.ref = ref
        self.folder = local_folder(ref)
        self.structure = structure(self.folder)
        self._stack = ExitStack()
        self.files = [self._stack.enter_context(TensorFile(path)) for path in _shards(self.folder)]
        self.where = {key: file for file in self.files for key in file.specs}
        self._keys = self._model_names()

    def _model_names(self) -> dict[str, str]:
        """Parameter name → key in the files: the same, or without the base model's prefix."""
        found = {}
        for name in self.structure.parameters:
            short = name.removeprefix(f"{self.structure.prefix}.")
            key = name if name in self.where else short if short in self.where else None
            if key is not None:
                found[name] = key
        return found

    def unknown_layout(self) -> bool:
        """Whether the files name their tensors otherwise than the model does (Transformers converts them)."""
        needed = self.structure.parameters - set(self.structure.tied)
        return not needed <= set(self._keys)

    def key(self, parameter: str) -> str | None:
        """The file's key of a parameter; a tied one has its partner's."""
        tied = self.structure.tied.get(parameter)
        return self._keys.get(tied if tied is not None else parameter)

    def spec(self, key: str) -> Spec:
        return self.where[key].specs[key]

    def vocab_size(self) -> int:
        """Rows of the input embedding."""
        key = self._keys.get(f"{self.structure.embedding}.weight")
        return self.spec(key).shape[0] if key is not None else 1 << 31

    def stored_dtype(self) -> torch.dtype:
        """The dtype of most floating-point elements."""
        counts: dict[torch.dtype, int] = {}
        for key, file in self.where.items():
            spec = file.specs[key]
            if spec.dtype.is_floating_point:
                counts[spec.dtype] = counts.get(spec.dtype, 0) + spec.nbytes
        return max(counts, key=lambda d: counts[d])

    def __enter__(self) -> Base:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    return [folder / "model.safetensors"]


def copy_companions(base: Path, adapter: Path, to: Path) -> None:
    """Copy configuration and tokenizer; the adapter's tokenizer where it brings one."""
    own_tokenizer = (adapter / "tokenizer_config.json").is_file()
    for path in sorted(base.iterdir()):
        skipped = path.name in (INDEX, "artifact.json", "adapter_config.json")
        licence = path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
        if path.is_file() and not skipped and (path.suffix in COPIED or licence):
            if own_tokenizer and path.name.startswith(TOKENIZER):
                continue
            (to / path.name).write_bytes(path.read_bytes())
    if own_tokenizer:
        copy_tokenizer(adapter, to)


def copy_tokenizer(folder: Path, to: Path) -> None:
    """Copy the tokenizer's files alone."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name.startswith(TOKENIZER) and path.suffix in COPIED:
            (to / path.name).write_bytes(path.read_bytes())


def write_config(folder: Path, changes: dict[str, Any]) -> None:
    """Change fields of a copied ``config.json``, in the text model's own section too where it has them."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.update(changes)
    for section in config.values():
        if isinstance(section, dict):
            section.update({k: v for k, v in changes.items() if k in section})
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
