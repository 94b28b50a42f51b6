"""``chat --serve``: the OpenAI chat-completions protocol over HTTP."""

from __future__ import annotations

import asyncio
import hmac
import json
import queue
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.datastructures import Headers
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from tuneutils.shared.command import Run, Summary
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.serving import LOOPBACK, check_host, listen, url_of
from tuneutils.tools.chat.assistant import Assistant, Reply, TooLong
from tuneutils.tools.chat.params import Params
from tuneutils.tools.chat.protocol import (
    ApiError,
    ChatRequest,
    bad_request,
    chunk,
    completion,
    usage_chunk,
    usage_of,
)

MAX_BODY_BYTES = 4 << 20
Piece = str | Reply | Exception
Give = Callable[[Piece], None]


def check_address(params: Params) -> None:
    """Raises ToolError (2) for an address that others reach without being allowed to, or without a key."""
    if check_host(params.host, params.allow_remote) and not params.api_key:
        raise ToolError("--allow-remote: needs a key; set TUNEUTILS_CHAT_API_KEY", code=ExitCode.USAGE)


def serve(run: Run[Params]) -> Summary:
    """Serve until Ctrl-C or SIGTERM."""
    import uvicorn

    listening = listen(run.params.host, run.params.port)
    worker = Worker(Assistant(run, run.inputs[0]), run)
    app = build_app(worker, run.params)
    config = uvicorn.Config(
        app, log_config=None, log_level="critical", access_log=False, server_header=False,
        timeout_graceful_shutdown=5,
    )  # fmt: skip
    run.log.info("listening on %s/v1 (Ctrl-C ends it)", url_of("http", listening, run.params.host))
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except (KeyboardInterrupt, SystemExit):
        pass  # uvicorn raises the signal again once it has shut down
    finally:
        worker.close()
        listening.close()
    return {"requests": worker.done, "refused": worker.refused}


class Worker:
    """The thread that the model runs in; requests wait for it in a queue of bounded length."""

    def __init__(self, assistant: Assistant, run: Run[Params]) -> None:
        self.assistant, self.run = assistant, run
        self.done = self.refused = 0
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(run.params.queue)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, request: ChatRequest, send: Give, cancelled: threading.Event) -> None:
        """Have a request answered: ``send`` gets texts, a ``Reply`` for each choice, or an exception.

        Raises:
            ApiError: too many wait already (429).
        """

        def job() -> None:
            try:
                self._answer(request, send, cancelled)
            except Exception as exc:  # whatever it is, the client waits for it
                send(exc)

        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self.refused += 1
            raise ApiError(429, "too many requests wait; try again", kind="rate_limit_error") from None

    def _answer(self, request: ChatRequest, send: Give, cancelled: threading.Event) -> None:
        first = request.seed if request.seed is not None else self.run.seed + 1000 * self.done
        for index in range(request.n):
            if cancelled.is_set():
                return
            sampling = self.assistant.sampling(
                abs(first) + index,
                max_new_tokens=request.max_completion_tokens or request.max_tokens,
                temperature=request.temperature,
                top_p=request.top_p,
            )

            def on_text(piece: str) -> bool:
                send(piece)
                return cancelled.is_set() or self._closing.is_set()

            send(self.assistant.reply(request.turns(), on_text, sampling, request.stops()))
        self.done += 1

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def close(self) -> None:
        """End the reply in course and the thread."""
        self._closing.set()
        while True:
            try:
                self._jobs.get_nowait()
            except queue.Empty:
                break
        self._jobs.put(None)
        self._thread.join(timeout=5)


class Gate:
    """Lets a request in whose key is right and whose body is small, before any of the body is read."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self.app, self.api_key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._error(Headers(scope=scope), scope)) is not None:
            await JSONResponse(error.body, error.status)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _error(self, headers: Headers, scope: Scope) -> ApiError | None:
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if (
            self.api_key
            and scope["path"] != "/health"
            and not hmac.compare_digest(given.encode(), self.api_key.encode())
        ):
            kind = "authentication_error"
            return ApiError(401, "wrong or missing API key", kind=kind, code="invalid_api_key")
        length = headers.get("content-length", "")
        if scope["method"] == "POST" and not length.isdecimal():
            return ApiError(411, "the request has no content-length", kind="invalid_request_error")
        if int(length or 0) > MAX_BODY_BYTES:
            return ApiError(413, "the request is too large", kind="invalid_request_error")
        return None


def build_app(worker: Worker, params: Params) -> FastAPI:
    """The application."""
    app = FastAPI(title="tuneutils chat", docs_url=None, redoc_url=None, openapi_url=None)
    if params.host in LOOPBACK:  # another site's page that names this machine must not get in
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    app.add_middleware(Gate, api_key=params.api_key)
    model = worker.assistant.name

    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, exc: ApiError) -> JSONResponse:
        return JSONResponse(exc.body, exc.status)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, exc: RequestValidationError) -> JSONResponse:
        found = exc.errors()[0]
        place = ".".join(str(p) for p in found["loc"] if p != "body")
        error = bad_request(f"{place}: {found['msg']}" if place else found["msg"], param=place or None)
        return JSONResponse(error.body, error.status)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [{"id": model, "object": "model", "created": 0, "owned_by": "tuneutils"}],
        }

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> JSONResponse | StreamingResponse:
        body.refuse_unsupported()
        body.stops()
        request_id = f"chatcmpl-{uuid.uuid4().hex}"
        answer = Answer(worker, body, params, request_id, model)
        if body.stream:
            first = await answer.first()  # errors of the request itself still have their status
            events = answer.events(first)
            fresh = {"cache-control": "no-cache"}
            return StreamingResponse(events, media_type="text/event-stream", headers=fresh)
        return JSONResponse(await answer.whole(request))

    return app


class Answer:
    """One request's answer as it comes from the worker."""

    def __init__(
        self, worker: Worker, body: ChatRequest, params: Params, request_id: str, model: str
    ) -> None:
        self.body, self.params, self.id, self.model = body, params, request_id, model
        self.cancelled = threading.Event()
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def send(piece: Piece) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        worker.submit(body, send, self.cancelled)

    async def first(self) -> str | Reply:
        """The first piece.

        Raises:
            ApiError: the request could not be answered.
        """
        piece = await self._pieces.get()
        if isinstance(piece, Exception):
            raise _as_api_error(piece) from piece
        return piece

    async def whole(self, request: Request) -> dict[str, Any]:
        """The answer at once; a client that goes away ends it."""
        choices: list[dict[str, Any]] = []
        prompt = made = 0
        watch = asyncio.create_task(self._watch(request))
        try:
            while len(choices) < self.body.n:
                piece = await self.first()
                if isinstance(piece, Reply):
                    choices.append(self._choice(len(choices), piece))
                    prompt, made = piece.prompt_tokens, made + piece.completion_tokens
        finally:
            watch.cancel()
        return completion(self.id, self.model, choices, usage_of(prompt, made))

    def _choice(self, index: int, reply: Reply) -> dict[str, Any]:
        filtered = reply.finish_reason == "content_filter"
        text = self.params.refusal if filtered else reply.text
        message = {"role": "assistant", "content": text, "refusal": text if filtered else None}
        return {"index": index, "message": message, "finish_reason": reply.finish_reason, "logprobs": None}

    async def _watch(self, request: Request) -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.25)
        self.cancelled.set()

    async def events(self, piece: Piece) -> AsyncIterator[str]:
        """Server-sent events; closing the connection ends the reply."""
        index = prompt = made = 0
        try:
            yield self._event(chunk(self.id, self.model, 0, {"role": "assistant", "content": ""}))
            while True:
                if isinstance(piece, Exception):
                    yield self._event(_as_api_error(piece).body)
                    return
                if isinstance(piece, str):
                    yield self._event(chunk(self.id, self.model, index, {"content": piece}))
                else:
                    if piece.finish_reason == "content_filter":
                        text = ("\n" if piece.text else "") + self.params.refusal
                        yield self._event(chunk(self.id, self.model, index, {"content": text}))
                    yield self._event(chunk(self.id, self.model, index, {}, piece.finish_reason))
                    prompt, made, index = piece.prompt_tokens, made + piece.completion_tokens, index + 1
                    if index == self.body.n:
                        break
                piece = await self._pieces.get()
            if self.body.stream_options and self.body.stream_options.include_usage:
                yield self._event(usage_chunk(self.id, self.model, usage_of(prompt, made)))
            yield "data: [DONE]\n\n"
        finally:
            self.cancelled.set()

    @staticmethod
    def _event(value: dict[str, Any]) -> str:
        return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _as_api_error(exc: Exception) -> ApiError:
    if isinstance(exc, ApiError):
        return exc
    if isinstance(exc, TooLong):
        return bad_request(str(exc), param="messages", code="context_length_exceeded")
    if isinstance(exc, ToolError):
        return bad_request(str(exc), param="messages")
    return ApiError(500, f"{type(exc).__name__}: the reply could not be made", kind="server_error")
