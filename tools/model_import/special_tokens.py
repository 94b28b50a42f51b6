"""A pad token that is not the end-of-sequence token.

Where they are one, masking the padding out of the loss also masks the end of the text, and the tuned model
never learns to stop.
"""

from __future__ import annotations

import re
from typing import Any

NEW_PAD = "<|pad|>"
#: Names of special tokens that exist for padding or for nothing, best first.
PREFERRED = (r"pad", r"reserved|unused|extra_id|dummy", r"empty")


def ensure_pad_token(model: Any, tokenizer: Any) -> list[str]:
    """Give the tokenizer a pad token of its own and the model's configurations its id.

    A special token that the vocabulary already has and nothing uses is taken; without one ``<|pad|>`` is
    added, and the embedding grows only if its rows are all in use.

    Returns:
        One line for each change, none if the pad token was right already.
    """
    changes = []
    if tokenizer.pad_token is None or tokenizer.pad_token_id in _eos_ids(model, tokenizer):
        before = tokenizer.pad_token
        token = unused_special_token(tokenizer)
        if token is not None:
            tokenizer.pad_token = token
        else:
            tokenizer.add_special_tokens({"pad_token": NEW_PAD})
            changes += _grow_embedding(model, len(tokenizer))
        changes.insert(0, f"pad token {before!r} → {tokenizer.pad_token!r} (id {tokenizer.pad_token_id})")
    _set_ids(model, tokenizer)
    return changes


def unused_special_token(tokenizer: Any) -> str | None:
    """An existing special token that has no role and does not stand in the chat template."""
    taken = {str(t) for name, t in tokenizer.special_tokens_map.items() if isinstance(t, str)}
    template = str(tokenizer.chat_template)
    free = [
        token.content
        for _, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and token.content not in taken and token.content not in template
    ]
    for pattern in PREFERRED:
        for content in free:
            if re.search(pattern, content, flags=re.IGNORECASE):
                return content
    return None


def _eos_ids(model: Any, tokenizer: Any) -> set[int]:
    configured = model.config.eos_token_id
    many = configured if isinstance(configured, list) else [configured]
    return {i for i in [tokenizer.eos_token_id, *many] if i is not None}


def _grow_embedding(model: Any, tokens: int) -> list[str]:
    """New rows are the mean of the old ones: a zero row would have logit 0 and win over likely tokens."""
    import torch

    rows = model.get_input_embeddings().weight.shape[0]
    if tokens <= rows:
        return []
    model.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        for layer in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
            layer.weight[rows:] = layer.weight[:rows].mean(dim=0)
    return [f"vocabulary {rows} → {tokens} rows"]


def _set_ids(model: Any, tokenizer: Any) -> None:
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is None:
            continue
        config.pad_token_id = tokenizer.pad_token_id
        for name in ("bos_token_id", "eos_token_id"):
            if getattr(config, name, None) is None:
                setattr(config, name, getattr(tokenizer, name))
