"""``builtin:tiny-llama``: a small random Llama with a real tokenizer, for tests and dry runs."""

from __future__ import annotations

import hashlib
import json
from typing import Any

VOCABULARY = 512
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: What the tokenizer's merges are learnt from.
TEXT = """
A language model reads a text from left to right and gives a probability to each token that may come
next. Training makes the tokens that really came next more probable. The loss is the mean of their
negative logarithms, and the perplexity is its exponential. When a model that has read a large
corpus is trained further on a small one, we say that it is fine-tuned. To change all the weights
costs memory: the gradients and the two moments of the optimizer are each as large as the weights
themselves. A low-rank adapter changes a weight matrix by the product of two thin matrices, so that
only these have gradients. A prefix adds keys and values that every layer may attend to. A prompt
adds rows before the first token. A bottleneck adapter is a small network between two layers with a
residual connection around it. Which of them is best depends on the task, on the data and on the
time that there is, and the only way to know is to measure: the same data, the same number of steps,
and for each method the learning rate that suits it.

What is the capital of France? The capital of France is Paris. What is the largest planet? The
largest planet in the solar system is Jupiter. Who wrote Hamlet? Hamlet was written by William
Shakespeare. How many days are there in a week? There are seven days in a week: Monday, Tuesday,
Wednesday, Thursday, Friday, Saturday and Sunday. Name three colours. Red, green and blue. How do
you make tea? Boil some water, pour it over the leaves, and wait for about four minutes. Write a
short sentence about the sea. The sea was calm and grey, and the boats had not yet gone out. Is
water heavier than ice? Yes, and that is why ice floats on water.

The user asks and the assistant answers. The system may say how the answer should be. If the
question is not clear, the assistant should ask what was meant, rather than guess. The first line of
a file is line one. A record is a line, and each record has a prompt and a completion, or a list of
messages, or just a text. The numbers from one to twelve are 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and
12.
"""


def recipe_sha256() -> str:
    """SHA-256 of all that the model is made from."""
    recipe = json.dumps([CONFIG, SPECIAL, CHAT_TEMPLATE, TEXT], sort_keys=True)
    return hashlib.sha256(recipe.encode()).hexdigest()


def build(seed: int) -> tuple[Any, Any]:
    """The model, with weights that depend on ``seed`` alone, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    config = LlamaConfig(
        **CONFIG,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model, tokenizer


def build_tokenizer() -> Any:
    """Byte-level BPE with merges learnt from ``TEXT``, ChatML, and a pad token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TEXT.strip().splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[3],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONFIG["max_position_embeddings"],
    )
