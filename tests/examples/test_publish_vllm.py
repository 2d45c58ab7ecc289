"""The example of a trainer that publishes into a server: what it says where the server or the trainer is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from examples.publish_vllm.__main__ import Asking, follow
from shiradelta.chain import Chain
from shiradelta.errors import ArgumentError, TargetError
from tests.chain.models import small, write

ROOT = Path(__file__).parents[2]


class Follower:
    """A follower that finds the steps of each look."""

    def __init__(self, chain: Chain, *looks: int) -> None:
        self.chain, self.version, self._looks = chain, 0, list(looks)

    def follow(self) -> list[Any]:
        count = self._looks.pop(0)
        self.version += count
        return [step for step in self.chain.manifest.steps if self.version - count < step.stop <= self.version]


def test_steps_are_said_until_the_last_one_or_until_the_trainer_has_ended(tmp_path: Path):
    chain = Chain.create(tmp_path / "chain", write(tmp_path / "0", small(0)))
    for version in (1, 2, 3):
        chain.publish(write(tmp_path / str(version), small(version)), base=tmp_path / str(version - 1))
    asking: Any = SimpleNamespace(count=5)
    follower: Any = Follower(chain, 1, 0, 2)
    found = list(follow(follower, 3, lambda: True, asking))
    assert [(one.version, one.answers) for one in found] == [(1, 5), (2, 5), (3, 5)]
    assert [one.bytes for one in found] == [step.bytes for step in chain.manifest.steps]
    ended: Any = Follower(chain, 1, 0)
    with pytest.raises(TargetError, match="the trainer has ended"):
        list(follow(ended, 3, lambda: False, asking))


def test_a_server_that_stops_answering_is_said():
    class Server:
        def ask(self, route: str, body: Any = None) -> Any:
            if route == "v1/models":
                return {"data": [{"id": "m"}]}
            raise ArgumentError("vLLM refuses")

    server: Any = Server()
    with pytest.raises(TargetError, match="the server does not answer: vLLM refuses"):
        Asking(server, [1]).end()


@pytest.mark.slow  # a process that imports torch
def test_a_server_that_is_not_there_is_one_line(tmp_path: Path):
    model = write(tmp_path / "model", small())
    command = [sys.executable, "-m", "examples.publish_vllm", str(model), str(tmp_path / "run"), "http://127.0.0.1:9"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "error: vLLM does not answer /init_weight_transfer_engine" in done.stderr
    assert "Traceback" not in done.stderr
