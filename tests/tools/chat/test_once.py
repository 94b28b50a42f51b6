"""One reply to stdin, and the conversation in a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support import environment, run_cli, tool_args
from transformers import AutoModelForCausalLM, AutoTokenizer

for _module in ("py3langid",):
    pytest.importorskip(_module)

QUICK = ("--device", "cpu", "--dtype", "float32", "--temperature", "0", "--max-new-tokens", "12")


def chat(*args: str | os.PathLike[str], stdin: str | bytes = "") -> tuple[int, str, str]:
    done = run_cli(*tool_args("chat"), *args, *QUICK, stdin=stdin)
    return done.code, done.stdout, done.stderr


def by_transformers(model: torch.nn.Module, tokenizer: object, messages: list[dict[str, str]]) -> str:
    """The greedy reply of Transformers' own generation."""
    ids = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )["input_ids"]
    made = model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=1)  # type: ignore[operator]
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))  # type: ignore[attr-defined]


def test_the_reply_is_transformers_own(tiny_model: Path, workdir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Say a proverb."}]
    expected = by_transformers(model, tokenizer, messages)
    code, out, err = chat(tiny_model, "--system", "Be short.", "--language", "off", stdin="Say a proverb.\n")
    assert code == 0, err
    assert out == expected + "\n"


def test_the_conversation_goes_on_from_its_file(tiny_model: Path, workdir: Path) -> None:
    for text in ("Say a proverb.", "Another."):
        assert chat(tiny_model, "--history", "talk.jsonl", "--language", "off", stdin=text)[0] == 0
    lines = [json.loads(line) for line in Path("talk.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [m["role"] for m in lines] == ["user", "assistant"] * 2
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    expected = by_transformers(model, AutoTokenizer.from_pretrained(tiny_model), lines[:3])
    assert lines[3]["content"] == expected


def test_each_language_has_its_adapter(tiny_model: Path, workdir: Path) -> None:
    """A Swahili message is answered by the Swahili adapter, an English one by the model alone."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(base, config).save_pretrained("sw")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    asked = {"sw": "Nataka kujua hali ya hewa ya leo", "en": "What is the weather like today?"}
    wanted = {"en": by_transformers(AutoModelForCausalLM.from_pretrained(tiny_model), tokenizer,
                                    [{"role": "user", "content": asked["en"]}])}  # fmt: skip
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), "sw")
    wanted["sw"] = by_transformers(tuned, tokenizer, [{"role": "user", "content": asked["sw"]}])
    for language, text in asked.items():
        done = run_cli(*tool_args("chat"), tiny_model, "--adapter", "sw=sw", "--json", *QUICK, stdin=text)
        assert done.code == 0, done.stderr
        assert done.json()["language"] == language
        assert done.json()["reply"] == wanted[language]


@pytest.mark.parametrize(
    ("args", "stdin", "code", "says"),
    [
        ((), "", 65, "<stdin>: empty"),
        ((), b"caf\xe9 \xff", 65, "<stdin>: not UTF-8: byte 0xe9 at 3"),
        (("--adapter", "sw=a", "--adapter", "sw=b"), "x", 2, "--adapter: two for sw"),
        (("--adapter", "qq=a"), "x", 2, "no language that can be told from a text"),
        (("--serve", "--host", "0.0.0.0"), "x", 2, "other machines could reach it"),
        (("--serve", "--host", "0.0.0.0", "--allow-remote"), "x", 2, "needs a key"),
        (("--history", "bad.jsonl"), "x", 65, "bad.jsonl:1: no message"),
    ],
)
def test_bad_input_is_named(
    tiny_model: Path, workdir: Path, args: tuple[str, ...], stdin: str | bytes, code: int, says: str
) -> None:
    Path("bad.jsonl").write_text('{"role": "user"}\n')
    done = run_cli(*tool_args("chat"), tiny_model, *args, *QUICK, stdin=stdin)
    assert done.code == code, done.stderr
    assert says in done.error


def test_too_long_a_message_is_refused(tiny_model: Path, workdir: Path) -> None:
    code, _, err = chat(tiny_model, stdin="word " * 300)
    assert code == 65
    assert "the model's context takes 128" in err


def test_a_conversation_in_a_terminal(tiny_model: Path, workdir: Path) -> None:
    """Two messages, one taken back, the file as it should be, and an end by Ctrl-D."""
    main, side = pty.openpty()
    line = [sys.executable, *tool_args("chat"), str(tiny_model), "--history", "t.jsonl", "--language", "off"]
    process = subprocess.Popen(
        [*line, *QUICK],
        stdin=side,
        stdout=side,
        stderr=side,
        env=environment({"TERM": "dumb"}),
        close_fds=True,
    )
    os.close(side)
    seen = b""

    def wait_for_prompt(count: int) -> None:
        nonlocal seen
        end = time.monotonic() + 120
        while seen.count(b"> ") < count:
            assert time.monotonic() < end, seen
            if select.select([main], [], [], 0.2)[0]:
                seen += os.read(main, 4096)

    for number, text in enumerate((b"Say a proverb.", b"Another.", b"/undo", b"/nothing"), 1):
        wait_for_prompt(number)
        os.write(main, text + b"\n")
    wait_for_prompt(5)
    os.write(main, b"\x04")
    assert process.wait(timeout=60) == 0
    os.close(main)
    assert b"taken back: Another." in seen
    assert b"/nothing: no command" in seen
    lines = [json.loads(text) for text in Path("t.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [m["content"] for m in lines[::2]] == ["Say a proverb."]
