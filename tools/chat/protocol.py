"""The OpenAI chat-completions protocol: what of a request is understood, and how it is answered."""

from __future__ import annotations

import time
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

#: Of a request, what would change the answer and is not there: better refused than ignored.
UNSUPPORTED = (
    "tools", "functions", "tool_choice", "function_call", "logit_bias", "logprobs", "top_logprobs",
    "response_format", "audio", "prediction", "frequency_penalty", "presence_penalty", "web_search_options",
)  # fmt: skip

#: Values of those that ask for nothing.
HARMLESS: tuple[Any, ...] = (None, False, 0, [], {}, "none", "auto", {"type": "text"})


class ApiError(Exception):
    """An error in the protocol's own form."""

    def __init__(
        self, status: int, message: str, *, kind: str, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """Status 400."""
    return ApiError(400, message, kind="invalid_request_error", param=param, code=code)


class ChatMessage(BaseModel):
    """One turn; content in parts is joined if all of them are text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @field_validator("content", mode="before")
    @classmethod
    def joined(cls, value: Any) -> Any:
        if isinstance(value, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
            return "".join(str(p.get("text", "")) for p in value)
        return value


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """A request's body; names that are not here are ignored, save those in ``UNSUPPORTED``."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = None
    n: int = Field(1, ge=1, le=16)

    def turns(self) -> list[dict[str, str]]:
        """Messages as the chat template takes them."""
        roles = {"developer": "system"}
        return [{"role": roles.get(m.role, m.role), "content": m.content} for m in self.messages]

    def stops(self) -> list[str]:
        found = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        if len(found) > 4:
            raise bad_request("at most four stop sequences", param="stop")
        return found

    def refuse_unsupported(self) -> None:
        """Raises ApiError for what is asked for and not there."""
        for name, value in (self.model_extra or {}).items():
            if name in UNSUPPORTED and value not in HARMLESS:
                raise bad_request(f"{name} is not supported", param=name, code="unsupported_parameter")
        if self.turns()[-1]["role"] != "user":
            raise bad_request("the last message must be the user's", param="messages")


def completion(
    request_id: str, model: str, choices: list[dict[str, Any]], usage: dict[str, int]
) -> dict[str, Any]:
    """The whole answer."""
    return {**_head(request_id, model, "chat.completion"), "choices": choices, "usage": usage}


def chunk(
    request_id: str, model: str, index: int, delta: dict[str, str], finish: str | None = None
) -> dict[str, Any]:
    """One piece of a streamed answer."""
    choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": None}
    return {**_head(request_id, model, "chat.completion.chunk"), "choices": [choice]}


def usage_chunk(request_id: str, model: str, usage: dict[str, int]) -> dict[str, Any]:
    """The last piece, where usage is asked for."""
    return {**_head(request_id, model, "chat.completion.chunk"), "choices": [], "usage": usage}


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _head(request_id: str, model: str, kind: str) -> dict[str, Any]:
    return {"id": request_id, "object": kind, "created": int(time.time()), "model": model}
