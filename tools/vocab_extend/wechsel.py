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
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from tuneutils.shared.errors import ToolError
from tuneutils.tools.vocab_extend.static import static_embeddings

WORD = re.compile(r"[^\W\d_]+")
LEAST_PAIRS = 20
SENTENCES = 5_000  # counted at once


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
    cut = [(words_of(source), words_of(target)) for source, target in pairs]
    given = [(left[0], right[0]) for left, right in cut if len(left) == len(right) == 1]
    sentences = [(set(left), set(right)) for left, right in cut if max(len(left), len(right)) > 1]
    sides = [sorted({word for both in sentences for word in both[side]}) for side in (0, 1)]
    place = [{word: i for i, word in enumerate(side)} for side in sides]
    alone = [np.zeros(len(side), np.int64) for side in sides]
    keys, times = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for start in range(0, len(sentences), SENTENCES):
        met = []
        for both in sentences[start : start + SENTENCES]:
            left, right = (np.array([place[i][w] for w in both[i]], np.int64) for i in (0, 1))
            alone[0][left] += 1
            alone[1][right] += 1
            met.append((left[:, None] * len(sides[1]) + right).ravel())
        found, counts = np.unique(np.concatenate(met), return_counts=True)
        keys, inverse = np.unique(np.concatenate([keys, found]), return_inverse=True)
        times = np.bincount(inverse, np.concatenate([times, counts]), minlength=len(keys)).astype(np.int64)
    keys, times = keys[times > 1], times[times > 1]
    if not len(keys):
        return list(dict.fromkeys(given))
    left, right = keys // len(sides[1]), keys % len(sides[1])
    dice = 2 * times / (alone[0][left] + alone[1][right])
    mutual = _best(left, dice) & _best(right, dice)
    chosen = [(sides[0][s], sides[1][t]) for s, t in zip(left[mutual], right[mutual], strict=True)]
    return list(dict.fromkeys([*given, *chosen]))


def _best(owner: NDArray[np.int64], score: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether an entry has its owner's highest score; of equals the last."""
    order = np.lexsort((np.arange(len(owner)), score, owner))
    last = np.append(owner[order][1:] != owner[order][:-1], True)
    made = np.zeros(len(owner), np.bool_)
    made[order[last]] = True
    return made


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
    for (surface, piece), times in sorted(_pieces(tokenizer, texts).items()):
        inside = [vocabulary[word] for word in words_of(surface) if word in vocabulary]
        for token in tokenizer.model.tokenize(piece):
            for word in inside:
                counts[token.id, word] += times
    places = torch.tensor(list(counts)).T if counts else torch.zeros(2, 0, dtype=torch.long)
    weights = torch.tensor(list(counts.values()), dtype=torch.float64)
    made = torch.sparse_coo_tensor(places, weights, (size, len(vocabulary))).to_sparse_csr() @ words
    length = made.norm(dim=1, keepdim=True)
    return torch.where(length > 1e-9, made / length.clamp(min=1e-9), 0.0)


def _pieces(tokenizer: Tokenizer, texts: Sequence[str]) -> Counter[tuple[str, str]]:
    """Words as they stand in the text and as the tokenizer's model is given them, with their counts."""
    found: Counter[tuple[str, str]] = Counter()
    for text in texts:
        if tokenizer.normalizer is not None:
            text = tokenizer.normalizer.normalize_str(text)
        if tokenizer.pre_tokenizer is None:
            found.update((word, word) for word in text.split())
        else:
            parts = tokenizer.pre_tokenizer.pre_tokenize_str(text)
            found.update((text[start:end], piece) for piece, (start, end) in parts)
    return found
