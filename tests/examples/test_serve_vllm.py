"""The example of adapters that are switched between requests to vLLM's server, on a stand-in of the server."""

from __future__ import annotations

import io
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from examples.serve_vllm import __main__ as example
from shiradelta.errors import ArgumentError


class Stand(BaseHTTPRequestHandler):
    """What vLLM does: answers say the prompt and what is active; a prompt "refuse" is refused."""

    active: dict[str, float]
    loaded: set[str]
    updates: int
    version: str

    def do_GET(self) -> None:
        self._say({"data": [{"id": "m"}]} if self.path == "/v1/models" else {"weight_version": Stand.version})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        if self.path == "/update_weights":
            request = body["update_info"]
            Stand.loaded = (Stand.loaded | set(request["load"])) - set(request["unload"])
            Stand.active, Stand.updates = request["active"], Stand.updates + 1
        if self.path == "/finish_weight_update":
            Stand.version = body["weight_version"]
        if self.path == "/v1/completions":
            if "refuse" in body["prompt"]:
                return self._say({"error": "too long"}, 400)
            said = [{"index": i, "text": f"{one} {list(Stand.active)}"} for i, one in enumerate(body["prompt"])]
            return self._say({"choices": said[::-1]})
        return self._say({"success": True})

    def _say(self, answer: Any, status: int = 200) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url(tmp_path: Path) -> Any:
    Stand.active, Stand.loaded, Stand.updates, Stand.version = {}, set(), 0, "default"
    for name in "ab":
        (tmp_path / f"{name}.shd").touch()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stand)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def ask(url: str, folder: Path, requests: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "".join(f"{json.dumps(one)}\n" for one in requests)
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    monkeypatch.setattr("sys.argv", ["serve_vllm", url, str(folder)])
    example.main()


def test_requests_are_answered_in_order_with_a_switch_an_adapter(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    wanted = [("p", "a"), ("q", None), ("r", "b"), ("s", "a"), ("t", "b")]
    ask(url, tmp_path, [{"prompt": prompt, "adapter": name} for prompt, name in wanted], monkeypatch)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["text"] for one in found] == [f"{prompt} {[name] if name else []}" for prompt, name in wanted]
    assert [json.loads(one["version"])["adapters"] for one in found] == [{n: 1.0} if n else {} for _, n in wanted]
    assert (Stand.updates, Stand.active, Stand.loaded) == (4, {}, set())


def test_after_an_error_the_server_has_the_base(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        ask(url, tmp_path, [{"prompt": "p", "adapter": "a"}, {"prompt": "refuse", "adapter": "b"}], monkeypatch)
    assert "vLLM refuses /v1/completions (HTTP 400)" in capsys.readouterr().err
    assert (Stand.active, Stand.loaded) == ({}, set())


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"adapter": "a"}, 'line 1: give {"prompt": TEXT'),
        ([1], "line 1: give"),
        ({"prompt": "p", "adapter": 3}, "line 1: give"),
        ({"prompt": "p", "adapter": "c"}, "adapter 'c' is no .shd file in"),
        ({"prompt": "p", "adapter": "../a"}, r"adapter '\.\./a' is no"),
    ],
)
def test_lines_that_are_no_requests_are_refused(request_: Any, message: str, tmp_path: Path):
    (tmp_path / "a.shd").touch()
    with pytest.raises(ArgumentError, match=message):
        example.read([json.dumps(request_)], tmp_path)
