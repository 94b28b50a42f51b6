"""The options of ``chat``."""

from __future__ import annotations

from dataclasses import dataclass

from tuneutils.shared.command import option

REFUSAL = "I can't help with that."


@dataclass(frozen=True, kw_only=True)
class Params:
    system: str | None = option(None, help="System prompt.")
    adapter: tuple[str, ...] = option(
        (),
        help="An adapter for one language as LANG=FOLDER, or FOLDER alone for all others; once for each.",
        metavar="[LANG=]FOLDER",
    )
    language: str = option(
        "auto",
        help="Language to reply in: a code such as sw; auto: the user's; off: whatever the model does.",
    )
    language_note: bool = option(
        True, help="Say the language in the system prompt, unless that language has an adapter."
    )
    guard: str | None = option(None, help="A guard of this model; a reply that turns is cut off.", short="-g")
    refusal: str = option(REFUSAL, help="What is said in place of a reply that the guard cut off.")
    mask_personal: bool = option(
        False, help="Mask e-mail addresses, phone, card and account numbers in replies."
    )
    max_new_tokens: int = option(256, help="Longest reply, in tokens.", min=1)
    temperature: float = option(0.7, help="Divisor of the logits; 0 takes the likeliest token.", min=0.0)
    top_p: float = option(
        0.95, help="Keep the likeliest tokens of this probability; 1 keeps all.", min=0.001, max=1.0
    )
    top_k: int = option(0, help="Keep the k likeliest tokens; 0 keeps all.", min=0)
    history: str | None = option(
        None,
        help="JSONL file of messages: the conversation goes on from it and is written to it.",
        metavar="FILE",
        role="runtime",
    )
    serve: bool = option(False, help="Answer the OpenAI chat-completions protocol over HTTP.", role="runtime")
    host: str = option("127.0.0.1", help="Address for --serve.", role="runtime")
    port: int = option(8000, help="Port for --serve; 0 takes a free one.", min=0, max=65535, role="runtime")
    api_key: str | None = option(
        None, help="Clients of --serve must send this key; better set in the environment.", role="runtime"
    )
    allow_remote: bool = option(
        False, help="Let --host be an address that other machines reach; needs a key.", role="runtime"
    )
    queue: int = option(
        32, help="Requests that may wait for --serve; more are refused (429).", min=1, role="runtime"
    )
