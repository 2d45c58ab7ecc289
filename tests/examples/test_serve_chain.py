"""The receiver of slime's steps: what it does with them, in which order, and what it refuses."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

import shiradelta as sd
from examples.serve_chain import server as served
from examples.serve_chain.engines import EngineError, FolderOnly, VllmServer
from examples.serve_chain.receiver import Receiver
from examples.serve_chain.server import ChainServer
from shiradelta.chain import Chain
from shiradelta.chain.wires.registry import write_wire
from tests.chain.models import Model, change, read, same, set_step, write

pytest.importorskip("zstandard")


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[int]:
    """The port of a server that runs."""
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class StandIn(ThreadingHTTPServer):
    """vLLM's server as far as it is asked: a HotSwap on arrays, and a record of what came."""

    daemon_threads = True

    def __init__(self, model: Model) -> None:
        super().__init__(("127.0.0.1", 0), _StandInHandler)
        self.weights = {name: bits.reshape(shape).copy() for name, (_, shape, bits) in model.items()}
        self.swap = sd.HotSwap(self.weights)
        self.log: list[str] = []
        self.refuses, self.has_session = "", False


class _StandInHandler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        what = self.path if self.path != "/collective_rpc" else body["method"]
        self.server.log.append(what)
        status, answer = 200, {"success": True}
        if what == self.server.refuses:
            status, answer = 500, {"error": "no"}  # type: ignore[dict-item]
        elif what == "shd_init":
            self.server.has_session = True
        elif what == "shd_info":
            active = {name: {"strength": strength} for name, strength in self.server.swap.active.items()}
            status, answer = (200, {"results": [{"adapters": active}]}) if self.server.has_session else (500, {})  # type: ignore[dict-item]
        elif what == "shd_update":
            (request,) = body["args"]
            for name, path in request["load"].items():
                self.server.swap.load(name, path)
            self.server.swap.switch(request["active"])
            for name in request["unload"]:
                self.server.swap.unload(name)
        raw = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


class Scene:
    """slime's shared folder, a receiver, and a stand-in of vLLM."""

    def __init__(self, root: Path) -> None:
        rng = np.random.default_rng(0)
        self.root, self.shared = root, root / "shared"
        self.models: list[Model] = [{"w": ("bfloat16", (16, 8), rng.integers(0, 1 << 14, 128).astype("<u2"))}]
        write(root / "model", self.models[0])
        base = root / "model"
        for version in (1, 2, 3):
            self.models.append(change(self.models[-1], rng))
            sd.save_delta(root / "step.shd", set_step(self.models[-2], self.models[-1]))
            numbers = {"version": str(version), "base_version": str(version - 1)}
            write_wire("slime", root / "step.shd", base, self.shared / f"weight_v{version:06d}", **numbers)
            base = write(root / f"after{version}", self.models[-1])
        self.vllm = StandIn(self.models[0])
        self.chain = Chain.create(root / "chain", root / "model")

    def receiver(self, vllm: int | None) -> Receiver:
        engine = FolderOnly() if vllm is None else VllmServer(f"http://127.0.0.1:{vllm}", self.root / "model")
        return Receiver(self.chain, self.root / "local", engine, self.shared)

    def layers(self) -> list[str]:
        return list(self.vllm.swap.loaded)

    def has(self, version: int) -> bool:
        return np.array_equal(self.vllm.weights["w"].reshape(-1), self.models[version]["w"][2])


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    made.vllm.server_close()


def ask(port: int, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, Any]]:
    """(status, body) of an answer."""
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    raw = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
    connection.request(method, path, raw if method == "POST" else None, headers)
    answer = connection.getresponse()
    found = json.loads(answer.read())
    connection.close()
    return answer.status, found


def test_what_slime_sends_brings_each_version_into_the_engine(scene: Scene):
    with running(scene.vllm) as vllm, running(ChainServer(scene.receiver(vllm))) as port:
        where = {"local_checkpoint_dir": str(scene.root / "local"), "source_dir": str(scene.shared)}
        assert ask(port, "POST", "/pull_weights", {**where, "target_version": 0})[0] == 200
        for version in (1, 2, 3):
            assert ask(port, "POST", "/pull_weights", {**where, "target_version": version})[0] == 200
            assert scene.has(version - 1)
            scene.vllm.log.clear()
            assert ask(port, "POST", "/pause_generation")[0] == 200
            assert ask(port, "GET", "/flush_cache")[0] == 200
            update = {"model_path": str(scene.root / "local"), "weight_version": str(version)}
            status, answer = ask(port, "POST", "/update_weights_from_disk", update)
            assert (status, answer["success"]) == (200, True), answer
            assert ask(port, "GET", "/get_weight_version")[1] == {"weight_version": str(version), "paused": True}
            assert ask(port, "POST", "/continue_generation")[0] == 200
            updates = ["shd_info", "shd_init", "shd_update"] if version == 1 else ["shd_update"]
            cache = "/reset_prefix_cache"
            assert scene.vllm.log == ["/pause?mode=wait", cache, *updates, cache, "/resume"]
            assert scene.has(version)
            assert same(read(scene.root / "local"), scene.models[version])
        assert scene.layers() == ["version 1 from 0", "version 2 from 1", "version 3 from 2"]
        # Back: the folder's steps are taken back, and the engine goes there at once.
        assert ask(port, "POST", "/pull_weights", {**where, "target_version": 1})[0] == 200
        scene.vllm.log.clear()
        assert ask(port, "POST", "/update_weights_from_disk")[0] == 200
        assert scene.vllm.log == ["/pause?mode=wait", "shd_update", "/reset_prefix_cache", "/resume"]
        assert scene.has(1)
        assert scene.layers() == ["version 1 from 0"]


def test_the_engine_goes_the_way_of_the_fewest_bytes(scene: Scene, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("examples.serve_chain.receiver.MOST_LAYERS", 2)
    with running(scene.vllm) as vllm:
        receiver = scene.receiver(vllm)
        for version, layers in (
            (1, ["version 1 from 0"]),
            (3, ["version 3 from 0"]),  # three steps are too many: a fold, which the chain keeps
            (2, ["version 1 from 0", "version 2 from 1"]),
            (0, []),
            (3, ["version 3 from 0"]),
        ):
            receiver.pull(version)
            assert receiver.update(version) == version
            assert scene.layers() == layers
            assert scene.has(version)
        assert len([step for step in scene.chain.manifest.since(0) if step.start == 0 and step.stop == 3]) == 1


def test_steps_that_are_read_with_the_version_before_come_one_by_one(tmp_path: Path):
    """Each is loaded when the version that it was made for is on the weights."""
    bits = (np.random.default_rng(0).standard_normal(4096).astype(np.float32).view("<u4") >> 16).astype("<u2")
    models: list[Model] = [{"w": ("bfloat16", (64, 64), bits)}]
    folder = write(tmp_path / "0", models[0])
    chain = Chain.create(tmp_path / "chain", folder)
    for version in (1, 2):
        bits = bits + version * ((bits & 0x7FFF) < 0x3D00).astype("<u2")
        models.append({"w": ("bfloat16", (64, 64), bits)})
        after = write(tmp_path / str(version), models[-1])
        chain.publish(after, base=folder)
        folder = after
    with StandIn(models[0]) as vllm, running(vllm) as port:
        receiver = Receiver(chain, tmp_path / "local", VllmServer(f"http://127.0.0.1:{port}", tmp_path / "0"))
        receiver.pull(2)
        with sd.open_delta(chain.store.fetched(*_file(chain, 2))) as delta:
            assert delta.needs_base
        assert receiver.update() == 2
        assert np.array_equal(vllm.weights["w"].reshape(-1), bits)
        assert vllm.log.count("shd_update") == 2
        assert vllm.log.count("/resume") == 1


def _file(chain: Chain, version: int) -> tuple[str, int, str]:
    """Where the step to a version is."""
    (step,) = [step for step in chain.manifest.since(version - 1) if step.stop == version]
    return step.path, step.bytes, step.sha256


def test_a_receiver_that_is_started_again_goes_on(scene: Scene):
    scene.receiver(None).pull(2)
    with running(scene.vllm) as vllm:
        receiver = scene.receiver(vllm)
        assert receiver.version == 0  # what the engine has; it was started with that
        assert receiver.update() == 2
        assert scene.has(2)
        receiver.pull(3)
        assert receiver.update(3) == 3
        scene.vllm.log.clear()
        again = scene.receiver(vllm)  # vLLM has run on
        assert (again.update(), again.version) == (3, 3)
        assert scene.vllm.log == ["shd_info"]
        again.pull(2)
        assert again.update(2) == 2
        assert scene.has(2)
        scene.vllm.swap.revert()
        scene.vllm.swap.load("look", str(scene.root / "step.shd"), check=False)
        scene.vllm.swap.switch("look")
        with pytest.raises(EngineError, match="no version"):
            scene.receiver(vllm).update()


@pytest.mark.parametrize("refuses", ["shd_update", "/pause?mode=wait", "/resume"])
def test_an_engine_that_refuses_keeps_its_version_and_goes_on(scene: Scene, refuses: str):
    with running(scene.vllm) as vllm, running(ChainServer(scene.receiver(vllm))) as port:
        assert ask(port, "POST", "/pull_weights", {"target_version": 1})[0] == 200
        scene.vllm.refuses = refuses
        status, answer = ask(port, "POST", "/update_weights_from_disk")
        assert status == 502
        assert "vLLM answered 500" in answer["message"]
        if refuses == "shd_update":
            assert scene.vllm.log[-1] == "/resume"
        done = refuses == "/resume"
        assert scene.has(int(done))
        assert ask(port, "GET", "/get_weight_version")[1]["weight_version"] == str(int(done))
        scene.vllm.refuses = ""
        assert ask(port, "POST", "/update_weights_from_disk")[0] == 200
        assert scene.has(1)
    status, answer = 0, {}
    with running(ChainServer(scene.receiver(1))) as port:  # nobody is there
        status, answer = ask(port, "POST", "/update_weights_from_disk", {"weight_version": 1})
    assert status == 502
    assert "\n" not in answer["message"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "why"),
    [
        ("GET", "/nothing", None, 404, "/get_weight_version"),
        ("GET", "/pull_weights", None, 405, "unknown"),
        ("POST", "/pull_weights", {}, 422, "target_version is missing"),
        ("POST", "/pull_weights", {"target_version": -1}, 422, "no version"),
        ("POST", "/pull_weights", {"target_version": True}, 422, "no version"),
        ("POST", "/pull_weights", {"target_version": "one"}, 422, "no version"),
        ("POST", "/pull_weights", {"target_version": 9}, 400, "weight_v000004 is not there"),
        ("POST", "/pull_weights", {"target_version": 1, "source_dir": "/etc"}, 422, "started with"),
        ("POST", "/pull_weights", {"target_version": 1, "local_checkpoint_dir": 7}, 422, "started with"),
        ("POST", "/update_weights_from_disk", {"model_path": "../model"}, 422, "started with"),
        ("POST", "/update_weights_from_disk", {"weight_version": "7"}, 400, "pull that version first"),
        ("POST", "/pause_generation", {"mode": "in_place"}, 400, "finish, abort"),
        ("POST", "/pause_generation", {"mode": "retract"}, 400, "finish, abort"),
        ("POST", "/pause_generation", {"mode": 1}, 422, "no text"),
        ("POST", "/pull_weights", b"[]", 422, "no object"),
        ("POST", "/pull_weights", b"{", 422, "no JSON"),
        ("POST", "/pull_weights", b"[" * 50_000, 422, "no JSON"),
        ("POST", "/pull_weights", b" " * (served.BODY + 1), 413, "at most"),
    ],
)
def test_what_is_refused_has_one_line_and_changes_nothing(
    scene: Scene, method: str, path: str, body: Any, status: int, why: str
):
    receiver = scene.receiver(None)
    receiver.pull(0)
    with running(ChainServer(receiver)) as port:
        found, answer = ask(port, method, path, body)
        assert (found, answer["success"]) == (status, False), answer
        assert why in answer["message"]
        assert "\n" not in answer["message"]
        assert ask(port, "GET", "/get_weight_version")[1]["weight_version"] == "0"
        assert ask(port, "GET", "/health")[0] == 200


def test_a_step_that_does_not_fit_stops_before_it(scene: Scene):
    shutil.rmtree(scene.shared / "weight_v000002")
    (scene.shared / "weight_v000003").rename(scene.shared / "weight_v000002")
    receiver = scene.receiver(None)
    with running(ChainServer(receiver)) as port:
        status, answer = ask(port, "POST", "/pull_weights", {"target_version": 2})
        assert status == 400
        assert "weight_v000002" in answer["message"]
    assert same(read(scene.root / "local"), scene.models[1])
    assert receiver.chain.head == 1


def test_a_key_a_slow_client_and_too_many_of_them(scene: Scene, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(served._Handler, "timeout", 0.2)
    monkeypatch.setattr(served, "CONNECTIONS", 1)
    server = ChainServer(scene.receiver(None), key="secret")

    def is_free() -> None:
        """Waits: an answer is there before its place is given back."""
        with server.free:
            pass

    with running(server) as port:
        assert ask(port, "GET", "/get_weight_version")[0] == 401
        is_free()
        assert ask(port, "GET", "/get_weight_version", Authorization="Bearer secret")[0] == 200
        is_free()
        assert ask(port, "GET", "/health")[0] == 200
        is_free()
        with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
            head = "POST /pull_weights HTTP/1.1\r\nAuthorization: Bearer secret\r\nContent-Length: 10\r\n\r\n{"
            slow.sendall(head.encode())
            assert slow.recv(1 << 16).startswith(b"HTTP/1.0 408 ")
        with server.free:
            assert ask(port, "GET", "/health")[0] == 503
        with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
            slow.sendall(b"POST /pull_weights HTTP/1.1\r\nAuthorization: Bearer secret\r\n\r\n")
            assert slow.recv(1 << 16).startswith(b"HTTP/1.0 411 ")
