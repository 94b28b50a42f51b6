"""The OpenAI protocol, spoken by the ``openai`` package to a real server."""

from __future__ import annotations

import http.client
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import build_tiny_model, environment, tool_args
from transformers import AutoModelForCausalLM, AutoTokenizer

openai = pytest.importorskip("openai")
for _module in ("fastapi", "uvicorn", "py3langid"):
    pytest.importorskip(_module)

KEY = "a-key-for-tests"
ASK: list[Any] = [{"role": "user", "content": "Say a proverb."}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("chat") / "model", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    line = [sys.executable, *tool_args("chat"), str(model), "--serve", "--port", "0", "--queue", "2"]
    line += ["--device", "cpu", "--dtype", "float32", "--language", "off", "--max-new-tokens", "16"]
    process = subprocess.Popen(
        line, stderr=subprocess.PIPE, text=True, env=environment({"TUNEUTILS_CHAT_API_KEY": KEY})
    )
    assert process.stderr is not None
    for said in process.stderr:
        if found := re.search(r"listening on (\S+)/v1", said):
            break
    else:
        raise AssertionError("the server ended")
    yield found[1]
    process.terminate()
    assert process.wait(timeout=20) in (0, 143)


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


def expected(model: Path, messages: list[Any], tokens: int) -> tuple[str, int, int]:
    """Transformers' own greedy reply, and its prompt and completion lengths."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )["input_ids"]
    made = AutoModelForCausalLM.from_pretrained(model).generate(
        ids, do_sample=False, max_new_tokens=tokens, pad_token_id=1
    )[0, ids.shape[1] :]
    return tokenizer.decode(made, skip_special_tokens=True), ids.shape[1], len(made)


def test_a_reply_is_transformers_own(client: Any, model: Path) -> None:
    made = client.chat.completions.create(model="any", messages=ASK, temperature=0, max_tokens=10)
    text, prompt, completion = expected(model, ASK, 10)
    assert made.choices[0].message.content == text
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (prompt, completion)
    assert made.choices[0].finish_reason == ("length" if completion == 10 else "stop")


def test_a_streamed_reply_is_the_same(client: Any, model: Path) -> None:
    options = {"include_usage": True}
    pieces, usage, ends = [], None, []
    for piece in client.chat.completions.create(
        model="any", messages=ASK, temperature=0, max_tokens=10, stream=True, stream_options=options
    ):
        usage = piece.usage or usage
        for choice in piece.choices:
            pieces.append(choice.delta.content or "")
            ends += [choice.finish_reason] if choice.finish_reason else []
    text, prompt, completion = expected(model, ASK, 10)
    assert "".join(pieces) == text
    assert len(ends) == 1
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt, completion)


def test_seeds_repeat_and_choices_differ(client: Any) -> None:
    def ask(seed: int) -> list[str]:
        made = client.chat.completions.create(model="any", messages=ASK, temperature=1.5, seed=seed, n=3)
        assert [c.index for c in made.choices] == [0, 1, 2]
        return [c.message.content for c in made.choices]

    assert ask(7) == ask(7)
    assert len(set(ask(7))) == 3
    assert ask(7) != ask(8)


def test_a_stop_string_ends_the_reply(client: Any, model: Path) -> None:
    text, _, _ = expected(model, ASK, 16)
    stop = text[3:6]
    made = client.chat.completions.create(
        model="any", messages=ASK, temperature=0, max_tokens=16, stop=[stop]
    )
    assert made.choices[0].message.content == text.split(stop)[0]
    assert made.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "context_length_exceeded"),
        ({"logprobs": True}, 400, "unsupported_parameter"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
            400,
            "unsupported_parameter",
        ),
        ({"messages": [{"role": "assistant", "content": "hm"}]}, 400, None),
        ({"messages": []}, 400, None),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, None),
        ({"temperature": 9}, 400, None),
    ],
)
def test_what_cannot_be_done_is_said(
    client: Any, changes: dict[str, Any], status: int, code: str | None
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**{"model": "any", "messages": ASK, **changes})
    assert caught.value.status_code == status
    assert caught.value.code == code
    assert caught.value.body["message"]


def test_a_wrong_key_is_refused(url: str) -> None:
    stranger = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_another_sites_page_is_refused(url: str) -> None:
    for host, status in (("evil.example", 400), ("localhost", 200)):
        answer = httpx.get(f"{url}/health", headers={"host": host, "authorization": f"Bearer {KEY}"})
        assert answer.status_code == status


def test_a_huge_body_is_refused_before_it_is_read(url: str) -> None:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("authorization", f"Bearer {KEY}")
    connection.putheader("content-length", str(1 << 40))
    connection.endheaders(b"{")
    assert connection.getresponse().status == 413


def test_models_are_listed(client: Any, model: Path) -> None:
    assert [m.id for m in client.models.list()] == [str(model)]


def test_a_client_that_leaves_frees_the_model(client: Any) -> None:
    stream = client.chat.completions.create(
        model="any", messages=ASK, temperature=1.0, max_tokens=1500, stream=True
    )
    next(iter(stream))
    stream.close()
    made = client.with_options(timeout=30).chat.completions.create(
        model="any", messages=ASK, temperature=0, max_tokens=2
    )
    assert made.usage.completion_tokens <= 2


def test_more_requests_than_may_wait_are_refused(client: Any) -> None:
    found: list[int] = []

    def ask() -> None:
        try:
            client.chat.completions.create(model="any", messages=ASK, temperature=1.0, max_tokens=400)
            found.append(200)
        except openai.APIStatusError as exc:
            found.append(exc.status_code)

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    assert set(found) == {200, 429}
