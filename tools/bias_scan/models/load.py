"""What a MODEL of the command line is, and how it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tuneutils.shared.errors import ToolError
from tuneutils.shared.models import Loaded, load_config, load_model, resolve

VECTOR_SUFFIXES = (".vec", ".txt", ".vec.gz", ".txt.gz")
LANGUAGE = ("causal", "masked")


def kind_of(path: str, *, trust_remote_code: bool = False) -> str:
    """``causal``, ``masked``, ``classifier``, ``reward`` (one label) or ``vectors`` (word vectors)."""
    if Path(path).is_file() and path.endswith(VECTOR_SUFFIXES):
        return "vectors"
    ref = resolve(path)
    if ref.kind == "adapter":
        adapter = json.loads((Path(ref.path) / "adapter_config.json").read_text(encoding="utf-8"))
        if adapter.get("task_type") == "SEQ_CLS" or "score" in (adapter.get("modules_to_save") or ()):
            return "reward"
    if ref.root.kind == "gguf":
        return "causal"
    config = load_config(ref, trust_remote_code=trust_remote_code)
    name = next(iter(getattr(config, "architectures", None) or ()), "")
    if name.endswith("ForSequenceClassification"):
        return "reward" if config.num_labels == 1 else "classifier"
    return "masked" if name.endswith(("ForMaskedLM", "ForPreTraining")) else "causal"


def load(path: str, kind: str, *, device: str, dtype: str, batch_tokens: int, trust_remote_code: bool) -> Any:
    """A model of ``kind``, ready to score: ``Causal``, ``Masked``, ``Reward``, ``Classifier`` or vectors.

    Raises:
        ToolError: it cannot be loaded as such.
    """
    if kind == "vectors":
        from tuneutils.tools.bias_scan.models.vectors import read_vectors

        return read_vectors(path)
    from tuneutils.tools.bias_scan.models import predictors, scorers

    if kind == "causal":
        loaded = load_model(path, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        return scorers.Causal(loaded, batch_tokens)
    if kind == "reward":
        return predictors.load_reward(path, device, dtype, trust_remote_code)
    auto = "AutoModelForMaskedLM" if kind == "masked" else "AutoModelForSequenceClassification"
    loaded = load_encoder(path, auto, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    if kind == "classifier":
        return predictors.Classifier(loaded, batch_tokens)
    if loaded.tokenizer.mask_token_id is None:
        raise ToolError(f"{path}: a masked model whose tokenizer has no mask token")
    return scorers.Masked(loaded, batch_tokens)


def load_encoder(path: str, auto: str, *, device: str, dtype: str, trust_remote_code: bool) -> Loaded:
    """A masked model or classifier with its own tokenizer, which need have no EOS token."""
    import transformers
    from safetensors import SafetensorError
    from transformers.utils import logging as hf_logging

    from tuneutils.shared.device import resolve_device, resolve_dtype

    hf_logging.disable_progress_bar()
    ref = resolve(path)
    if ref.kind not in ("folder", "hub"):
        raise ToolError(f"{path}: a masked model or classifier is taken as a folder or Hub id")
    where = resolve_device(device)
    precision = resolve_dtype(dtype, where)
    given: dict[str, Any] = {"revision": ref.revision, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(ref.path, **given)
        model, info = getattr(transformers, auto).from_pretrained(
            ref.path, dtype=precision, use_safetensors=True, output_loading_info=True, **given
        )
    except (OSError, ValueError, KeyError, SafetensorError) as exc:
        raise ToolError(f"{path}: cannot load: {' '.join(str(exc).split())[:300]}") from exc
    if missing := sorted(info["missing_keys"]):
        raise ToolError(f"{path}: {len(missing)} weights are not in its files, such as {missing[0]}")
    if not tokenizer.is_fast:
        raise ToolError(f"{path}: its tokenizer has no fast form, which tells where tokens stand in a text")
    if tokenizer.pad_token_id is None:
        raise ToolError(f"{path}: its tokenizer has no padding token")
    return Loaded(model.eval().to(where), tokenizer, ref, where, precision)
