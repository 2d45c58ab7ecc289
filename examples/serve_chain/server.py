"""The requests of slime's trainer, over HTTP: `http.server` of the standard library, with limits.

Names and bodies of requests as slime sends them to its engines: slime/backends/sglang_utils/sglang_engine.py and
slime/backends/megatron_utils/update_weight/update_weight_from_disk_delta.py, November 2026.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any
from urllib.parse import urlsplit

import shiradelta as sd
from examples.serve_chain.engines import EngineError
from examples.serve_chain.receiver import Receiver

#: The most bytes of a body, requests at a time, and seconds that a client may take to send its own.
BODY, CONNECTIONS, SECONDS = 1 << 16, 16, 30.0
#: What needs no key.
OPEN = ("/health", "/health_generate")
Body = dict[str, Any]


class _RefusedError(Exception):
    """A request that is refused: its status, and why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class ChainServer(ThreadingHTTPServer):
    """Serves a receiver.

    Args:
        receiver: what does the work.
        address: (host, port); port 0 for a free one.
        key: what callers send as `Authorization: Bearer KEY`; None takes everybody.
    """

    daemon_threads = True

    def __init__(self, receiver: Receiver, address: tuple[str, int] = ("127.0.0.1", 0), key: str | None = None) -> None:
        super().__init__(address, _Handler)
        self.receiver, self.key, self.free = receiver, key, BoundedSemaphore(CONNECTIONS)


class _Handler(BaseHTTPRequestHandler):
    server: ChainServer
    timeout = SECONDS

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, body: Body) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def _handle(self) -> None:
        if not self.server.free.acquire(blocking=False):
            self._answer(503, {"success": False, "message": f"{CONNECTIONS} requests are served already; try again"})
            return
        try:
            self._answer(200, self._done())
        except _RefusedError as error:
            self._answer(error.status, {"success": False, "message": str(error)})
        except sd.ShiraDeltaError as error:
            self._answer(400, {"success": False, "message": str(error)})
        except EngineError as error:
            self._answer(502, {"success": False, "message": str(error)})
        finally:
            self.server.free.release()

    def _done(self) -> Body:
        path = urlsplit(self.path).path
        known = GET if self.command == "GET" else POST
        if path not in known:
            status = 405 if path in (GET | POST) else 404
            raise _RefusedError(status, f"{self.command} {path} is unknown; known are {', '.join(sorted(known))}")
        given = self.headers.get("Authorization") or ""
        expected = given if self.server.key is None or path in OPEN else f"Bearer {self.server.key}"
        if not secrets.compare_digest(given.encode(), expected.encode()):
            raise _RefusedError(401, "give the key: Authorization: Bearer KEY")
        return known[path](self.server.receiver, self._body() if self.command == "POST" else {})

    def _body(self) -> Body:
        size = self.headers.get("Content-Length") or ""
        if not size.isascii() or not size.isdigit():
            raise _RefusedError(411, "a request needs a Content-Length")
        if int(size) > BODY:
            raise _RefusedError(413, f"a request has at most {BODY:,} bytes")
        try:
            raw = self.rfile.read(int(size))
            found = json.loads(raw or b"{}")
        except TimeoutError:
            raise _RefusedError(408, "the body did not come in time") from None
        except (ValueError, RecursionError):
            raise _RefusedError(422, "the body is no JSON") from None
        if not isinstance(found, dict):
            raise _RefusedError(422, "the body is no object of JSON")
        return found

    do_GET = do_POST = _handle  # noqa: N815 - the names that http.server calls


def _version(body: Body, key: str) -> int | None:
    """A version in a body, as a number or as digits; None if there is none."""
    value = body.get(key)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 16:
        value = int(value)
    if value is not None and (type(value) is not int or not 0 <= value < 1 << 53):
        raise _RefusedError(422, f"{key} is no version: {str(value)[:40]!r}")
    return value


def _same_folder(body: Body, key: str, expected: Path | None) -> None:
    """Refuses a folder other than the server's own: a request does not say what is read or written."""
    given = body.get(key)
    if given is not None and (not isinstance(given, str) or expected is None or Path(given) != expected):
        raise _RefusedError(422, f"{key} is {str(given)[:200]!r}, and this server was started with {str(expected)!r}")


def _pull(receiver: Receiver, body: Body) -> Body:
    _same_folder(body, "local_checkpoint_dir", receiver.folder)
    _same_folder(body, "source_dir", receiver.source)
    target = _version(body, "target_version")
    if target is None:
        raise _RefusedError(422, "target_version is missing")
    receiver.pull(target)
    return {"success": True, "message": f"the folder is version {target}"}


def _update(receiver: Receiver, body: Body) -> Body:
    _same_folder(body, "model_path", receiver.folder)
    version = receiver.update(_version(body, "weight_version"))
    return {"success": True, "message": f"the engine has version {version}", "num_paused_requests": 0}


def _pause(receiver: Receiver, body: Body) -> Body:
    mode = body.get("mode")
    if mode is not None and not isinstance(mode, str):
        raise _RefusedError(422, f"mode is no text: {str(mode)[:40]!r}")
    receiver.pause(mode)
    return {"success": True, "message": "paused"}


def _resume(receiver: Receiver, body: Body) -> Body:
    receiver.resume()
    return {"success": True, "message": "resumed"}


def _flush(receiver: Receiver, body: Body) -> Body:
    receiver.flush()
    return {"success": True, "message": "flushed"}


def _about(receiver: Receiver, body: Body) -> Body:
    return {"weight_version": str(receiver.version), "paused": receiver.paused}


def _health(receiver: Receiver, body: Body) -> Body:
    return {"success": True}


Route = Callable[[Receiver, Body], Body]
GET: dict[str, Route] = {
    "/flush_cache": _flush,
    "/get_weight_version": _about,
    "/health": _health,
    "/health_generate": _health,
}
POST: dict[str, Route] = {
    "/continue_generation": _resume,
    "/flush_cache": _flush,
    "/pause_generation": _pause,
    "/pull_weights": _pull,
    "/update_weights_from_disk": _update,
}
