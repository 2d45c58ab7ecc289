"""Updates of vLLM from outside: the order of its routes, and what the engine is left in when one of them fails."""

from __future__ import annotations

from typing import Any

import pytest

from shiradelta.errors import ArgumentError, TargetError
from shiradelta.serving.session import SwapRequest
from shiradelta.serving.vllm_client import VLLMOffline, VLLMServer, weight_version


class Stand:
    """A stand-in of the server.

    Attributes:
        refuses: routes that answer with HTTP 500.
        silent: a route that does not answer.
        resets: whether the prefix cache can be reset.
    """

    def __init__(self) -> None:
        self.version, self.calls, self.updates = "default", list[str](), list[dict[str, Any]]()
        self.refuses: set[str] = set()
        self.silent, self.resets, self.status, self.reason = "", True, 500, "a reason"

    def __call__(self, method: str, route: str, body: Any) -> tuple[int, Any]:
        name = route.partition("?")[0]
        if name == self.silent:
            raise TimeoutError("too late")
        if method == "GET":
            return 200, {"weight_version": self.version} if name == "weight_info" else None
        self.calls.append(route)
        if name in self.refuses:
            return self.status, {"error": self.reason}
        if name == "update_weights":
            self.updates.append(body["update_info"])
        if name == "finish_weight_update":
            self.version = body["weight_version"]
        return 200, {"success": self.resets} if name == "reset_prefix_cache" else None


@pytest.fixture
def stand() -> Stand:
    return Stand()


STEPS = ["start_weight_update", "update_weights", "finish_weight_update"]
CACHES = ["reset_prefix_cache?reset_running_requests=true&reset_external=true", "reset_encoder_cache"]


@pytest.mark.parametrize("running", ["wait", "abort", "keep"])
def test_an_update_pauses_first_and_resumes_with_fresh_caches(running: str, stand: Stand):
    one = VLLMServer(stand)
    one.init("folder")
    assert one.version() == "default"
    request = SwapRequest(load={"s": "/s.shd"}, data={"t": b"\x00\xff"}, active={"t": 0.5, "s": 1})
    version = one.update(request, policy="17", running=running)
    assert stand.calls == ["init_weight_transfer_engine", f"pause?mode={running}", *STEPS, *CACHES, "resume"]
    assert stand.updates == [
        {"load": {"s": "/s.shd"}, "data": {"t": "AP8="}, "rebase": False, "active": {"t": 0.5, "s": 1}, "unload": ()}
    ]
    assert version == one.version() == '{"policy":"17","adapters":{"s":1.0,"t":0.5}}'


def test_versions_go_on_from_the_present_one(stand: Stand):
    one = VLLMServer(stand)
    assert one.update(SwapRequest(load={"a": "/a.shd"})) == weight_version({})  # nothing is active at first
    one.update(SwapRequest(active={"a": 1.0}), policy="1")
    assert one.update(SwapRequest(load={"b": "/b.shd"})) == weight_version({"a": 1.0}, "1")
    assert one.update(SwapRequest(), policy="2") == weight_version({"a": 1.0}, "2")
    assert one.update(SwapRequest(active={})) == weight_version({}, "2")
    stand.version = "another trainer's"
    calls = len(stand.calls)
    with pytest.raises(ArgumentError, match="give the request's active"):
        one.update(SwapRequest())
    assert len(stand.calls) == calls
    assert one.update(SwapRequest(active={})) == weight_version({}, "another trainer's")


@pytest.mark.parametrize("step", ["pause", "start_weight_update", "update_weights"])
def test_a_refused_request_leaves_the_version_and_resumes(step: str, stand: Stand):
    stand.refuses = {step}
    with pytest.raises(TargetError, match=rf"vLLM refuses /{step} \(HTTP 500\): .*a reason"):
        VLLMServer(stand).update(SwapRequest(active={"a": 1.0}))
    assert (stand.version, stand.updates, stand.calls[-1]) == ("default", [], "resume")
    assert CACHES[0] not in stand.calls


def test_an_update_that_a_killed_sender_has_begun_is_gone_on_with(stand: Stand):
    stand.refuses, stand.reason = {"start_weight_update"}, "start_weight_update called while it is already active."
    assert VLLMServer(stand).update(SwapRequest(active={"a": 1.0})) == stand.version == weight_version({"a": 1.0})
    assert stand.calls[-1] == "resume"


@pytest.mark.parametrize("step", ["finish_weight_update", "reset_prefix_cache", "reset_encoder_cache", "no reset"])
def test_where_caches_may_be_old_the_engine_stays_paused(step: str, stand: Stand):
    stand.refuses, stand.resets = {step}, step != "no reset"
    with pytest.raises(TargetError, match="stays paused, because its caches may be of the old weights; reset"):
        VLLMServer(stand).update(SwapRequest(active={"a": 1.0}))
    assert "resume" not in stand.calls


@pytest.mark.parametrize("step", ["pause", "update_weights"])
def test_without_an_answer_the_engine_stays_paused(step: str, stand: Stand):
    stand.silent = step
    with pytest.raises(TargetError, match=f"does not answer /{step}: .* not known whether the request was done"):
        VLLMServer(stand).update(SwapRequest(active={"a": 1.0}))
    assert "resume" not in stand.calls


def test_what_is_no_such_server_is_refused(stand: Stand):
    with pytest.raises(ArgumentError, match="running='stop' is unknown; give one of wait, abort, keep"):
        VLLMServer(stand).update(SwapRequest(active={}), running="stop")
    assert stand.calls == []
    stand.refuses, stand.status = {"pause"}, 404
    with pytest.raises(TargetError, match="start the server with VLLM_SERVER_DEV_MODE=1"):
        VLLMServer(stand).update(SwapRequest(active={}))
    stand.silent = "weight_info"
    with pytest.raises(TargetError, match="vLLM does not answer /weight_info: TimeoutError: too late"):
        VLLMServer(stand).version()


class Engine:
    """What `VLLMOffline` calls of vLLM's `LLM`."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.llm_engine = self
        self.version, self.error = "default", ""

    def get_weight_version(self) -> str:
        return self.version

    def init_weight_transfer_engine(self, request: Any) -> None:
        self.calls.append(request)

    def start_weight_update(self) -> None:
        self.calls.append("start")

    def update_weights(self, request: Any) -> None:
        if self.error:
            raise RuntimeError(self.error)
        self.calls.append(request["update_info"]["active"])

    def finish_weight_update(self, version: str) -> None:
        self.version = version

    def reset_prefix_cache(self, reset_running_requests: bool, reset_connector: bool) -> bool:
        self.calls.append((reset_running_requests, reset_connector))
        return True

    def reset_encoder_cache(self) -> None:
        self.calls.append("encoder")


def test_an_engine_in_this_process():
    engine = Engine()
    one = VLLMOffline(engine)
    one.init()
    one.update(SwapRequest(active={"a": 1.0}), policy="3")
    assert engine.calls == [{"init_info": {}}, "start", {"a": 1.0}, (True, True), "encoder"]
    assert one.version() == weight_version({"a": 1.0}, "3")
    engine.error = "no"
    with pytest.raises(TargetError, match="vLLM refuses the update: no"):
        one.update(SwapRequest(active={}))
    assert one.version() == weight_version({"a": 1.0}, "3")
