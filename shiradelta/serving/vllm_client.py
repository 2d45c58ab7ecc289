"""Switches a vLLM engine from outside: pause, request, version, caches, resume, in this order.

A request to the engine "shd" (`shiradelta.serving.vllm`) changes weights, and nothing else.  Three things are up to who
sends it: no batch may run meanwhile, nothing that was computed with the old weights may be used afterwards, and
`/weight_info` should say what the weights are.
"""

from __future__ import annotations

import base64
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from shiradelta.errors import ArgumentError, NoAnswerError, TargetError
from shiradelta.serving.session import SwapRequest
from shiradelta.util.text import brief

#: What becomes of requests that are being answered: they are answered first, ended, or computed anew and go on.
RUNNING = ("wait", "abort", "keep")
#: What vLLM says of an update that has not been finished.
_BEGUN = "already active"
#: What vLLM says of weights that nobody has given a version.
_UNKNOWN = "default"


def weight_version(active: Mapping[str, float], policy: str | None = None) -> str:
    """What vLLM is to call weights: JSON with the policy's version and the adapters on it, name -> strength."""
    strengths = {name: float(active[name]) for name in sorted(active)}
    return json.dumps({"policy": policy, "adapters": strengths}, separators=(",", ":"))


class KnownWeights(NamedTuple):
    """What an engine's version says of its weights.

    Attributes:
        policy: the policy's version; None if nobody has given one.
        adapters: those that are active, name -> strength; None if it does not say.
    """

    policy: str | None
    adapters: dict[str, float] | None


class VLLM(ABC):
    """A vLLM engine that has `WeightTransferConfig(backend="shd")`."""

    def init(self, checkpoint: str | None = None) -> None:
        """Makes the adapters' session in all workers; once, before the first update.

        Args:
            checkpoint: the folder that the model was loaded from; None for the one that vLLM was given.

        Raises:
            TargetError: vLLM refuses, or does not answer.
        """
        self._init({} if checkpoint is None else {"checkpoint": checkpoint})

    def update(self, request: SwapRequest, *, policy: str | None = None, running: str = "wait") -> str:
        """Does what a request says between two batches.

        Keys and values that were computed with the old weights are dropped: the prefix cache, caches beyond the engine,
        and with `running="keep"` those of the requests that go on, which are computed anew.

        Args:
            request: what is to be done.  `data` is bytes or base64.
            policy: the version of the policy, for `weight_info`; None to leave it as it is.
            running: "wait" until the requests that are being answered are done; "abort" them; or "keep" them.

        Returns:
            The version, as `weight_version` writes it; requests that end later say it, too.

        Raises:
            ArgumentError: `running` is unknown; or `active` is None, and the version does not say what is active.
            TargetError: vLLM refuses a step, or does not answer.  If the request is refused, nothing has changed, and
                the engine goes on.  If there is no answer, or a later step fails, it stays paused, for its caches may
                be of the old weights; the message says so.
        """
        if running not in RUNNING:
            raise ArgumentError(f"running={running!r} is unknown; give one of {', '.join(RUNNING)}")
        before = self.known()
        if before.adapters is None and request.active is None:
            raise ArgumentError(
                "the engine's version does not say which adapters are active; give the request's active"
            )
        active = request.active_after(before.adapters or {})
        version = weight_version(active, before.policy if policy is None else policy)
        try:
            self._pause(running)
            self._start_anew()
            self._send(asdict(request))
        except NoAnswerError as error:
            raise NoAnswerError(
                f"{error}; the engine stays paused, because it is not known whether the request was done; send one that"
                " says what is to be active when it answers again"
            ) from error
        except Exception:
            self._resume()
            raise
        try:
            self._finish(version)
            self._reset_caches()
        except TargetError as error:
            raise TargetError(
                f"{error}; the request was done, but the engine stays paused, because its caches may be of the old"
                " weights; reset its prefix cache, and resume it"
            ) from error
        self._resume()
        return version

    def _start_anew(self) -> None:
        try:
            self._start()
        except TargetError as error:  # a sender that was killed may have left it begun
            if _BEGUN not in str(error):
                raise

    def known(self) -> KnownWeights:
        """What the present version names."""
        version = self.version()
        if version == _UNKNOWN:
            return KnownWeights(None, {})
        try:
            found = json.loads(version)
            return KnownWeights(found["policy"], dict(found["adapters"]))
        except (ValueError, KeyError, TypeError):
            return KnownWeights(version, None)

    @abstractmethod
    def version(self) -> str:
        """What `/weight_info` says: text of `weight_version`, or "default" before the first update."""

    @abstractmethod
    def _init(self, info: dict[str, Any]) -> None: ...

    @abstractmethod
    def _pause(self, running: str) -> None: ...

    @abstractmethod
    def _start(self) -> None:
        """Raises TargetError if vLLM refuses."""

    @abstractmethod
    def _send(self, request: dict[str, Any]) -> None: ...

    @abstractmethod
    def _finish(self, version: str) -> None: ...

    @abstractmethod
    def _reset_caches(self) -> None: ...

    @abstractmethod
    def _resume(self) -> None: ...


class VLLMServer(VLLM):
    """A server of vLLM, by its routes for reinforcement learning: it runs with `VLLM_SERVER_DEV_MODE=1`.

    These routes let whoever reaches them change the weights, so the server belongs into a network of its own.

    Args:
        call: sends a request, (method, route, body) -> (HTTP status, answer); body and answer are what JSON says, or
            None.  This package opens no connections itself.  What it raises counts as no answer.  With
            `running="wait"` it has to wait until all requests are done.
    """

    def __init__(self, call: Callable[[str, str, Any], tuple[int, Any]]) -> None:
        self._send_to = call

    def version(self) -> str:
        return str(self._call("GET", "weight_info")["weight_version"])

    def _init(self, info: dict[str, Any]) -> None:
        self._call("POST", "init_weight_transfer_engine", {"init_info": info})

    def _pause(self, running: str) -> None:
        self._call("POST", f"pause?mode={running}")

    def _start(self) -> None:
        self._call("POST", "start_weight_update")

    def _send(self, request: dict[str, Any]) -> None:
        self._call("POST", "update_weights", {"update_info": _as_json(request)})

    def _finish(self, version: str) -> None:
        self._call("POST", "finish_weight_update", {"weight_version": version})

    def _reset_caches(self) -> None:
        said = self._call("POST", "reset_prefix_cache?reset_running_requests=true&reset_external=true")
        if not said.get("success"):
            raise TargetError("vLLM could not reset its prefix cache")
        self._call("POST", "reset_encoder_cache")

    def _resume(self) -> None:
        self._call("POST", "resume")

    def _call(self, method: str, route: str, body: Any = None) -> dict[str, Any]:
        """What a route answers; an empty object for none."""
        name = route.partition("?")[0]
        try:
            status, answer = self._send_to(method, route, body)
        except Exception as error:
            raise NoAnswerError(f"vLLM does not answer /{name}: {type(error).__name__}: {error}") from error
        if not 200 <= status < 300:
            said = brief(str(answer), 300)
            what = "; start the server with VLLM_SERVER_DEV_MODE=1" if status == 404 else f": {said}"
            raise TargetError(f"vLLM refuses /{name} (HTTP {status}){what}")
        return answer or {}


class VLLMOffline(VLLM):
    """An `LLM` object of vLLM in this process.  It answers nothing between its calls, so nothing has to be paused.

    Args:
        engine: the object.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def version(self) -> str:
        return str(self._engine.get_weight_version())

    def _init(self, info: dict[str, Any]) -> None:
        self._engine.init_weight_transfer_engine({"init_info": info})

    def _pause(self, running: str) -> None:
        pass

    def _start(self) -> None:
        try:
            self._engine.start_weight_update()
        except Exception as error:
            raise TargetError(f"vLLM refuses the update: {error}") from error

    def _send(self, request: dict[str, Any]) -> None:
        try:
            self._engine.update_weights({"update_info": request})
        except Exception as error:
            raise TargetError(f"vLLM refuses the update: {error}") from error

    def _finish(self, version: str) -> None:
        self._engine.finish_weight_update(version)

    def _reset_caches(self) -> None:
        if not self._engine.reset_prefix_cache(reset_running_requests=True, reset_connector=True):
            raise TargetError("vLLM could not reset its prefix cache")
        self._engine.llm_engine.reset_encoder_cache()

    def _resume(self) -> None:
        pass


def _as_json(request: dict[str, Any]) -> dict[str, Any]:
    """A request with its files' bytes in base64."""

    def text(data: str | bytes) -> str:
        return data if isinstance(data, str) else base64.b64encode(data).decode()

    return {**request, "data": {name: text(data) for name, data in request["data"].items()}}
