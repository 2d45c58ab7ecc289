"""What stands before the routes: the API key, the size of a body, the time to send it, and the count of requests."""

from __future__ import annotations

import asyncio
import secrets
import time

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from examples.serve.limits import Limits
from examples.serve.metrics import Metrics

#: Without a key: what a load balancer asks.
_OPEN = "/health/"


class Guard:
    """An ASGI middleware: refuses before a route, or a parser, sees a byte.

    Args:
        app: the service.
        limits: `body` and `seconds` of them.
        metrics: counts requests.
        key: the API key; None takes everybody.
    """

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics, key: str | None) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._key = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(message["status"]).inc()
                self._metrics.seconds.observe(time.perf_counter() - began)
            await send(message)

        headers = dict(scope["headers"])
        if not self._is_known(scope["path"], headers.get(b"authorization", b"")):
            await _refuse(401, "give the API key: Authorization: Bearer KEY")(scope, receive, counting)
            return
        try:
            async with asyncio.timeout(self._limits.seconds):
                body = await self._body(receive)
        except TimeoutError:
            await _refuse(408, "the body did not come in time")(scope, receive, counting)
            return
        if body is None:
            await _refuse(413, f"a request has at most {self._limits.body:,} bytes")(scope, receive, counting)
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, counting)

    def _is_known(self, path: str, given: bytes) -> bool:
        return self._key is None or path.startswith(_OPEN) or secrets.compare_digest(given, self._key)

    async def _body(self, receive: Receive) -> bytes | None:
        """The body; None if it is too large.  The rest of such a body is not read."""
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self._limits.body:
                return None
            if not message.get("more_body", False):
                return bytes(body)


def _refuse(status: int, detail: str) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, {"Connection": "close"})
