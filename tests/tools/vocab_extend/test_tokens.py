"""New tokens behind the old ones: the table, the merges, all bytes, three kinds of tokenizer."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest
from support import PROVERBS, tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from tuneutils.shared.errors import ToolError
from tuneutils.tools.vocab_extend.tokens import Extension, extend_tokenizer

from .conftest import Extended, made_up_texts

TEXTS = made_up_texts(60, 3)
#: Characters whose UTF-8 has every byte that UTF-8 can have.
EVERY_BYTE = (
    "".join(map(chr, range(0x800)))
    + "".join(chr(c) for c in range(0x800, 0x10000, 0x40) if not 0xD800 <= c < 0xE000)
    + "".join(chr(c) for c in range(0x10000, 0x110000, 0x1000))
)


@pytest.fixture(scope="module")
def bpe() -> Extension:
    return extend_tokenizer(tiny_tokenizer().backend_tokenizer, TEXTS, 50, 2)


def test_old_tokens_keep_their_numbers(bpe: Extension) -> None:
    before, after = bpe.old.get_vocab(), bpe.new.get_vocab()
    assert {token: after[token] for token in before} == before
    assert sorted(set(after.values()) - set(before.values())) == list(range(384, 434))


def test_old_merges_come_first_and_each_new_one_joins_a_pair_that_meets_most_often(bpe: Extension) -> None:
    merges = [tuple(m) for m in json.loads(bpe.new.to_str())["model"]["merges"]]
    old = [tuple(m) for m in json.loads(bpe.old.to_str())["model"]["merges"]]
    assert merges[: len(old)] == old
    words = Counter(w for t in TEXTS for w, _ in bpe.old.pre_tokenizer.pre_tokenize_str(t))
    cut = {word: [t.value for t in bpe.old.model.tokenize(word)] for word in words}
    for merge in merges[len(old) :]:  # brute force: every pair of every word is counted anew
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in cut.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        assert pairs[merge] == max(pairs.values())
        cut = {word: joined(parts, merge) for word, parts in cut.items()}
    for word, parts in cut.items():
        assert [t.value for t in bpe.new.model.tokenize(word)] == parts


def joined(parts: list[str], merge: tuple[str, str]) -> list[str]:
    made: list[str] = []
    i = 0
    while i < len(parts):
        meets = tuple(parts[i : i + 2]) == merge
        made.append("".join(parts[i : i + 2]) if meets else parts[i])
        i += 2 if meets else 1
    return made


def test_a_new_token_spells_its_pieces(bpe: Extension) -> None:
    for number, piece in enumerate(bpe.pieces):
        assert bpe.new.id_to_token(384 + number) == "".join(map(bpe.old.id_to_token, piece))


def test_every_byte_comes_back(bpe: Extension) -> None:
    assert set(EVERY_BYTE.encode()) == {*range(0xC0), *range(0xC2, 0xF5)}
    for text in (EVERY_BYTE, *TEXTS, *PROVERBS):
        assert bpe.new.decode(bpe.new.encode(text).ids, skip_special_tokens=False) == text


def test_bytes_that_the_old_tokenizer_lost_are_added() -> None:
    state = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    state["model"]["unk_token"] = None
    ((lost, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("\u0410")
    assert len(lost) == 2  # the letters that stand for D0 and 90
    for letter in lost:
        number = state["model"]["vocab"].pop(letter)
        state["model"]["vocab"][f"unused{letter}"] = number
    old = Tokenizer.from_str(json.dumps(state))
    assert old.decode(old.encode("a\u0410b").ids) != "a\u0410b"
    made = extend_tokenizer(old, TEXTS, 20, 2)
    assert made.added_bytes == 2
    assert made.pieces[:2] == [[], []]
    assert made.new.decode(made.new.encode(EVERY_BYTE).ids, skip_special_tokens=False) == EVERY_BYTE


def test_added_tokens_outside_the_model_keep_their_numbers() -> None:
    old = tiny_tokenizer().backend_tokenizer
    old.add_special_tokens(["<|tool|>"])
    assert old.token_to_id("<|tool|>") == 384
    made = extend_tokenizer(old, TEXTS, 20, 2)
    assert made.first == 385
    assert made.new.token_to_id("<|tool|>") == 384
    assert made.new.encode("a<|tool|>b").ids == old.encode("a<|tool|>b").ids


def test_frequency_limits_what_is_learnt() -> None:
    made = extend_tokenizer(tiny_tokenizer().backend_tokenizer, ["zq zq zq xv xv"], 9, 3)
    assert [made.new.id_to_token(384 + i) for i in range(len(made.pieces))] == ["zq"]  # met thrice
    with pytest.raises(ToolError, match="--min-frequency"):
        extend_tokenizer(tiny_tokenizer().backend_tokenizer, ["zq xv"], 9, 3)


def wordpiece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(PROVERBS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]"]))
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"])
    made.train_from_iterator(PROVERBS, trainer)
    made.add_special_tokens(["</s>"])
    return made


@pytest.mark.parametrize("make", [wordpiece, unigram])
def test_other_kinds_of_tokenizer(make) -> None:
    old = make()
    made = extend_tokenizer(old, TEXTS, 30, 2)
    before, after = old.get_vocab(), made.new.get_vocab()
    assert {token: after[token] for token in before} == before
    assert sorted(set(after.values()) - set(before.values())) == list(range(made.first, made.first + 30))
    used = {i for text in TEXTS for i in made.new.encode(text).ids}
    assert len(used & set(range(made.first, made.first + 30))) > 15
    assert sum(len(made.new.encode(t).ids) for t in TEXTS) < sum(len(old.encode(t).ids) for t in TEXTS)


def test_word_level_is_refused() -> None:
    with pytest.raises(ToolError, match="WordLevel"):
        extend_tokenizer(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), TEXTS, 5, 1)


def test_the_artifact_is_a_plain_tokenizer(extended: Extended) -> None:
    from transformers import AutoTokenizer

    before, after = AutoTokenizer.from_pretrained(extended.base), AutoTokenizer.from_pretrained(extended.made)
    assert len(after) == len(before) + 40
    assert after.get_vocab().items() >= before.get_vocab().items()
    assert after.special_tokens_map == before.special_tokens_map
    messages = [{"role": "user", "content": "hi"}]
    shown = [t.apply_chat_template(messages, tokenize=False) for t in (before, after)]
    assert shown[0] == shown[1]
    assert after.decode(after(extended.texts[0]).input_ids) == extended.texts[0]
