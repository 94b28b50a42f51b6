"""The pre-tokenizer that a GGUF file names.

GGUF stores a byte-level BPE's pre-tokenizer only by name (``tokenizer.ggml.pre``). Transformers does not read
the name and splits as GPT-2 does; where the model was trained otherwise, white space before digits, for one,
comes out as other tokens. The patterns are those of llama.cpp's ``src/llama-vocab.cpp``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_LETTERS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = {"default", "gpt-2"}
#: GPT-2's pattern with every digit by itself.
SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"}
PATTERNS = {
    "llama-bpe": _LETTERS + r"\p{N}{1,3}" + _REST,
    "qwen2": _LETTERS + r"\p{N}" + _REST,
}


def restore_pre_tokenizer(tokenizer: Any, path: Path) -> str | None:
    """Set the fast tokenizer's pre-tokenizer to the one that ``path`` names.

    Returns:
        A warning if the name is not known here, else None.
    """
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    if "tokenizer.ggml.model" not in fields or fields["tokenizer.ggml.model"].contents() != "gpt2":
        return None
    name = fields["tokenizer.ggml.pre"].contents() if "tokenizer.ggml.pre" in fields else "default"
    made = pre_tokenizer(name)
    if made is None:
        return (
            None
            if name in GPT2
            else (f"pre-tokenizer {name!r} is not known; some text may be split otherwise than in training")
        )
    tokenizer.backend_tokenizer.pre_tokenizer = made
    return None


def pre_tokenizer(name: str) -> Any:
    """The pre-tokenizer of that name; None for GPT-2's own and for unknown ones."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if name in SINGLE_DIGITS:
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    if name in PATTERNS:
        split = Split(Regex(PATTERNS[name]), behavior="isolated")
        return Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    return None
