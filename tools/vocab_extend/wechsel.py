"""What WECHSEL needs of two languages: static embeddings of tokens in one space.

Minixhofer et al. 2022 (arXiv 2112.06598): word embeddings of each language, the target's turned onto the
source's by translations (orthogonal Procrustes), and those of tokens as means over the words that they occur
in, weighted by how often (section 3, for word embeddings without subword information).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

# isort: split
import torch
from tokenizers import Tokenizer
from torch import Tensor

from tuneutils.shared.errors import ToolError
from tuneutils.tools.vocab_extend.static import static_embeddings

WORD = re.compile(r"[^\W\d_]+")
LEAST_PAIRS = 20


def words_of(text: str) -> list[str]:
    """Lower-cased words of letters."""
    return WORD.findall(text.lower())


def token_spaces(
    old: Tokenizer,
    new: Tokenizer,
    source: Sequence[str],
    target: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    *,
    dimensions: int,
    window: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Embeddings of the old tokenizer's tokens and, in the same space, of the extended one's.

    Args:
        source, target: texts in the known language and in the new one.
        pairs: translations ``(source, target)``, of words or sentences.

    Returns:
        ``(old, dimensions)`` and ``(new, dimensions)``, of unit length or zero.

    Raises:
        ToolError: too few translations of words that both texts have (65).
    """
    words, spaces = [], []
    for texts in (source, target):
        vocabulary, embeddings = word_embeddings(texts, dimensions, window, seed)
        words.append(vocabulary)
        spaces.append(embeddings)
    known = [(s, t) for s, t in translations(pairs) if s in words[0] and t in words[1]]
    if len(known) < LEAST_PAIRS:
        raise ToolError(
            f"--dictionary has {len(known)} translations of words in both texts, of {len(pairs)} pairs; "
            f"wechsel needs {LEAST_PAIRS}"
        )
    turn = procrustes(spaces[1][[words[1][t] for _, t in known]], spaces[0][[words[0][s] for s, _ in known]])
    spaces[1] = spaces[1] @ turn
    made = [
        token_embeddings(tokenizer, texts, vocabulary, space)
        for tokenizer, texts, vocabulary, space in zip(
            (old, new), (source, target), words, spaces, strict=True
        )
    ]
    return made[0], made[1]


def word_embeddings(
    texts: Sequence[str], dimensions: int, window: int, seed: int
) -> tuple[dict[str, int], Tensor]:
    """Words with their numbers, and their static embeddings."""
    found = [words_of(text) for text in texts]
    vocabulary = {word: i for i, word in enumerate(sorted({w for line in found for w in line}))}
    ids = [[vocabulary[w] for w in line] for line in found]
    return vocabulary, static_embeddings(ids, len(vocabulary), dimensions, window, seed)


def translations(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Word pairs: those given, and of sentences the words that choose each other by Dice's coefficient.

    ``2 n(s, t) / (n(s) + n(t))`` over the pairs in which a word occurs, at least twice together.
    """
    given: list[tuple[str, str]] = []
    alone: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    together: Counter[tuple[str, str]] = Counter()
    for source, target in pairs:
        left, right = words_of(source), words_of(target)
        if len(left) == len(right) == 1:
            given.append((left[0], right[0]))
            continue
        alone[0].update(set(left))
        alone[1].update(set(right))
        together.update((s, t) for s in set(left) for t in set(right))
    best: tuple[dict[str, tuple[float, str]], dict[str, tuple[float, str]]] = ({}, {})
    for (s, t), times in sorted(together.items()):
        dice = 2 * times / (alone[0][s] + alone[1][t])
        if times > 1:
            best[0][s] = max(best[0].get(s, (0.0, "")), (dice, t))
            best[1][t] = max(best[1].get(t, (0.0, "")), (dice, s))
    mutual = [(s, t) for s, (_, t) in best[0].items() if best[1][t][1] == s]
    return list(dict.fromkeys([*given, *mutual]))


def procrustes(given: Tensor, wanted: Tensor) -> Tensor:
    """The orthogonal ``Q`` ``(d, d)`` for which ``given @ Q`` is nearest to ``wanted`` (Schönemann 1966)."""
    left, _, right = torch.linalg.svd(given.T @ wanted)
    return left @ right


def token_embeddings(
    tokenizer: Tokenizer, texts: Sequence[str], vocabulary: dict[str, int], words: Tensor
) -> Tensor:
    """``(tokens, d)``: of each token the mean over the words in which it occurs, weighted by how often."""
    size = max(tokenizer.get_vocab().values()) + 1
    counts: Counter[tuple[int, int]] = Counter()
    for text in texts:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            for word in _touched(text, start, end):
                if word in vocabulary:
                    counts[token, vocabulary[word]] += 1
    places = torch.tensor(list(counts)).T if counts else torch.zeros(2, 0, dtype=torch.long)
    times = torch.tensor(list(counts.values()), dtype=torch.float64)
    weights = torch.sparse_coo_tensor(places, times, (size, len(vocabulary))).to_sparse_csr()
    made = weights @ words
    length = made.norm(dim=1, keepdim=True)
    return torch.where(length > 1e-9, made / length.clamp(min=1e-9), 0.0)


def _touched(text: str, start: int, end: int) -> list[str]:
    """Words of which the characters ``start`` to ``end`` are a part."""
    while start and text[start - 1].isalpha() and text[start:end][:1].isalpha():
        start -= 1
    while end < len(text) and text[end].isalpha() and text[start:end][-1:].isalpha():
        end += 1
    return words_of(text[start:end])
