"""`python -m examples.publish_vllm MODEL FOLDER http://127.0.0.1:8000`: a trainer's steps into a server that answers.

The server is `VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "shd"}'`, with shiradelta
installed beside vLLM.  A process trains a copy of MODEL on random texts, and publishes a step a second to a chain in
FOLDER.  The server follows it, and answers all the while.  For each step a line says what was sent, and how long it
took from the moment at which it was published until answers come from it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

from examples.publish_vllm.trainer import train
from examples.serve_vllm.__main__ import Server
from shiradelta.chain import Chain
from shiradelta.errors import ShiraDeltaError, TargetError
from shiradelta.serving.follow import EngineFollower
from shiradelta.serving.session import SwapRequest
from shiradelta.serving.vllm_client import VLLMServer

#: Seconds between two looks for a new step.
LOOK = 0.05


class Applied(NamedTuple):
    """A step that the server has.

    Attributes:
        version: what it gives.
        bytes: of its file.
        seconds: from the moment at which it was published.
        answers: how many the server has given so far.
    """

    version: int
    bytes: int
    seconds: float
    answers: int


class Asking:
    """A thread that asks the server for one answer after the other.

    Attributes:
        count: of the answers.
        error: what went wrong; None if nothing has.
    """

    def __init__(self, server: Server, prompt: list[int]) -> None:
        self.count = 0
        self.error: TargetError | None = None
        self._server, self._prompt, self._end = server, prompt, Event()
        self._thread = Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        try:
            model = self._server.ask("v1/models")["data"][0]["id"]
            body = {"model": model, "prompt": self._prompt, "max_tokens": 8, "temperature": 0}
            while not self._end.is_set():
                self._server.ask("v1/completions", body)
                self.count += 1
        except (ShiraDeltaError, OSError) as error:
            self.error = TargetError(f"the server does not answer: {error}")

    def end(self) -> None:
        """Waits for the last answer.

        Raises:
            TargetError: one did not come.
        """
        self._end.set()
        self._thread.join()
        if self.error is not None:
            raise self.error


def follow(follower: EngineFollower, steps: int, alive: Callable[[], bool], asking: Asking) -> Iterator[Applied]:
    """Applies steps as they come, and yields each.

    Raises:
        TargetError: the trainer has ended before the last one.
    """
    left = steps
    while left:
        was_alive = alive()
        done = follower.follow()
        for step in done:
            published = follower.chain.store.fetched(step.path, step.bytes, step.sha256).stat().st_mtime
            yield Applied(step.stop, step.bytes, time.time() - published, asking.count)
        left = steps - (follower.version or 0)
        if left and not done:
            if not was_alive:
                raise TargetError("the trainer has ended; see its messages above")
            time.sleep(LOOK)


def main() -> None:
    """Trains, follows, and prints a line for each step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip())
    parser.add_argument("model", type=Path, help="the model's folder, which the server was started with")
    parser.add_argument("folder", type=Path, help="a new folder, for the chain and the trained model")
    parser.add_argument("url", help="vLLM's server")
    parser.add_argument("--steps", type=int, default=30, help="how many to publish")
    parser.add_argument("--every", type=float, default=1.0, help="seconds from one to the next, at least")
    options = parser.parse_args()
    server = Server(options.url)
    try:
        options.folder.mkdir(parents=True)
        chain = Chain.create(options.folder / "chain", options.model)
        client = VLLMServer(server)
        client.init(str(options.model.resolve()))
        client.update(SwapRequest(active={}), policy=f"{chain.manifest.id}:0")  # whatever it was told before
        follower = EngineFollower(chain, client, version=0)
        how = options.model, options.folder / "chain", options.steps, options.every
        trainer = multiprocessing.get_context("spawn").Process(target=train, args=how, daemon=True)
        asking = Asking(server, [1, 2, 3])
        trainer.start()
        print(f"{'version':>7} {'bytes':>9} {'published to applied':>21} {'answers so far':>15}")
        try:
            for one in follow(follower, options.steps, trainer.is_alive, asking):
                print(f"{one.version:7} {one.bytes:9,} {one.seconds:19.2f} s {one.answers:15,}", flush=True)
        finally:
            trainer.kill()
            asking.end()
        print(f"the server says: {client.version()}")
    except (ShiraDeltaError, OSError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
