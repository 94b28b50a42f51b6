"""Ways to start an embedding, against formulas worked out another way."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from tuneutils.tools.vocab_extend.initialise import (
    focus_weights,
    mean_weights,
    new_rows,
    sparsemax,
    wechsel_weights,
)
from tuneutils.tools.vocab_extend.static import cooccurrences, ppmi, static_embeddings
from tuneutils.tools.vocab_extend.wechsel import procrustes, token_spaces, translations


def projection(scores: np.ndarray) -> np.ndarray:
    """The nearest point of the simplex, by trying every support."""
    best, distance = scores, math.inf
    for size in range(1, len(scores) + 1):
        for support in itertools.combinations(range(len(scores)), size):
            point = np.zeros(len(scores))
            point[list(support)] = scores[list(support)] - (scores[list(support)].sum() - 1) / size
            if point.min() >= 0 and np.linalg.norm(point - scores) < distance:
                best, distance = point, np.linalg.norm(point - scores)
    return best


def test_sparsemax_is_the_projection_onto_the_simplex() -> None:
    scores = np.random.default_rng(0).normal(size=(50, 7))
    expected = np.stack([projection(row) for row in scores])
    np.testing.assert_allclose(sparsemax(torch.from_numpy(scores)).numpy(), expected, atol=1e-12)


def test_sparsemax_of_two_scores() -> None:
    """Martins and Astudillo 2016, section 2.2: of (t, 0) it is a hard sigmoid, (t + 1) / 2 for |t| <= 1."""
    for t, first in ((-2.0, 0.0), (-0.5, 0.25), (0.0, 0.5), (0.8, 0.9), (3.0, 1.0)):
        made = sparsemax(torch.tensor([[t, 0.0]], dtype=torch.float64))
        torch.testing.assert_close(made, torch.tensor([[first, 1 - first]], dtype=torch.float64))


def test_mean_of_pieces_by_hand() -> None:
    table = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 8.0], [9.0, 9.0]])
    made = new_rows(table, 2, mean_weights([[0, 1], [2, 2, 0, 1]]), seed=0)
    torch.testing.assert_close(made, torch.tensor([[2.0, 2.0], [1.0, 5.0]]))


def test_focus_mixes_by_sparsemax_of_cosine() -> None:
    rng = np.random.default_rng(1)
    auxiliary = rng.normal(size=(7, 4))
    auxiliary /= np.linalg.norm(auxiliary, axis=1, keepdims=True)
    auxiliary[2] = 0  # an old token that the text does not have
    auxiliary[6] = 0  # a new one of which nothing is known
    table = rng.normal(size=(5, 3)).astype(np.float32)
    made = new_rows(torch.from_numpy(table), 2, focus_weights(torch.from_numpy(auxiliary), 5), seed=0)
    shared = [0, 1, 3, 4]
    weights = projection(auxiliary[shared] @ auxiliary[5])
    np.testing.assert_allclose(made[0].numpy(), weights @ table[shared], rtol=1e-5)
    drawn = new_rows(torch.from_numpy(table), 2, None, seed=0)
    torch.testing.assert_close(made[1], drawn[1])


def test_rows_that_are_drawn_have_the_tables_mean_and_variance() -> None:
    table = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 1, 5]) + 2
    made = new_rows(table, 20_000, None, seed=0)
    torch.testing.assert_close(made.mean(0), table.mean(0), atol=0.15, rtol=0)
    torch.testing.assert_close(made.std(0), table.std(0), atol=0, rtol=0.03)


def test_wechsel_mixes_the_nearest_by_softmax() -> None:
    rng = np.random.default_rng(2)
    source, target = rng.normal(size=(30, 5)), rng.normal(size=(32, 5))
    source /= np.linalg.norm(source, axis=1, keepdims=True)
    target /= np.linalg.norm(target, axis=1, keepdims=True)
    source[4] = 0
    weights = wechsel_weights(torch.from_numpy(source), torch.from_numpy(target), 30)
    found = torch.zeros(2, 30)
    found[:, weights.old] = weights.rows(0, 2)
    for row in (0, 1):
        cosines = {i: source[i] @ target[30 + row] for i in range(30) if i != 4}
        nearest = sorted(cosines, key=cosines.__getitem__, reverse=True)[:10]
        total = sum(math.exp(cosines[i] / 0.1) for i in nearest)
        expected = [math.exp(cosines[i] / 0.1) / total if i in nearest else 0.0 for i in range(30)]
        np.testing.assert_allclose(found[row].numpy(), expected, atol=1e-6)


def test_ppmi_by_counting() -> None:
    documents = [[0, 1, 2, 0, 1], [2, 3], [1]]
    window = 2
    counts = np.zeros((4, 4))
    for document in documents:
        for i, j in itertools.permutations(range(len(document)), 2):
            if abs(i - j) <= window:
                counts[document[i], document[j]] += 1
    rows, columns, found = cooccurrences(documents, 4, window)
    dense = np.zeros((4, 4))
    dense[rows, columns] = found
    np.testing.assert_array_equal(dense, counts)
    context = counts.sum(0) ** 0.75
    joint, word = counts / counts.sum(), counts.sum(1, keepdims=True) / counts.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.maximum(0, np.log(joint / (word * context / context.sum())))
    dense[rows, columns] = ppmi(rows, columns, found, 4)
    np.testing.assert_allclose(dense, np.where(counts > 0, expected, 0))


def test_static_embeddings_are_the_factored_ppmi() -> None:
    rng = np.random.default_rng(3)
    documents = [rng.choice(40, size=30, p=np.arange(40, 0, -1) / 820).tolist() for _ in range(60)]
    rows, columns, counts = cooccurrences(documents, 41, 3)
    dense = np.zeros((41, 41))  # number 40 never occurs
    dense[rows, columns] = ppmi(rows, columns, counts, 41)
    left, scale, _ = np.linalg.svd(dense)
    expected = left[:, :5] * np.sqrt(scale[:5])
    expected[:40] /= np.linalg.norm(expected[:40], axis=1, keepdims=True)
    found = static_embeddings(documents, 41, 5, 3, seed=0)
    assert found.shape == (41, 5)
    assert found[40].abs().max() == 0
    np.testing.assert_allclose(
        (found @ found.T)[:40, :40].numpy(), (expected @ expected.T)[:40, :40], atol=0.02
    )
    assert torch.equal(found, static_embeddings(documents, 41, 5, 3, seed=0))


def test_procrustes_finds_a_rotation() -> None:
    rng = np.random.default_rng(4)
    turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    given = rng.normal(size=(20, 6))
    found = procrustes(torch.from_numpy(given), torch.from_numpy(given @ turn))
    np.testing.assert_allclose(found.numpy(), turn, atol=1e-10)


def test_translations_of_words_and_from_sentences() -> None:
    pairs = [("Dog", "mbwa"), ("the dog barks", "mbwa anabweka"), ("the dog sleeps", "mbwa analala")]
    pairs += [("a cat sleeps", "paka analala"), ("a cat runs", "paka anakimbia")]
    found = translations(pairs)
    assert found[0] == ("dog", "mbwa")
    assert ("sleeps", "analala") in found  # together twice, neither ever without the other: Dice 1
    assert ("barks", "anabweka") not in found  # met once


def test_a_language_in_other_letters_finds_its_own_tokens() -> None:
    """The new language is the known one in capital Greek: each new token's nearest old ones mean the same."""
    from support import tiny_tokenizer

    from tuneutils.tools.vocab_extend.tokens import extend_tokenizer

    from .conftest import made_up_texts

    source = made_up_texts(400, 5)
    letters = str.maketrans({c: chr(0x3B1 + i) for i, c in enumerate("abeghiklmnopstuwzé")})
    target = [text.translate(letters) for text in source]
    old = extend_tokenizer(tiny_tokenizer().backend_tokenizer, source, 400, 2).new
    made = extend_tokenizer(old, target, 400, 2)
    words = sorted({w for text in source for w in text.strip(".").split()})
    pairs = [(w, w.translate(letters)) for w in words]
    known, new = token_spaces(old, made.new, source, target, pairs, dimensions=20, window=5, seed=0)
    weights = wechsel_weights(known, new, made.first)
    hits = total = 0
    for word in words:
        ids = [
            t.encode(" " + w, add_special_tokens=False).ids
            for t, w in ((old, word), (made.new, word.translate(letters)))
        ]
        if len(ids[0]) == len(ids[1]) == 1 and ids[1][0] >= made.first:
            row = weights.rows(ids[1][0] - made.first, ids[1][0] - made.first + 1)[0]
            total += 1
            hits += int(weights.old[row.argmax()]) == ids[0][0]
    assert total > 40
    assert hits / total > 0.9
