"""The example service as strangers see it: what is answered, what is refused, and that neighbours never notice."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import shiradelta as sd
from examples.serve.adapters import Adapters
from examples.serve.limits import Limits

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("prometheus_client")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

from examples.serve.app import make_app  # noqa: E402

LIMITS = Limits(body=10_000, texts=4, characters=100, seconds=5)
Session = tuple[sd.HotSwap, torch.Tensor]


def tokenize(texts: list[str]) -> list[str]:
    """Refuses a text without words, as a tokenizer may."""
    if not all(texts):
        raise ValueError(f"text {texts.index('')} has no tokens")
    return texts


@pytest.fixture
def client(session: Session, folder: Path) -> Iterator[Any]:
    from fastapi.testclient import TestClient

    swap, weight = session

    def compute(texts: list[str]) -> list[list[float]]:
        assert "fail" not in texts, "an error of the model"
        if "slow" in texts:
            time.sleep(0.2)
        return [[float(weight[0, 0])] for _ in texts]

    app = make_app(swap, compute, tokenize, Adapters(swap, folder, LIMITS), LIMITS)
    with TestClient(app, raise_server_exceptions=False) as opened:
        yield opened


def test_texts_are_answered_with_their_adapter(client: Any):
    answer = client.post("/embed", json={"texts": ["a", "b"], "adapter": "add2"}).json()
    assert answer["vectors"] == [[2.0], [2.0]]
    assert answer["switch_ms"] > 0
    assert client.post("/embed", json={"texts": ["a"]}).json()["vectors"] == [[0.0]]
    assert client.get("/adapters").json()["loaded"]["add1"]["nonzeros"] == 1


BAD: dict[str, tuple[bytes, int]] = {
    "no texts": (b'{"texts": []}', 422),
    "too many texts": (b'{"texts": ["a", "a", "a", "a", "a"]}', 422),
    "a lone surrogate": (b'{"texts": ["a", "\\ud800"]}', 422),
    "a lone surrogate as adapter": (b'{"texts": ["a"], "adapter": "\\ud800"}', 404),
    "a long text": (json.dumps({"texts": ["a" * 101]}).encode(), 422),
    "an empty text": (b'{"texts": ["a", ""]}', 422),
    "no text": (b'{"texts": [null]}', 422),
    "a number": (b'{"texts": [1]}', 422),
    "a string": (b'{"texts": "abc"}', 422),
    "nothing": (b"", 422),
    "no JSON": (b"{", 422),
    "not UTF-8": (b'{"texts": ["\xff"]}', 400),
    "deep JSON": (b'{"texts": ' + b"[" * 4000, 422),
    "a deep value": (b'{"texts": ' + b"[" * 4000 + b"]" * 4000 + b"}", 422),
    "a large number": (b'{"texts": [' + b"9" * 5000 + b"]}", 422),
    "a large body": (b'{"texts": ["a"], "more": "' + b"a" * 20_000 + b'"}', 413),
    "an unknown adapter": (b'{"texts": ["a"], "adapter": "none"}', 404),
    "a path": (b'{"texts": ["a"], "adapter": "../add3"}', 404),
    "an error of the model": (b'{"texts": ["fail"]}', 500),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused_and_their_neighbours_answered(client: Any, case: str):
    body, status = BAD[case]
    headers = {"Content-Type": "application/json"}
    with ThreadPoolExecutor(5) as threads:
        slow = threads.submit(client.post, "/embed", json={"texts": ["slow"]})  # so that the others wait together
        time.sleep(0.05)
        good = [threads.submit(client.post, "/embed", json={"texts": ["a"], "adapter": "add1"}) for _ in range(2)]
        bad = threads.submit(client.post, "/embed", content=body, headers=headers)
        good += [threads.submit(client.post, "/embed", json={"texts": ["a"]})]
    assert slow.result().status_code == 200
    assert [one.result().json()["vectors"] for one in good] == [[[1.0]], [[1.0]], [[0.0]]]
    assert bad.result().status_code in (status, 400 if status == 422 else status)
    assert len(bad.result().text) < 1000
    assert bad.result().json()["detail"]


def test_a_body_without_a_length_is_limited_too(client: Any):
    def parts() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    assert client.post("/embed", content=parts()).status_code == 413


def test_a_request_that_takes_too_long_is_given_up(session: Session):
    from fastapi.testclient import TestClient

    release = threading.Event()

    def compute(texts: list[str]) -> list[list[float]]:
        release.wait(20)
        return [[1.0]] * len(texts)

    app = make_app(session[0], compute, limits=Limits(seconds=0.3))
    with TestClient(app) as client:
        assert client.post("/embed", json={"texts": ["a"]}).status_code == 504
        release.set()
        assert client.post("/embed", json={"texts": ["a"]}).json()["vectors"] == [[1.0]]


def test_a_full_queue_is_said_so(session: Session):
    from fastapi.testclient import TestClient

    begun, release = threading.Event(), threading.Event()

    def compute(texts: list[str]) -> list[list[float]]:
        begun.set()
        release.wait(20)
        return [[1.0]] * len(texts)

    app = make_app(session[0], compute, limits=Limits(waiting=1))
    with TestClient(app) as client, ThreadPoolExecutor(1) as threads:
        first = threads.submit(client.post, "/embed", json={"texts": ["a"]})
        assert begun.wait(10)
        second = client.post("/embed", json={"texts": ["b"]})
        release.set()
    assert first.result().status_code == 200
    assert (second.status_code, second.headers["Retry-After"]) == (503, "1")


def test_adapters_come_and_go_while_it_runs(client: Any):
    ask = {"texts": ["a"], "adapter": "add3"}
    assert client.get("/adapters").json()["available"] == ["add3", "add4", "add5"]
    assert client.post("/embed", json=ask).status_code == 404
    assert client.put("/adapters/add3").json()["nonzeros"] == 1
    assert client.post("/embed", json=ask).json()["vectors"] == [[3.0]]
    assert client.delete("/adapters/add3").status_code == 204
    assert client.post("/embed", json=ask).status_code == 404
    assert client.post("/embed", json={"texts": ["a"]}).json()["vectors"] == [[0.0]]
    assert client.delete("/adapters/add3").status_code == 404
    assert client.put("/adapters/nothing").status_code == 404
    assert client.put("/adapters/..%2Fsecret").status_code == 404


def test_a_damaged_adapter_is_refused_with_the_reason(client: Any, folder: Path):
    (folder / "add3.shd").write_bytes(b"no")
    refused = client.put("/adapters/add3")
    assert refused.status_code == 409
    assert "it is not a shiradelta file" in refused.json()["detail"]


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer secret", 200),
        ("Bearer wrong", 401),
        ("bearer secret", 401),
        ("secret", 401),
        (None, 401),
        (b"Bearer \xe4", 401),
    ],
)
def test_an_api_key(session: Session, header: str | bytes | None, status: int):
    from fastapi.testclient import TestClient

    app = make_app(session[0], lambda texts: [[1.0]] * len(texts), key="secret")
    headers = {} if header is None else {"Authorization": header}
    with TestClient(app) as client:
        assert client.post("/embed", json={"texts": ["a"]}, headers=headers).status_code == status
        assert client.get("/metrics", headers=headers).status_code == status
        assert client.put("/adapters/add1", headers=headers).status_code in (status, 200 if status == 200 else 401)
        assert client.get("/health/live").status_code == client.get("/health/ready").status_code == 200


def test_metrics(client: Any):
    client.post("/embed", json={"texts": ["a", "b"], "adapter": "add1"})
    client.post("/embed", json={"texts": []})
    text = client.get("/metrics").text
    assert 'serve_requests_total{status="200"} 1.0' in text
    assert 'serve_requests_total{status="422"} 1.0' in text
    assert "serve_batch_texts_sum 2.0" in text
    assert "serve_adapters 2.0" in text
    assert "serve_waiting_texts 0.0" in text


def test_a_dead_thread_is_not_ready(client: Any):
    assert client.get("/health/ready").status_code == 200
    client.app.state.batcher.close()
    assert client.get("/health/ready").status_code == 503
    assert client.get("/health/live").status_code == 200
    assert client.post("/embed", json={"texts": ["a"]}).status_code == 503


def test_a_stop_answers_what_waits(session: Session):
    """A real server: it is told to stop while a request is computed."""
    uvicorn = pytest.importorskip("uvicorn")
    httpx = pytest.importorskip("httpx")
    begun, release = threading.Event(), threading.Event()

    def compute(texts: list[str]) -> list[list[float]]:
        begun.set()
        release.wait(20)
        return [[1.0]] * len(texts)

    config = uvicorn.Config(make_app(session[0], compute), port=0, log_level="error", timeout_graceful_shutdown=20)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with ThreadPoolExecutor(2) as threads:
            asked = [
                threads.submit(httpx.post, f"http://127.0.0.1:{port}/embed", json={"texts": ["a"]}, timeout=30)
                for _ in range(2)
            ]
            assert begun.wait(10)
            time.sleep(0.2)
            server.should_exit = True
            time.sleep(0.2)
            release.set()
            assert [one.result().status_code for one in asked] == [200, 200]
    finally:
        server.should_exit = True
        release.set()
        thread.join(30)
    assert not thread.is_alive()
