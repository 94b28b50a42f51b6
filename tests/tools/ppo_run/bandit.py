"""A one-step bandit as a language model: one prompt, one token, an optimum in closed form."""

from __future__ import annotations

from pathlib import Path

from tuneutils.shared import device  # noqa: F401

import torch  # isort: skip
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ("<pad>", "<eos>", "go", "a", "b", "c", "d", "e")
#: The reward of each answer; special tokens have no text.
REWARDS = {"": 0.0, "go": 0.3, "a": 1.0, "b": 0.8, "c": 0.5, "d": 0.2, "e": -0.5}


def reward(prompts: list[str], completions: list[str]) -> list[float]:
    assert set(prompts) <= {"go"}
    return [REWARDS[c] for c in completions]


def word_tokenizer(words: tuple[str, ...] = WORDS, pad: str = "<pad>") -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=pad, eos_token="<eos>")


def build_bandit(folder: Path, seed: int = 0) -> Path:
    """A one-layer Llama over ``WORDS`` whose first answer is far from uniform."""
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        torch.nn.init.normal_(model.lm_head.weight, std=0.15)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def answers(model: torch.nn.Module, temperature: float) -> torch.Tensor:
    """Probabilities ``(V,)`` of the answers to ``go``, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([[WORDS.index("go")]])).logits[0, -1].double()
    return (logits / temperature).softmax(-1)


def optimum(reference: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """``π_ref · exp(r / β) / Z`` (Rafailov et al. 2023, equation 4)."""
    r = torch.tensor([REWARDS["" if w.startswith("<") else w] for w in WORDS], dtype=torch.float64)
    return (reference.log() + r / kl_coef).softmax(-1)


def point(policy: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """KL from the reference in nats, and expected reward."""
    r = torch.tensor([REWARDS["" if w.startswith("<") else w] for w in WORDS], dtype=torch.float64)
    kl = torch.where(policy > 0, policy * (policy / reference).log(), 0.0).sum()
    return float(kl), float((policy * r).sum())


def best_of_n(reference: torch.Tensor, n: int) -> torch.Tensor:
    """The distribution of the best of ``n`` answers; answers of one reward share as in the reference."""
    r = [REWARDS["" if w.startswith("<") else w] for w in WORDS]
    made = torch.zeros_like(reference)
    for level in sorted(set(r)):
        tied = torch.tensor([x == level for x in r])
        below = reference[torch.tensor([x < level for x in r])].sum()
        share = (below + reference[tied].sum()) ** n - below**n
        made[tied] = share * reference[tied] / reference[tied].sum()
    return made
