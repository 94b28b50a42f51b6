"""New tokens learnt on top of a tokenizer, behind the old ones, which keep their numbers.

BPE is trained on from where the old merges stopped (continued BPE training, Purason et al. 2025,
arXiv 2512.03989): each word is first cut by the old merges, then the library's trainer goes on from those
pieces. New merges come after all old ones, so every new token is reached; of tokens trained apart from the
old merges many never would be.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tuneutils.shared.errors import ExitCode, ToolError

#: Old tokens stand as one character each while the library's trainer goes on: from here in Unicode's order.
FIRST_CHARACTER = 0x10000
REPEATS = 64  # of a word in one string given to the trainer


@dataclass(frozen=True)
class Extension:
    """A tokenizer before and after.

    Attributes:
        first: the first new id.
        pieces: the old tokens that each new one is made of, in the order of the new ids; none for a byte that
            the old vocabulary lacked.
        added_bytes: of the new tokens, the first so many are such bytes.
    """

    old: Tokenizer
    new: Tokenizer
    first: int
    pieces: list[list[int]]
    added_bytes: int = 0


def old_size(tokenizer: Tokenizer) -> int:
    """One more than the highest id."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def extend_tokenizer(old: Tokenizer, texts: Iterable[str], count: int, min_frequency: int) -> Extension:
    """Learn at most ``count`` new tokens from texts.

    Raises:
        ToolError: a kind of tokenizer that cannot be extended (2), or texts without anything to add (65).
    """
    state = json.loads(old.to_str())
    kind = state["model"]["type"]
    if kind not in ("BPE", "Unigram", "WordPiece"):
        raise ToolError(
            f"a {kind} tokenizer cannot be extended; BPE, Unigram and WordPiece can", code=ExitCode.USAGE
        )
    first = old_size(old)
    _anchor_added(state, first)
    missing = _missing_bytes(state)
    for i, character in enumerate(missing):
        state["model"]["vocab"][character] = first + i
    words = _words(_from(state), texts)
    if kind == "BPE":
        pieces = _continue_bpe(state, words, count, min_frequency, first + len(missing))
    else:
        pieces = _add_pieces(state, old, words, count, min_frequency, first)
    if not pieces:
        raise ToolError(
            "nothing to add: no two tokens meet often enough in this text "
            "(more text, or a lower --min-frequency)"
        )
    return Extension(old, _from(state), first, [[] for _ in missing] + pieces, len(missing))


def _from(state: dict[str, Any]) -> Tokenizer:
    made = Tokenizer.from_str(json.dumps({**state, "truncation": None, "padding": None}))
    assert isinstance(made, Tokenizer)
    return made


def _anchor_added(state: dict[str, Any], size: int) -> None:
    """Put added tokens into the model's own vocabulary, else they would be numbered anew behind new ones."""
    vocab = state["model"]["vocab"]
    if isinstance(vocab, dict):
        for token in state["added_tokens"]:
            vocab.setdefault(token["content"], token["id"])
        return
    known = {entry[0] for entry in vocab}
    lowest = min(entry[1] for entry in vocab)
    added = {t["id"]: t["content"] for t in state["added_tokens"] if t["content"] not in known}
    for i in range(len(vocab), size):
        if i not in added:
            raise ToolError(f"the tokenizer has no token number {i}; its vocabulary cannot be extended")
        vocab.append([added[i], lowest])


def _missing_bytes(state: dict[str, Any]) -> list[str]:
    """Letters of the byte alphabet that a byte-level vocabulary lacks: such bytes are lost in silence."""
    if state["model"]["type"] != "BPE" or not _is_byte_level(state):
        return []
    return [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if c not in state["model"]["vocab"]]


def _is_byte_level(state: dict[str, Any]) -> bool:
    def kinds(part: Any) -> Iterator[str]:
        if isinstance(part, dict):
            yield part.get("type", "")
            for inner in part.get("pretokenizers") or part.get("normalizers") or ():
                yield from kinds(inner)

    return "ByteLevel" in [*kinds(state["pre_tokenizer"]), *kinds(state["normalizer"])]


def _words(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[str]:
    """Words as the tokenizer's model gets them, with how often each occurs."""
    found: Counter[str] = Counter()
    for text in texts:
        if tokenizer.normalizer is not None:
            text = tokenizer.normalizer.normalize_str(text)
        if tokenizer.pre_tokenizer is None:
            found.update(text.split())  # a word is then as far as a merge goes
        else:
            found.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    return found


def _continue_bpe(
    state: dict[str, Any], words: Counter[str], count: int, min_frequency: int, first: int
) -> list[list[int]]:
    """Put new tokens and merges behind the old; gives the old tokens of each new one."""
    model = _from(state).model
    vocab: dict[str, int] = state["model"]["vocab"]
    names = {i: token for token, i in vocab.items()}
    cut: Counter[tuple[int, ...]] = Counter()
    for word, times in sorted(words.items()):
        cut[tuple(token.id for token in model.tokenize(word))] += times
    merges = _learn_merges(cut, 2 * count + 64, min_frequency)
    prefix = state["model"].get("continuing_subword_prefix") or ""
    pieces: list[list[int]] = []
    for left, right in merges:
        parts = [names_of(side, names, prefix) for side in (left, right)]
        joined = parts[0] + parts[1].removeprefix(prefix)
        if joined not in vocab:
            if len(pieces) == count:
                break
            vocab[joined] = first + len(pieces)
            pieces.append([ord(c) - FIRST_CHARACTER for c in left + right])
        state["model"]["merges"].append(parts)
    return pieces


def names_of(characters: str, names: dict[int, str], prefix: str) -> str:
    """A token's own string, from the characters that stand for the old tokens in it."""
    parts = [names[ord(c) - FIRST_CHARACTER] for c in characters]
    return parts[0] + "".join(part.removeprefix(prefix) for part in parts[1:])


def _learn_merges(words: Counter[tuple[int, ...]], count: int, min_frequency: int) -> list[tuple[str, str]]:
    """The merges that BPE training finds on sequences of ids, each id as one character."""
    alphabet = sorted({chr(FIRST_CHARACTER + i) for word in words for i in word})
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + count,
        min_frequency=min_frequency,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learnt.train_from_iterator(_repeated(words), trainer)
    return [(a, b) for a, b in json.loads(learnt.to_str())["model"]["merges"]]


def _repeated(words: Counter[tuple[int, ...]]) -> Iterator[str]:
    for word, times in sorted(words.items()):
        if len(word) > 1:
            text = "".join(chr(FIRST_CHARACTER + i) for i in word)
            for _ in range(times // REPEATS):
                yield " ".join([text] * REPEATS)
            yield " ".join([text] * (times % REPEATS))


def _add_pieces(
    state: dict[str, Any], old: Tokenizer, words: Counter[str], count: int, min_frequency: int, first: int
) -> list[list[int]]:
    """Unigram and WordPiece cut by their vocabulary alone: pieces learnt apart can be put behind it."""
    vocab = state["model"]["vocab"]
    known = set(vocab) if isinstance(vocab, dict) else {entry[0] for entry in vocab}
    fresh = [
        (p, s) for p, s in _train_apart(state, words, count + len(known), min_frequency) if p not in known
    ]
    pieces = []
    for piece, score in fresh[:count]:
        if isinstance(vocab, dict):
            vocab[piece] = first + len(pieces)
        else:
            vocab.append([piece, score])
        pieces.append([token.id for token in old.model.tokenize(piece.removeprefix(_prefix(state)))])
    return pieces


def _prefix(state: dict[str, Any]) -> str:
    return str(state["model"].get("continuing_subword_prefix") or "")


def _train_apart(
    state: dict[str, Any], words: Counter[str], size: int, min_frequency: int
) -> Sequence[tuple[str, float]]:
    """Pieces that the same kind of model learns from words alone, best first, with their scores."""
    unigram = state["model"]["type"] == "Unigram"
    repeated = (word for word, times in sorted(words.items()) for _ in range(times))
    if unigram:
        apart = Tokenizer(models.Unigram())
        trainer: Any = trainers.UnigramTrainer(vocab_size=size, unk_token="<unk>", special_tokens=["<unk>"])
    else:
        unk = state["model"]["unk_token"]
        apart = Tokenizer(models.WordPiece(unk_token=unk))
        trainer = trainers.WordPieceTrainer(
            vocab_size=size,
            min_frequency=min_frequency,
            special_tokens=[unk],
            continuing_subword_prefix=_prefix(state),
        )
    trainer.show_progress = False
    apart.train_from_iterator(repeated, trainer)
    vocab = json.loads(apart.to_str())["model"]["vocab"]
    if unigram:
        return [(piece, score) for piece, score in vocab if piece != "<unk>"]
    return [(piece, 0.0) for piece, _ in sorted(vocab.items(), key=lambda item: item[1])]
