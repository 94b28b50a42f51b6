"""A fast tokenizer as GGUF metadata: byte-level BPE (``gpt2``) and SentencePiece-like BPE (``llama``)."""

from __future__ import annotations

import json
from typing import Any

from tuneutils.shared.errors import ToolError
from tuneutils.shared.weights import Weights

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|",
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|",
)
#: Regular expression of a ``Split`` → llama.cpp's name (``src/llama-vocab.cpp``).
SPLITS = {
    contraction + _LETTERS + digits + _REST: name
    for contraction in _CONTRACTIONS
    for digits, name in ((r"\p{N}{1,3}", "llama-bpe"), (r"\p{N}", "qwen2"))
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def add_tokenizer(writer: Any, tokenizer: Any, config: Any, weights: Weights) -> None:
    """Write the vocabulary, merges, special tokens and chat template.

    Raises:
        ToolError: a kind of tokenizer that llama.cpp has no equal for.
    """
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    model = inner["model"]
    if model["type"] != "BPE":
        raise ToolError(f"{weights.given}: a {model['type']} tokenizer; GGUF needs BPE")
    pieces = bool(model.get("byte_fallback"))
    tokens, types = _tokens(tokenizer, config.vocab_size, pieces, model.get("unk_token"))
    merges = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
    if pieces:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_adds_space(inner))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer(inner, weights.given))
        writer.add_token_merges([" ".join(part.replace(" ", "Ġ") for part in pair) for pair in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_special(writer, tokenizer, weights)
    template = tokenizer.chat_template
    if template is not None:
        writer.add_chat_template(template if isinstance(template, str) else _templates(template))


def _templates(named: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "template": text} for name, text in named.items()]


def _tokens(tokenizer: Any, size: int, pieces: bool, unknown: str | None) -> tuple[list[str], list[int]]:
    """Every row of the embedding: its token, and llama.cpp's type of token."""
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for index in range(size):
        token = by_id.get(index)
        if token is None:
            tokens.append(f"[PAD{index}]")
            types.append(UNUSED)
            continue
        kind = NORMAL
        if index in added:
            kind = CONTROL if added[index].special else USER_DEFINED
            token = token if kind == CONTROL else token.replace("▁", " ")
        if pieces and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kind = BYTE
        if pieces and token == unknown:
            kind = UNKNOWN
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Minus the rank of the first merge that makes a token, as in SentencePiece's own BPE models."""
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(merges):
        rank.setdefault(left + right, i)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _adds_space(inner: dict[str, Any]) -> bool:
    """Whether a space is put before the text: Prepend in the normalizer, or a Metaspace that does."""
    steps = [
        *_steps(inner.get("normalizer"), "normalizers"),
        *_steps(inner.get("pre_tokenizer"), "pretokenizers"),
    ]
    return any(
        s["type"] == "Prepend" or (s["type"] == "Metaspace" and s.get("prepend_scheme") != "never")
        for s in steps
    )


def _steps(part: dict[str, Any] | None, children: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return list(part[children]) if part["type"] == "Sequence" else [part]


def pre_tokenizer(inner: dict[str, Any], given: str) -> str:
    """llama.cpp's name for how a byte-level BPE splits text before merging.

    Raises:
        ToolError: no name here stands for this split.
    """
    steps = _steps(inner.get("pre_tokenizer"), "pretokenizers")
    kinds = [s["type"] for s in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if (
        kinds == ["Digits", "ByteLevel"]
        and steps[0].get("individual_digits")
        and steps[1].get("use_regex", True)
    ):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        name = SPLITS.get(steps[0]["pattern"].get("Regex", ""))
        if name is not None and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]:
            return name
    raise ToolError(
        f"{given}: llama.cpp has no equal known here for the pre-tokenizer {' + '.join(kinds) or 'none'}"
    )


def _add_special(writer: Any, tokenizer: Any, weights: Weights) -> None:
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        index = getattr(tokenizer, f"{name}_token_id", None)
        if index is not None:
            add(index)
    ends = end_tokens(tokenizer, weights)
    others = [i for i in ends if i != tokenizer.eos_token_id]
    if others:
        writer.add_eot_token_id(others[0])
    plain = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a")
    writer.add_add_bos_token(len(full) > len(plain) and full[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(full) > len(plain) and full[-1] == tokenizer.eos_token_id)


def end_tokens(tokenizer: Any, weights: Weights) -> list[int]:
    """The tokens that end an answer: the tokenizer's EOS and those of the generation config."""
    path = weights.folder / "generation_config.json"
    configured = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    several = configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys(i for i in [tokenizer.eos_token_id, *several] if i is not None))
