"""Two publishers of one chain: a manifest is written only over the one that was read, wherever the place can tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

import shiradelta as sd
from shiradelta.chain import Chain, FolderFollower, remote
from shiradelta.chain.remote import RemoteStore
from shiradelta.chain.stores import FolderStore, Store
from tests.chain.models import read, same, write
from tests.chain.servers import CLIENTS, ObjectServer, bucket, serving
from tests.chain.test_chain import Run, reason
from tests.chain.test_stores import copy_to

pytest.importorskip("fsspec")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remote, "_PAUSE", 0.001)
    monkeypatch.setenv("SHIRADELTA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def server() -> Iterator[ObjectServer]:
    with serving() as objects:
        yield objects


@pytest.fixture(params=[*CLIENTS, "memory", "folder"])
def store(
    request: pytest.FixtureRequest, server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    if request.param == "folder":
        yield FolderStore(tmp_path / "place")
    elif request.param == "memory":
        memory = RemoteStore(f"memory://{tmp_path.name}/run")
        yield memory
        memory._fs.store.clear()
    else:
        yield bucket(server, request.param, monkeypatch)


def test_what_another_publisher_wrote_meanwhile_stays(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = copy_to(store, Run(tmp_path / "run", 2))
    late, mine = Chain.open(store), run.step(publish=False)
    run.models.pop()
    other = run.step(publish=False)
    late.refresh()
    monkeypatch.setattr(late, "refresh", lambda: late.manifest)  # it has read the manifest, and then the other comes
    run.chain.publish(other)
    assert reason(lambda: late.publish(mine)) == "busy"
    monkeypatch.undo()
    assert late.refresh().head == 3
    assert reason(lambda: late.publish(mine, version=3)) == "taken"
    FolderFollower(store, tmp_path / "copy").follow()
    assert same(read(tmp_path / "copy"), run.models[3])
    assert late.verify() == []
    assert late.collect().files == 1  # the step of the one that lost


def test_a_chain_begins_once(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if isinstance(store, FolderStore):
        pytest.skip("its lock keeps the other one out")
    run = Run(tmp_path / "run")
    made: list[Chain] = []
    fine, begun = store.swap, []

    def swap(path: str, data: bytes, old: bytes | None) -> None:
        if not begun:
            begun.append(True)
            store.swap = fine  # type: ignore[method-assign]
            made.append(Chain.create(store, run.folder / "model"))
        fine(path, data, old)

    store.swap = swap  # type: ignore[method-assign]
    assert reason(lambda: Chain.create(store, run.folder / "model")) == "busy"
    assert reason(lambda: Chain.create(store, run.folder / "model")) == "exists"
    assert Chain.open(store).manifest.id == made[0].manifest.id


def test_a_file_that_went_is_not_written_again(store: Store):
    with store.writing("chain.json") as stream:
        stream.write(b"one")
    store.swap("chain.json", b"two", b"one")
    store.remove("chain.json")
    assert reason(lambda: store.swap("chain.json", b"three", b"two")) == "busy"
    store.swap("chain.json", b"three", None)
    assert reason(lambda: store.swap("chain.json", b"four", None)) == "busy"
    assert store.read("chain.json", 10) == b"three"


@pytest.mark.parametrize("client", CLIENTS)
def test_between_reading_and_writing_the_store_itself_refuses(
    server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: str
):
    store = bucket(server, client, monkeypatch)
    run = copy_to(store, Run(tmp_path / "run", 1))
    other = b"what another publisher has put there"

    def meanwhile(method: str, key: str, number: int) -> str:
        if (method, key) == ("PUT", "bucket/run/chain.json"):
            server.files[key] = other
        return ""

    server.faults = meanwhile
    path = run.step(publish=False)
    assert reason(lambda: run.chain.publish(path)) == "busy"
    assert server.files["bucket/run/chain.json"] == other
    server.conditions = False  # a service that does not look at conditions is not noticed in this moment
    server.files["bucket/run/chain.json"] = run.chain.manifest.to_json()
    run.chain.publish(path)
    assert server.files["bucket/run/chain.json"] == run.chain.manifest.to_json()


@pytest.mark.parametrize("client", CLIENTS)
def test_a_write_whose_answer_is_lost_counts(
    server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: str
):
    store = bucket(server, client, monkeypatch)
    run = copy_to(store, Run(tmp_path / "run", 1))
    lost: list[str] = []

    def lose(method: str, key: str, number: int) -> str:
        if method == "PUT" and key.endswith("chain.json") and not lost:
            lost.append(key)
            return "lost"
        return ""

    server.faults = lose
    run.step()
    assert lost
    assert Chain.open(store).head == 2


@pytest.mark.parametrize("client", CLIENTS)
def test_a_service_without_conditions_is_read_before_and_after(
    server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: str
):
    store = bucket(server, client, monkeypatch)
    run = copy_to(store, Run(tmp_path / "run", 1))
    server.has_conditions = False
    run.step()
    assert Chain.open(store).head == 2
    fine = store.writing
    path = run.step(publish=False)

    def overwritten(path: str, *args: Any) -> Any:
        if path == "chain.json":
            server.faults = lambda method, key, number: overwrite(method)
        return fine(path, *args)

    def overwrite(method: str) -> str:
        if method != "PUT":
            server.files["bucket/run/chain.json"] = b"another publisher's"
        return ""

    monkeypatch.setattr(store, "writing", overwritten)
    assert reason(lambda: run.chain.publish(path)) == "busy"


def both(work: Callable[[int], None]) -> None:
    """Runs something in two threads."""
    failed: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failed.append(error)

    threads = [Thread(target=guarded, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


@pytest.mark.parametrize("client", [*CLIENTS, "folder"])
def test_two_publishers_at_once_lose_nothing(
    server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: str
):
    """Each publishes changes of its own tensor, made for whatever is the newest version."""
    place: Store = FolderStore(tmp_path / "place") if client == "folder" else bucket(server, client, monkeypatch)
    model = {name: ("uint8", (16,), np.zeros(16, np.uint8)) for name in ("a", "b")}
    Chain.create(place, write(tmp_path / "model", model))

    def publish(number: int) -> None:
        chain, name = Chain.open(place), "ab"[number]
        for value in range(3):
            path = tmp_path / f"{name}{value}.shd"
            old = np.array([value], np.uint8)
            sd.save_delta(path, {name: sd.TensorDelta((16,), np.array([0]), old + 1, "uint8", "set", base_bits=old)})
            while True:
                try:
                    chain.publish(path)
                    break
                except sd.ChainError as error:
                    if error.reason != "busy":
                        raise

    both(publish)
    chain = Chain.open(place)
    assert chain.head == 6
    assert chain.verify() == []
    FolderFollower(chain, tmp_path / "copy").follow()
    assert [read(tmp_path / "copy")[name][2][0] for name in "ab"] == [3, 3]
