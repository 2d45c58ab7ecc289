"""`python -m examples.serve_vllm http://127.0.0.1:8000 ADAPTERS < requests.jsonl`: each prompt with its adapter.

The server is `VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "shd"}'`, with shiradelta
installed beside vLLM.  ADAPTERS is a folder of `.shd` files that its workers can read.  A request is a line of JSON,
{"prompt": TEXT, "adapter": NAME}; without an adapter it goes to the base.  Requests for one adapter are sent together,
so there is one switch an adapter.  Answers come in the order of the requests, each with the version of the weights.
Afterwards the server has the base.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from shiradelta.errors import ArgumentError, ShiraDeltaError
from shiradelta.serving.session import SwapRequest
from shiradelta.serving.vllm_client import VLLMServer


class Server:
    """A server's routes, as `VLLMServer` calls them.

    Args:
        url: such as "http://127.0.0.1:8000".
        seconds: how long an answer may take.
    """

    def __init__(self, url: str, seconds: float = 600.0) -> None:
        self._url, self._seconds = url.rstrip("/"), seconds

    def __call__(self, method: str, route: str, body: Any) -> tuple[int, Any]:
        data = None if method == "GET" else b"" if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            with urlopen(
                Request(f"{self._url}/{route}", data, headers, method=method), timeout=self._seconds
            ) as answer:
                status, text = answer.status, answer.read().decode()
        except HTTPError as error:
            status, text = error.code, error.read().decode()
        return status, json.loads(text) if text.startswith("{") else text

    def ask(self, route: str, body: Any = None) -> Any:
        """What a route answers.  Raises ArgumentError if it refuses."""
        status, answer = self("GET" if body is None else "POST", route, body)
        if status != 200:
            raise ArgumentError(f"vLLM refuses /{route} (HTTP {status}): {str(answer)[:300]}")
        return answer


def read(lines: Iterable[str], adapters: Path) -> list[tuple[str, str | None]]:
    """The requests: (prompt, adapter).

    Raises:
        ArgumentError: a line is no request, or its adapter is not in the folder.
    """
    found = []
    for number, line in enumerate(lines, 1):
        try:
            request = json.loads(line)
            prompt, adapter = request["prompt"], request.get("adapter")
        except (ValueError, KeyError, TypeError, AttributeError):
            prompt, adapter = None, None
        if not isinstance(prompt, str) or not (adapter is None or isinstance(adapter, str)):
            raise ArgumentError(f'line {number}: give {{"prompt": TEXT, "adapter": NAME}}')
        if adapter is not None and (Path(adapter).name != adapter or not _file(adapters, adapter).is_file()):
            raise ArgumentError(f"line {number}: adapter {adapter!r} is no .shd file in {adapters}")
        found.append((prompt, adapter))
    return found


def answers(
    server: Server, requests: list[tuple[str, str | None]], adapters: Path, most: int
) -> Iterator[Mapping[str, Any]]:
    """Answers all requests, adapter by adapter, and gives the answers in the requests' order."""
    client, model = VLLMServer(server), server.ask("v1/models")["data"][0]["id"]
    found: dict[int, Mapping[str, Any]] = {}
    client.init()
    loaded: list[str] = []
    try:
        for adapter in dict.fromkeys(name for _, name in requests):
            active = {} if adapter is None else {adapter: 1.0}
            load = {name: str(_file(adapters, name).resolve()) for name in active}
            version = client.update(SwapRequest(load=load, active=active))
            loaded += load
            group = [number for number, (_, name) in enumerate(requests) if name == adapter]
            body = {"model": model, "prompt": [requests[number][0] for number in group], "max_tokens": most}
            for choice in server.ask("v1/completions", {**body, "temperature": 0})["choices"]:
                about = {"adapter": adapter, "version": version, "text": choice["text"]}
                found[group[choice["index"]]] = about
    finally:
        client.update(SwapRequest(active={}, unload=loaded))
    yield from (found[number] for number in range(len(requests)))


def _file(adapters: Path, name: str) -> Path:
    return adapters / f"{name}.shd"


def main() -> None:
    """Reads requests from stdin, and prints a line of JSON for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip())
    parser.add_argument("url", help="vLLM's server")
    parser.add_argument("adapters", type=Path, help="a folder of .shd files")
    parser.add_argument("--max-tokens", type=int, default=32, help="the most tokens of an answer")
    options = parser.parse_args()
    if not options.url.startswith(("http://", "https://")):
        parser.error(f"{options.url}: give the URL of vLLM's server, such as http://127.0.0.1:8000")
    try:
        requests = read(sys.stdin, options.adapters)
        for answer in answers(Server(options.url), requests, options.adapters, options.max_tokens):
            print(json.dumps(answer), flush=True)
    except (ShiraDeltaError, OSError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
