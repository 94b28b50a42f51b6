"""Tiny models for bias tests: a masked one beside the session's causal one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import PROVERBS, tiny_tokenizer

WORDS = [
    "he",
    "she",
    "they",
    "the",
    "a",
    "doctor",
    "nurse",
    "said",
    "that",
    "was",
    "black",
    "white",
    "old",
    "young",
    "poor",
    "rich",
    "man",
    "woman",
    "is",
    "not",
    "kind",
    "of",
]


def word_tokenizer() -> Any:
    """A WordPiece tokenizer with BERT's special tokens over a few words and all letters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [chr(c) for c in range(97, 123)]
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *WORDS,
        *letters,
        *(f"##{c}" for c in letters),
        ".",
        ",",
    ]
    ids = {w: i for i, w in enumerate(dict.fromkeys(vocabulary))}
    made = Tokenizer(models.WordPiece(vocab=ids, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip


def build_masked(folder: Path, seed: int = 0, architecture: str = "Bert") -> Path:
    """Save a random masked model of two layers, of BERT's, RoBERTa's or DistilBERT's make."""
    import torch
    import transformers

    tokenizer = word_tokenizer()
    fields = {"vocab_size": len(tokenizer), "pad_token_id": 0, "max_position_embeddings": 64}
    if architecture == "DistilBert":
        fields |= {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
    else:
        fields |= {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
    config = getattr(transformers, f"{architecture}Config")(**fields, initializer_range=0.3)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{architecture}ForMaskedLM")(config).eval()
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return folder


def build_classifier(folder: Path, labels: int) -> Path:
    """Save a random causal classifier with the tiny causal tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, num_labels=labels, pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = LlamaForSequenceClassification(config)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def masked_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_masked(tmp_path_factory.mktemp("masked") / "masked")


@pytest.fixture(scope="session")
def masked(masked_model: Path) -> Any:
    """The masked model as a scorer."""
    return scorer(masked_model)


@pytest.fixture(scope="session")
def causal(tiny_model: Path) -> Any:
    """The causal model as a scorer."""
    return scorer(tiny_model)


def scorer(path: Path) -> Any:
    from tuneutils.tools.bias_scan.models import load

    return load.load(
        str(path),
        load.kind_of(str(path)),
        device="cpu",
        dtype="float32",
        batch_tokens=256,
        trust_remote_code=False,
    )


SENTENCES = [*PROVERBS[:4], "He said that she was a doctor.", "She was old, poor and kind.", "A."]
