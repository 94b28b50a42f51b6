"""What guards every request: headers, host names, body size and rate."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
SendError = Callable[[Scope, Receive, Send, int, str], object]


class TooLarge(Exception):
    """A body beyond the limit, met while it was read."""


@dataclass
class Limiter:
    """Token buckets, one a key (a rater's cookie, an address), the least used forgotten first.

    Args:
        per_s: tokens a second.
        burst: tokens of a full bucket.
    """

    per_s: float
    burst: float
    clock: Callable[[], float] = time.monotonic
    max_keys: int = 10_000
    _buckets: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)

    def _level(self, key: str) -> float:
        level, since = self._buckets.get(key, (self.burst, self.clock()))
        return min(self.burst, level + (self.clock() - since) * self.per_s)

    def take(self, key: str) -> bool:
        """Whether one more is allowed now, which then counts."""
        level = self._level(key)
        allowed = level >= 1
        self._buckets[key] = (level - allowed, self.clock())
        self._buckets.move_to_end(key)
        if len(self._buckets) > self.max_keys:
            self._buckets.popitem(last=False)
        return allowed

    def allows(self, key: str) -> bool:
        """Whether ``take`` would succeed; counts nothing."""
        return self._level(key) >= 1


class Guard:
    """ASGI middleware around the page.

    Args:
        hosts: names in the Host header that are served; empty serves all.
        send_error: sends an error page.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: frozenset[str],
        max_body_bytes: int,
        requests_per_s: float,
        https: bool,
        cookie: str,
        send_error: Callable[..., ASGIApp],
    ) -> None:
        self.app = app
        self.hosts = hosts
        self.max_body_bytes = max_body_bytes
        self.cookie = cookie
        self.send_error = send_error
        self.headers = dict(HEADERS)
        if https:
            self.headers["strict-transport-security"] = "max-age=31536000"
        self.by_rater = Limiter(requests_per_s, 10 * requests_per_s)
        # Many raters can share one address, and the page's own files count too.
        self.by_address = Limiter(50 * requests_per_s, 500 * requests_per_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        app = self.app if refusal is None else self.send_error(*refusal)
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in self.headers.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            await app(scope, self._bounded(receive), send_with_headers)
        except TooLarge:
            if not started:
                await self.send_error(413, "That is too long to be stored.")(
                    scope, receive, send_with_headers
                )

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        connection = HTTPConnection(scope)
        host = urlsplit(f"//{connection.headers.get('host', '')}").hostname or ""
        if self.hosts and host not in self.hosts:
            return 421, "This server does not go by that name (--trusted-host)."
        length = connection.headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self.max_body_bytes:
            return 413, "That is too long to be stored."
        address = connection.client.host if connection.client else ""
        cookie = connection.cookies.get(self.cookie)
        allowed = self.by_address.take(address)
        if cookie is not None and not scope["path"].startswith("/static/"):
            allowed = self.by_rater.take(cookie) and allowed
        return None if allowed else (429, "Too many requests. Wait a moment, then go on.")

    def _bounded(self, receive: Receive) -> Receive:
        """A body without a length is counted as it comes."""
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_body_bytes:
                raise TooLarge
            return message

        return bounded


def same_origin(headers: Headers) -> bool:
    """Whether a form was sent from this site, by what browsers say and scripts cannot forge.

    Clients that are no browsers send neither header.
    """
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc == headers.get("host")
