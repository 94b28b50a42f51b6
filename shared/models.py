"""Loading models and tokenizers by whatever names them: artifact, folder, GGUF file, adapter, Hub id.

Safetensors (or GGUF) only; nothing is unpickled; remote code never runs unless the caller allows it.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneutils.shared.artifact import (
    MANIFEST,
    Input,
    Manifest,
    describe_input,
    load_manifest,
)
from tuneutils.shared.device import resolve_device, resolve_dtype
from tuneutils.shared.errors import ExitCode, ToolError, require
from tuneutils.shared.four_bit import bnb_config, check_4bit_rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")

#: Formats of quantized weights: what ``config.json`` calls them → (package that reads them, our extra).
STORED_FORMATS = {
    "bitsandbytes": ("bitsandbytes", "quantize"),
    "compressed-tensors": ("compressed_tensors", "quantize"),
}


@dataclass(frozen=True)
class ModelRef:
    """What a model's name stands for.

    Attributes:
        given: as the user named it.
        kind: ``folder``, ``gguf``, ``adapter`` or ``hub``.
        path: the folder or file, or the Hub id without its revision.
        revision: of a Hub id.
        base: the model under an adapter.
        manifest: the artifact's manifest, where there is one.
    """

    given: str
    kind: str
    path: str
    revision: str | None = None
    base: ModelRef | None = None
    manifest: Manifest = field(default_factory=dict)

    @property
    def root(self) -> ModelRef:
        """The model at the bottom: itself, or an adapter's base."""
        return self.base.root if self.base else self

    @property
    def quantization(self) -> str | None:
        """The 4-bit scheme under which an adapter was trained, from its manifest."""
        return self.manifest.get("quantization")


def resolve(given: str) -> ModelRef:
    """Find out what a model's name stands for, without loading any library.

    Raises:
        ToolError: 66 nothing there; 65 not loadable, pickled weights, or an adapter whose base differs.
    """
    path = Path(given)
    if path.is_file():
        if path.suffix == ".gguf":
            return ModelRef(given, "gguf", given)
        raise ToolError(f"{given}: a file that is no .gguf; name the model's folder")
    if path.is_dir():
        return _resolve_folder(given, path)
    if HUB_ID.match(given) and not given.startswith("."):
        name, _, revision = given.partition("@")
        return ModelRef(given, "hub", name, revision or None)
    hint = "; import it first: model-import " + given if ":" in given else ""
    raise ToolError(f"{given}: no such model folder, GGUF file or Hub id{hint}", code=ExitCode.MISSING_INPUT)


def _resolve_folder(given: str, path: Path) -> ModelRef:
    manifest = load_manifest(path) if (path / MANIFEST).is_file() else {}
    if (path / "adapter_config.json").is_file():
        check_safetensors(path, "adapter_model")
        return ModelRef(given, "adapter", given, base=_adapter_base(path, manifest), manifest=manifest)
    if not (path / "config.json").is_file():
        inside = sorted(p.name for p in path.glob("*.gguf"))
        if len(inside) == 1:
            return ModelRef(given, "gguf", str(path / inside[0]), manifest=manifest)
        raise ToolError(f"{given}: no model here (no config.json, adapter_config.json or single .gguf)")
    check_safetensors(path, "model")
    return ModelRef(given, "folder", given, manifest=manifest)


def check_safetensors(folder: Path, stem: str) -> None:
    """Refuse a folder whose weights are pickled or absent."""
    if any(folder.glob(f"{stem}*.safetensors")):
        return
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickled:
        raise ToolError(
            f"{folder / pickled[0]}: pickled weights are refused, since loading them can run code; "
            "convert them to safetensors where you trust them"
        )
    raise ToolError(f"{folder}: no {stem}*.safetensors", code=ExitCode.MISSING_INPUT)


def _adapter_base(path: Path, manifest: Manifest) -> ModelRef:
    """The base of an adapter, checked by hash against the manifest where there is one."""
    recorded = next((i for i in manifest.get("inputs", []) if i["role"] == "model"), None)
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    given = recorded["path"] if recorded else config.get("base_model_name_or_path")
    if not given:
        raise ToolError(f"{path}: the adapter does not name its base model")
    candidates = [given, str(path / given)]
    for candidate in candidates:
        if Path(candidate).exists():
            given = candidate
            break
    else:
        if not HUB_ID.match(given):
            raise ToolError(
                f"{path}: its base model {given!r} is not there; run from the folder it was made in",
                code=ExitCode.MISSING_INPUT,
            )
    base = resolve(given)
    if base.kind == "adapter":
        raise ToolError(f"{path}: its base {given} is itself an adapter; merge that first (adapter-merge)")
    if recorded and Path(given).exists() and describe_input("model", given).sha256 != recorded["sha256"]:
        raise ToolError(
            f"{path}: its base {given} has changed since the adapter was made; train it again on this base"
        )
    return base


def check_base(adapter: ModelRef, base: ModelRef, whose: str) -> None:
    """Require that an adapter stands on this base.

    Args:
        whose: where the other base comes from, for the message.

    Raises:
        ToolError: exit 65, it stands on another.
    """
    ours, theirs = (
        f"{ref.path}@{ref.revision}" if ref.kind == "hub" else str(Path(ref.path).resolve())
        for ref in (adapter.root, base.root)
    )
    if ours != theirs:
        raise ToolError(f"{adapter.given}: its base {adapter.root.given} is not {base.root.given}, {whose}")


def model_input(given: str, role: str = "model") -> Input:
    """A model as an input of a manifest; a Hub id is identified by the commit it resolves to."""
    ref = resolve(given)
    if ref.kind != "hub":
        return describe_input(role, given)
    from huggingface_hub import HfApi

    info = HfApi().model_info(ref.path, revision=ref.revision)
    return Input(
        role, f"{ref.path}@{info.sha}", info.sha or "", kind="model", source=f"hf:{ref.path}@{info.sha}"
    )


@dataclass
class Loaded:
    """A model ready to run with its tokenizer.

    Attributes:
        model: a Transformers model, or a ``PeftModel`` over one.
        pad_id: a padding token's id, never the EOS token's.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    ref: ModelRef
    device: torch.device
    dtype: torch.dtype

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)


def load_model(
    given: str,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    quantization: str | None = "as-trained",
    trust_remote_code: bool = False,
) -> Loaded:
    """Load a causal language model and its tokenizer for inference; training starts from the same.

    Args:
        given: artifact, folder, GGUF file, adapter folder, or Hub id (``org/name@revision``).
        quantization: a key of ``four_bit.BNB_SCHEMES``, None for full precision, or ``as-trained``: the
            scheme in an adapter's manifest, if any.
    """
    import torch

    ref = resolve(given)
    where = resolve_device(device)
    precision = dtype if isinstance(dtype, torch.dtype) else resolve_dtype(dtype, where)
    scheme = ref.quantization if quantization == "as-trained" else quantization
    model = load_base(ref.root, where, precision, scheme, trust_remote_code)
    if ref.kind == "adapter":
        model = load_adapter(model, ref.path)
    tokenizer = load_tokenizer(ref, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= model.config.vocab_size:
        raise ToolError(f"{given}: the tokenizer's pad token lies outside the model's vocabulary")
    return Loaded(model.eval(), tokenizer, ref, where, precision)


def load_base(
    ref: ModelRef,
    device: torch.device,
    dtype: torch.dtype,
    scheme: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The Transformers model of a non-adapter reference, in eval mode, on its device."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    stored = stored_format(ref)
    if stored in STORED_FORMATS:
        require(*STORED_FORMATS[stored])
    kwargs: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if scheme is not None:
        kwargs["quantization_config"] = bnb_config(scheme, dtype)
    if device.type == "cuda":
        kwargs["device_map"] = {"": device}
    if ref.kind == "gguf":
        kwargs.update(_gguf_kwargs(ref))
        source = str(Path(ref.path).parent)
    else:
        kwargs.update(use_safetensors=True, revision=ref.revision)
        source = ref.path
    try:
        model, info = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **kwargs)
    except (OSError, ValueError, KeyError, SafetensorError) as exc:
        raise ToolError(f"{ref.given}: cannot load: {' '.join(str(exc).split())[:300]}") from exc
    if scheme is not None or stored == "bitsandbytes":
        check_4bit_rows(model, ref.given, device)
    if missing := sorted(info["missing_keys"]):
        raise ToolError(f"{ref.given}: {len(missing)} weights are not in its files, such as {missing[0]}")
    return model.eval() if device.type == "cuda" else model.eval().to(device)


def stored_format(ref: ModelRef) -> str | None:
    """What a folder's ``config.json`` says its weights are quantized by; None for full precision."""
    path = Path(ref.path) / "config.json"
    if ref.kind != "folder" or not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8")).get("quantization_config") or {}
    return str(config["quant_method"]) if "quant_method" in config else None


def _gguf_kwargs(ref: ModelRef) -> dict[str, Any]:
    require("gguf", "gguf")
    from transformers import GgufConfig

    return {"gguf_file": Path(ref.path).name, "quantization_config": GgufConfig(dequantize=True)}


def load_adapter(model: PreTrainedModel, folder: str, name: str = "default") -> Any:
    """Put a PEFT adapter (ours or PEFT's own) on its base.

    Raises:
        ToolError: the adapter's shapes are not those of this base.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    from tuneutils.shared import adapters  # noqa: F401 - registers our tuners with PEFT

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys")
            return PeftModel.from_pretrained(model, folder, adapter_name=name)
    except (RuntimeError, ValueError, KeyError, SafetensorError, UserWarning) as exc:
        reason = " ".join(str(exc).split())[:200]
        raise ToolError(f"{folder}: does not fit its base model: {reason}") from exc


def load_tokenizer(ref: ModelRef | str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a pad token that is not its EOS token."""
    from transformers import AutoTokenizer

    ref = resolve(ref) if isinstance(ref, str) else ref
    at = ref
    if ref.kind == "adapter" and not (Path(ref.path) / "tokenizer_config.json").is_file():
        at = ref.root
    kwargs: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    source = at.path
    if at.kind == "gguf":
        require("gguf", "gguf")
        kwargs["gguf_file"] = Path(at.path).name
        source = str(Path(at.path).parent)
    elif at.kind == "hub":
        kwargs["revision"] = at.revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
    except (OSError, ValueError, KeyError) as exc:
        raise ToolError(f"{at.given}: no tokenizer: {' '.join(str(exc).split())[:200]}") from exc
    if tokenizer.eos_token_id is None:
        raise ToolError(f"{at.given}: its tokenizer has no EOS token, so no model can learn to stop")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = own_pad_token(tokenizer)
    return tokenizer


def own_pad_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """A special token of the vocabulary that can serve as padding because nothing else uses it.

    Padding with EOS would mask EOS out of the loss, and the model would never learn to stop.

    Raises:
        ToolError: there is none; ``model-import`` adds one.
    """
    used = {
        value
        for name in ("bos_token", "eos_token", "sep_token", "cls_token", "mask_token")
        if (value := getattr(tokenizer, name, None))
    }
    template = str(getattr(tokenizer, "chat_template", "") or "")
    special = [str(t) for _, t in sorted(tokenizer.added_tokens_decoder.items()) if t.special]
    free = [t for t in special if t not in used and t not in template]
    preferred = [t for t in free if "pad" in t.lower()] + [t for t in free if t != tokenizer.unk_token]
    if not preferred:
        raise ToolError("the tokenizer has no token to pad with but EOS; import the model with model-import")
    return next((t for t in preferred if "pad" in t.lower() or "empty" in t.lower()), preferred[-1])


def load_config(ref: ModelRef, *, trust_remote_code: bool = False) -> Any:
    """The Transformers config of a model, or of an adapter's base, without its weights."""
    from transformers import AutoConfig

    kwargs: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    root = ref.root
    source = root.path
    if root.kind == "gguf":
        require("gguf", "gguf")
        kwargs["gguf_file"] = Path(root.path).name
        source = str(Path(root.path).parent)
    elif root.kind == "hub":
        kwargs["revision"] = root.revision
    try:
        return AutoConfig.from_pretrained(source, **kwargs)
    except (OSError, ValueError, KeyError) as exc:
        raise ToolError(f"{ref.given}: cannot load: {' '.join(str(exc).split())[:300]}") from exc


def context_length(ref: ModelRef, *, trust_remote_code: bool = False) -> int | None:
    """The longest sequence, in tokens, that a model's positions were made for; None where it has no limit."""
    config = load_config(ref, trust_remote_code=trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def parameter_counts(model: Any) -> dict[str, int]:
    """``{"total": …, "trainable": …}`` parameters; 4-bit weights count as what they stand for."""
    total = trainable = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * parameter.element_size()
        total += count
        trainable += count if parameter.requires_grad else 0
    return {"total": total, "trainable": trainable}
