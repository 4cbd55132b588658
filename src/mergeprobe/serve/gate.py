"""Before a request reaches the application: who asks, through which name, and with how much."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from mergeprobe.serve.job import Failure

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN = ("/health",)  # answers without a token
QUEUED = ("/v1/completions", "/v1/chat/completions")  # what waits for the model
ARRIVAL = 30.0  # seconds that a body may take to arrive


class Gate:
    """ASGI middleware. token: asked of every request but /health; None only on loopback, where
    then the Host header must be a loopback name (a web page could rebind its own to it).
    body: the most bytes; they are read before the application sees the request. full: why what
    waits for the model is refused now, before it is parsed: under a flood of requests parsing them
    would take the processor from those that run."""

    def __init__(
        self,
        app: Application,
        *,
        token: str | None,
        body: int,
        full: Callable[[], Failure | None] = lambda: None,
    ) -> None:
        self.app, self.token, self.body, self.full = app, token, body, full

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if (refusal := self._refusal(scope["path"], headers)) is not None:
            await refuse(send, *refusal)
            return
        try:
            content = await asyncio.wait_for(self._content(headers, receive), ARRIVAL)
        except TimeoutError:
            await refuse(send, 408, f"the body did not arrive within {ARRIVAL:.0f} seconds")
            return
        if content is None:
            await refuse(send, 413, f"the body is larger than {self.body} bytes")
            return
        waits = scope["method"] == "POST" and scope["path"] in QUEUED
        if waits and (failure := self.full()) is not None:
            again = failure.retry_after
            await refuse(send, failure.status, failure.message, retry_after=again, close=False)
            return
        given = False

        async def replayed() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": content, "more_body": False}

        await self.app(scope, replayed, send)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        if self.token is None:
            host = headers.get(b"host", b"").decode("latin-1")
            return None if is_loopback(host_name(host)) else (403, f"no server for {host[:80]!r}")
        if path in OPEN:
            return None
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        right = hmac.compare_digest(given.strip(), self.token.encode())
        if scheme.lower() == b"bearer" and right:
            return None
        return 401, "wrong or missing token; send it as 'Authorization: Bearer …'"

    async def _content(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The whole body; None where it is too large."""
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.body:
            return None
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":  # gone already
                return b""
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.body:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)


async def refuse(
    send: Send, status: int, message: str, *, retry_after: int | None = None, close: bool = True
) -> None:
    content = json.dumps(error_body(status, message)).encode()
    headers = [(b"content-type", b"application/json")]
    if close:  # the body may not have been read
        headers.append((b"connection", b"close"))
    if retry_after is not None:
        headers.append((b"retry-after", str(retry_after).encode()))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    headers.append((b"content-length", str(len(content)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


KINDS = {
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", None),
    404: ("invalid_request_error", "not_found"),
    429: ("rate_limit_error", "queue_full"),
}


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's API words it."""
    otherwise = "server_error" if status >= 500 else "invalid_request_error"
    kind, known = KINDS.get(status, (otherwise, None))
    return {"error": {"message": message, "type": kind, "param": param, "code": code or known}}


def host_name(header: str) -> str:
    """The name in a Host header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


def is_loopback(host: str) -> bool:
    """Whether an address or name can only be reached from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
