"""Places at which two tokenizations have read the same text."""

from __future__ import annotations

from typing import Any

import pytest
from support import PROVERBS, tiny_tokenizer

from tuneutils.shared.supervise import IGNORE, Encoded
from tuneutils.tools.distill.align import align
from tuneutils.tools.distill.params import Params

PARAMS = Params(model="teacher", loss="uld")


@pytest.fixture(scope="module")
def student() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def teacher() -> Any:
    """The same bytes in other pieces, with other ids, and no chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(PROVERBS[:2], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<pad>")


def read_before(tokenizer: Any, example: Encoded) -> list[str]:
    """For each label, the text before it, as far as it is not special."""
    places = [i for i, label in enumerate(example.labels) if label != IGNORE]
    return [tokenizer.decode(example.input_ids[:i], skip_special_tokens=True) for i in places]


@pytest.mark.parametrize("text", PROVERBS)
def test_labels_follow_the_same_text(text: str, student: Any, teacher: Any) -> None:
    ((ours, theirs),) = align({"text": text}, student, teacher, PARAMS, 512)
    before = read_before(student, ours)
    assert before == read_before(teacher, theirs)
    assert len(before) >= 2
    assert before[-1] == text  # both predict the end
    assert ours.input_ids[-1] == student.eos_token_id
    assert theirs.input_ids[-1] == teacher.eos_token_id


def test_only_completions_count_and_templates_may_differ(student: Any, teacher: Any) -> None:
    record = {"prompt": "Say something.", "completion": "Measure twice and cut once."}
    ((ours, theirs),) = align(record, student, teacher, PARAMS, 512)
    said = [b[b.index(record["prompt"]) :] for b in read_before(student, ours)]
    read = [b[b.index(record["prompt"]) :] for b in read_before(teacher, theirs)]
    answers = [s.split("assistant\n", 1)[1] for s in said]
    assert answers == [r.removeprefix(record["prompt"]) for r in read]
    assert answers[0] == ""
    assert answers[-1] == record["completion"]


def test_long_texts_are_split_and_every_piece_aligned(student: Any, teacher: Any) -> None:
    text = " ".join(PROVERBS)
    pairs = align({"text": text}, student, teacher, PARAMS, 20)
    assert len(pairs) > 3
    for ours, theirs in pairs:
        assert len(ours) <= 20
        assert read_before(student, ours) == read_before(teacher, theirs)
    joined = "".join(student.decode(a.input_ids, skip_special_tokens=True) for a, _ in pairs)
    assert joined == text


def test_the_same_tokenizer_agrees_everywhere(student: Any) -> None:
    ((ours, theirs),) = align({"text": PROVERBS[0]}, student, student, PARAMS, 512)
    assert ours == theirs
    assert sum(label != IGNORE for label in ours.labels) == len(ours) - 1
