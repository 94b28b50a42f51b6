"""Label masks against TRL's own, against Transformers' assistant masks, and against ChatML written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import CHATML, PROVERBS, tiny_records, tiny_tokenizer

from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.supervise import (
    IGNORE,
    Encoded,
    check_eos,
    encode,
    prompt_ids,
    show_labels,
    windows,
)

# ChatML as above, with the marks that Transformers' assistant masks need. The closing newline is outside.
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who runs deep?"},
    {"role": "assistant", "content": "Still waters."},
    {"role": "user", "content": "And who is early?"},
    {"role": "assistant", "content": "The bird; it catches the worm."},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def plain(tokenizer: Any) -> Any:
    tokenizer.chat_template = None
    return tokenizer


def adding(*, bos: bool, eos: bool) -> Any:
    """The tiny tokenizer, made to put BOS before and EOS after every text."""
    from tokenizers.processors import TemplateProcessing

    made = plain(tiny_tokenizer())
    made.add_special_tokens({"bos_token": "<|unk|>"})
    single = ("<|unk|> " if bos else "") + "$A" + (" <|im_end|>" if eos else "")
    ids = {t: made.convert_tokens_to_ids(t) for t in ("<|unk|>", "<|im_end|>")}
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=list(ids.items())
    )
    return made


def by_hand(tokenizer: Any, pieces: list[tuple[str, bool]]) -> Encoded:
    """ids and labels of text pieces tokenized one by one."""
    ids: list[int] = []
    labels: list[int] = []
    for text, learnt in pieces:
        new = tokenizer(text, add_special_tokens=False).input_ids
        ids += new
        labels += new if learnt else [IGNORE] * len(new)
    return Encoded(ids, labels)


def learnt_text(encoded: Encoded, tokenizer: Any) -> str:
    return str(tokenizer.decode([x for x in encoded.labels if x != IGNORE]))


def test_chatml_learns_the_answer_and_its_end_but_not_the_newline_after(tokenizer: Any) -> None:
    record = {"prompt": "Who is early?", "completion": "The bird."}
    assert encode(record, tokenizer) == by_hand(
        tokenizer,
        [
            ("<|im_start|>user\nWho is early?<|im_end|>\n<|im_start|>assistant\n", False),
            ("The bird.<|im_end|>", True),
            ("\n", False),
        ],
    )


def test_every_assistant_turn_is_learnt_as_transformers_marks_them(tokenizer: Any) -> None:
    marked = tokenizer.apply_chat_template(
        CONVERSATION,
        chat_template=GENERATION,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    expected = [
        token if learnt else IGNORE
        for token, learnt in zip(marked["input_ids"], marked["assistant_masks"], strict=True)
    ]
    assert encode({"messages": CONVERSATION}, tokenizer) == Encoded(marked["input_ids"], expected)


def test_learn_last_takes_the_last_answer_alone(tokenizer: Any) -> None:
    encoded = encode({"messages": CONVERSATION}, tokenizer, learn="last")
    assert learnt_text(encoded, tokenizer) == "The bird; it catches the worm.<|im_end|>"
    assert encoded.input_ids == encode({"messages": CONVERSATION}, tokenizer).input_ids


def test_learn_all_takes_everything_through_the_last_eos(tokenizer: Any) -> None:
    encoded = encode({"messages": CONVERSATION}, tokenizer, learn="all")
    newline = tokenizer("\n").input_ids
    assert encoded.labels == encoded.input_ids[: -len(newline)] + [IGNORE] * len(newline)
    check_eos([encoded], tokenizer, 0)


@pytest.mark.parametrize("learn", ["completion", "last", "all"])
@pytest.mark.parametrize("format", ["text", "prompt-completion", "messages"])
@pytest.mark.parametrize("template", ["auto", "none"])
def test_eos_is_the_last_learnt_token(tokenizer: Any, learn: str, format: str, template: str) -> None:  # noqa: A002
    for record in tiny_records(format):
        encoded = encode(record, tokenizer, learn=learn, template=template)
        assert [x for x in encoded.labels if x != IGNORE][-1] == tokenizer.eos_token_id
        assert tokenizer.pad_token_id not in encoded.labels


def test_strings_are_concatenated_without_a_template_as_trl_does(tiny_model: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    records = tiny_records("prompt-completion")
    args = SFTConfig(
        output_dir=str(tmp_path), max_length=None, use_cpu=True, report_to=[], completion_only_loss=True
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        args,
        train_dataset=Dataset.from_list(records),
        processing_class=tokenizer,
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(records))])
    for record, ids, labels, mask in zip(
        records, batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    ):
        n = int(mask.sum())
        ours = encode(record, tokenizer, template="none")
        assert ours.input_ids == ids[:n].tolist()
        assert ours.labels == labels[:n].tolist()


def test_template_chat_insists_and_none_concatenates(tokenizer: Any) -> None:
    record = {"prompt": "Q", "completion": " A"}
    assert encode(record, tokenizer, template="none") == by_hand(
        tokenizer, [("Q", False), (" A<|im_end|>", True)]
    )
    with pytest.raises(ValueError, match="no chat template"):
        encode(record, plain(tiny_tokenizer()), template="chat")
    assert encode(record, plain(tiny_tokenizer())) == encode(record, tokenizer, template="none")


def test_a_prompt_may_be_messages(tokenizer: Any) -> None:
    by_turns = {"prompt": CONVERSATION[:-1], "completion": CONVERSATION[-1:]}
    as_string = {"prompt": CONVERSATION[:-1], "completion": CONVERSATION[-1]["content"]}
    expected = encode({"messages": CONVERSATION}, tokenizer)
    assert encode(by_turns, tokenizer) == expected
    assert encode(as_string, tokenizer) == expected


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_bos_once_at_the_start_and_eos_once_at_the_end(bos: bool, eos: bool) -> None:
    tokenizer = adding(bos=bos, eos=eos)
    first = [tokenizer.bos_token_id] if bos else []
    body = tokenizer("Q A", add_special_tokens=False).input_ids
    for record in ({"prompt": "Q", "completion": " A"}, {"text": "Q A"}, {"prompt": "", "completion": "Q A"}):
        encoded = encode(record, tokenizer)
        assert encoded.input_ids == [*first, *body, tokenizer.eos_token_id]
        assert encoded.labels[-1] == tokenizer.eos_token_id
    assert encode({"prompt": "Q", "completion": " A"}, tokenizer).labels[: len(first) + 1] == [IGNORE] * (
        len(first) + 1
    )
    assert (
        prompt_ids({"prompt": "Q"}, tokenizer) == first + tokenizer("Q", add_special_tokens=False).input_ids
    )


def test_a_template_writes_its_own_bos_and_none_is_added() -> None:
    tokenizer = adding(bos=True, eos=True)
    tokenizer.chat_template = CHATML
    served = tokenizer.apply_chat_template(CONVERSATION, tokenize=True, return_dict=True)["input_ids"]
    encoded = encode({"messages": CONVERSATION}, tokenizer)
    assert encoded.input_ids == served
    assert tokenizer.bos_token_id not in encoded.input_ids


def test_a_completion_that_brings_its_eos_gets_no_second(tokenizer: Any) -> None:
    with_eos = encode({"prompt": "Q", "completion": " A<|im_end|>"}, tokenizer, template="none")
    assert with_eos == encode({"prompt": "Q", "completion": " A"}, tokenizer, template="none")


@pytest.mark.parametrize("template", ["auto", "none"])
@pytest.mark.parametrize("format", ["prompt-completion", "messages"])
def test_the_prompt_served_is_the_prompt_trained(tokenizer: Any, template: str, format: str) -> None:  # noqa: A002
    for record in tiny_records(format):
        if template == "none" and format == "messages":
            continue
        whole = encode(record, tokenizer, learn="last", template=template)
        start = prompt_ids(record, tokenizer, template=template)
        assert whole.input_ids[: len(start)] == start
        assert whole.labels[: len(start)] == [IGNORE] * len(start)
        assert whole.labels[len(start)] != IGNORE


def test_the_prompt_of_an_unanswered_conversation_is_all_of_it(tokenizer: Any) -> None:
    asked = CONVERSATION[:-1]
    served = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prompt_ids({"messages": asked}, tokenizer) == served
    assert prompt_ids({"messages": CONVERSATION}, tokenizer) == served


@pytest.mark.parametrize("max_length", [2, 3, 7, 16, 1000])
def test_windows_teach_every_token_but_the_first_just_once(tokenizer: Any, max_length: int) -> None:
    encoded = encode({"text": " ".join(PROVERBS)}, tokenizer)
    pieces = windows(encoded, max_length)
    assert [label for piece in pieces for label in piece.labels[1:]] == encoded.input_ids[1:]
    assert all(2 <= len(piece) <= max_length for piece in pieces)
    assert pieces[-1].labels[-1] == tokenizer.eos_token_id


def test_max_length_keeps_the_start(tokenizer: Any) -> None:
    record = {"text": PROVERBS[0]}
    whole = encode(record, tokenizer)
    assert encode(record, tokenizer, 5) == Encoded(whole.input_ids[:5], whole.labels[:5])


def test_learnt_counts_the_predictions(tokenizer: Any) -> None:
    assert Encoded([5, 6, 7], [5, 6, 7]).learnt == 2
    assert Encoded([5, 6, 7], [IGNORE, IGNORE, 7]).learnt == 1


def test_the_gate_refuses_a_template_that_does_not_close_its_answers() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "")
    examples = [encode(r, tokenizer) for r in tiny_records("messages")]
    with pytest.raises(ToolError, match=r"8 of 8 examples do not end in EOS.*--show-labels") as caught:
        check_eos(examples, tokenizer, 0)
    assert caught.value.code == ExitCode.BAD_DATA
    check_eos(examples, tokenizer, 8)


def test_the_gate_refuses_padding_with_eos() -> None:
    tokenizer = tiny_tokenizer()
    examples = [encode({"text": PROVERBS[0]}, tokenizer)]
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(ToolError, match="never stop"):
        check_eos(examples, tokenizer, 0)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": CONVERSATION[:2]}, "no assistant turn"),
        ({"prompt": "a", "completion": "b", "label": False}, "cannot learn from unpaired records"),
    ],
)
def test_records_that_teach_nothing_are_refused(tokenizer: Any, record: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        encode(record, tokenizer)


def test_a_template_that_refuses_says_why(tokenizer: Any) -> None:
    strict = tiny_tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="roles must alternate"):
        encode({"messages": CONVERSATION}, strict)


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    """As those do that drop the reasoning of all answers but the last."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] }}"
        "{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    )
    with pytest.raises(ValueError, match="changes earlier turns"):
        encode({"messages": CONVERSATION}, tokenizer)
    last = encode({"messages": CONVERSATION}, tokenizer, learn="last")
    assert learnt_text(last, tokenizer).startswith("The bird")


def test_labels_are_shown_with_and_without_colour(tokenizer: Any) -> None:
    encoded = by_hand(tokenizer, [("a", False), ("b", True)])
    assert show_labels(encoded, tokenizer, color=False) == "a[b]"
    assert show_labels(encoded, tokenizer, color=True) == "\x1b[2ma\x1b[0m\x1b[32mb\x1b[0m"


def test_of_a_preference_the_chosen_answer_is_learnt(tokenizer: Any) -> None:
    preferred = {
        "prompt": CONVERSATION[1]["content"],
        "chosen": CONVERSATION[2]["content"],
        "rejected": "Something else.",
    }
    assert encode(preferred, tokenizer) == encode(
        {"prompt": CONVERSATION[1]["content"], "completion": CONVERSATION[2]["content"]}, tokenizer
    )
    turns = {
        "prompt": [{"role": "user", "content": CONVERSATION[1]["content"]}],
        "chosen": [{"role": "assistant", "content": CONVERSATION[2]["content"]}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    assert encode(turns, tokenizer) == encode(preferred, tokenizer)
