"""What runs the model: vLLM's server, or nothing but the folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlencode, urlsplit

import shiradelta as sd

#: What becomes of generation in flight -> what vLLM calls that.
POLICIES = {"finish": "wait", "abort": "abort"}


class Layer(NamedTuple):
    """A step on the weights: it makes version `stop` of version `start`."""

    start: int
    stop: int

    @property
    def name(self) -> str:
        """What it is called in the engine."""
        return f"version {self.stop} from {self.start}"

    @classmethod
    def of(cls, name: str) -> Layer | None:
        """The one of a name; None for another adapter's."""
        found = re.fullmatch(r"version ([0-9]{1,16}) from ([0-9]{1,16})", name)
        return None if found is None else cls(int(found[2]), int(found[1]))


class EngineError(Exception):
    """The engine cannot be reached, or has refused a request."""


class Engine(Protocol):
    """What runs the model at a version."""

    def pause(self, policy: str) -> None:
        """Lets generation in flight end, or ends it, and holds back what comes; `policy` is a key of `POLICIES`."""

    def resume(self) -> None:
        """Goes on."""

    def flush(self) -> None:
        """Forgets what was computed with other weights."""

    def active(self) -> tuple[Layer, ...]:
        """The steps that are on the weights, in order, from the first version on."""

    def apply(self, before: Sequence[Layer], after: Sequence[Layer], files: Mapping[Layer, Path]) -> None:
        """Puts the weights at what some steps give, one after the other, from the first version on.

        Args:
            before: the steps that are on the weights.
            after: those that are to be; the first ones may be the same.
            files: the files of those that are new.
        """


class FolderOnly:
    """No engine: whoever loads the folder has the newest weights."""

    def pause(self, policy: str) -> None:
        """Does nothing, as the rest."""

    def resume(self) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Does nothing."""

    def active(self) -> tuple[Layer, ...]:
        """There is none."""
        return ()

    def apply(self, before: Sequence[Layer], after: Sequence[Layer], files: Mapping[Layer, Path]) -> None:
        """Does nothing."""


class VllmServer:
    """vLLM's server, with `--worker-extension-cls shiradelta.serving.vllm.SwapExtension` and VLLM_SERVER_DEV_MODE=1.

    Args:
        url: such as "http://127.0.0.1:8000".
        checkpoint: the folder that vLLM was started with, the model at the first version.
        seconds: how long an answer may take.
    """

    def __init__(self, url: str, checkpoint: Path, seconds: float = 600.0) -> None:
        where = urlsplit(url)
        if where.scheme != "http" or not where.hostname:
            raise sd.ArgumentError(f"{url}: give the URL of vLLM's server, such as http://127.0.0.1:8000")
        self._address, self._checkpoint, self._seconds = (where.hostname, where.port or 80), checkpoint, seconds

    def pause(self, policy: str) -> None:
        """As `Engine.pause`."""
        self._post("/pause", mode=POLICIES[policy])

    def resume(self) -> None:
        """As `Engine.resume`."""
        self._post("/resume")

    def flush(self) -> None:
        """As `Engine.flush`."""
        if self._post("/reset_prefix_cache").get("success") is not True:
            raise EngineError("vLLM did not reset its prefix cache; pause generation before")

    def active(self) -> tuple[Layer, ...]:
        """As `Engine.active`; workers that have no session yet refuse the question, and get one."""
        try:
            adapters = self._call("shd_info")["results"][0]["adapters"]
        except EngineError:
            self._call("shd_init", str(self._checkpoint))
            return ()
        except (KeyError, IndexError, TypeError):
            raise EngineError("vLLM's answer to shd_info is another one than expected") from None
        names = [str(name) for name, one in adapters.items() if one["strength"]]
        layers = [found for name in names if (found := Layer.of(name)) is not None]
        layers.sort()
        ends = [0, *(layer.stop for layer in layers)]
        if len(layers) < len(names) or [layer.start for layer in layers] != ends[:-1]:
            raise EngineError(f"the workers have {', '.join(names)[:200]} active, which is no version; take that out")
        return tuple(layers)

    def apply(self, before: Sequence[Layer], after: Sequence[Layer], files: Mapping[Layer, Path]) -> None:
        """As `Engine.apply`: in all workers or in none."""
        request = {
            "load": {layer.name: str(file) for layer, file in files.items()},
            "active": dict.fromkeys((layer.name for layer in after), 1.0),
            "unload": [layer.name for layer in before if layer not in after],
        }
        self._call("shd_update", request)

    def _call(self, method: str, *args: Any) -> dict[str, Any]:
        return self._post("/collective_rpc", {"method": method, "args": list(args)})

    def _post(self, path: str, body: Mapping[str, Any] | None = None, **query: str) -> dict[str, Any]:
        connection = HTTPConnection(*self._address, timeout=self._seconds)
        target = f"{path}?{urlencode(query)}" if query else path
        try:
            raw = json.dumps(body or {}).encode()
            connection.request("POST", target, raw, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read(1 << 20).decode(errors="replace")
        except (OSError, HTTPException) as error:
            raise EngineError(f"vLLM at {self._address[0]}:{self._address[1]}{path}: {error}") from error
        finally:
            connection.close()
        if answer.status != 200:
            raise EngineError(f"vLLM answered {answer.status} to {path}: {' '.join(text.split())[:300]}")
        try:
            found = json.loads(text) if text else {}
        except ValueError:
            found = {}
        return found if isinstance(found, dict) else {}
