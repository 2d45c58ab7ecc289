"""Stores that are no folder: what they give is checked, what fails is tried again, what is interrupted goes on."""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import shiradelta as sd
from shiradelta.chain import Chain, FolderFollower, remote
from shiradelta.chain.remote import RemoteStore
from shiradelta.chain.stores import Store
from tests.chain.models import read, same, small, write
from tests.chain.servers import CLIENTS, ObjectServer, bucket, serving
from tests.chain.test_chain import Run, reason

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remote, "_PAUSE", 0.001)
    monkeypatch.setenv("SHIRADELTA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[RemoteStore]:
    yield RemoteStore(f"memory://{tmp_path.name}/run")
    fsspec.filesystem("memory").store.clear()


def copy_to(store: Store, run: Run) -> Run:
    """A run whose chain is in another store."""
    for path in ["chain.json", *run.chain.store.files()]:
        with store.writing(path) as stream:
            stream.write(Path(run.chain.store.name, path).read_bytes())
    run.chain = Chain.open(store)
    return run


def test_a_chain_in_a_store_is_published_folded_followed_and_collected(memory: RemoteStore, tmp_path: Path):
    run = copy_to(memory, Run(tmp_path / "run", 2))
    run.step(adds=True)
    folder = tmp_path / "copy"
    FolderFollower(memory, folder).follow()
    assert same(read(folder), run.models[3])
    run.chain.publish_anchor(write(tmp_path / "head", run.models[3]))
    run.chain.fold(0, 2)
    with memory.writing("steps/000009-000010-0123456789abcdef.shd") as stream:
        stream.write(b"left over")
    assert run.chain.verify() == []
    assert run.chain.collect(3).files == 7
    assert sorted(memory.files()) == sorted(run.chain.manifest.files())
    assert run.chain.verify() == []


@pytest.mark.parametrize("protocol", ["http", "ftp"])
def test_a_server_that_is_dead_is_named_by_what_failed(protocol: str):
    if protocol == "http":
        pytest.importorskip("aiohttp")
    with socket.socket() as taken:  # bound, and not listened to: nothing answers
        taken.bind(("127.0.0.1", 0))
        url = f"{protocol}://127.0.0.1:{taken.getsockname()[1]}/run"
        with pytest.raises(
            sd.ChainError, match=r"(?i)^(?!.*FileNotFound).*connect.*\[store_failed\]; try again"
        ) as caught:
            Chain.open(url)
    assert str(caught.value).startswith(url)


def test_a_place_that_renames_shows_no_file_that_is_half_written(tmp_path: Path):
    store = RemoteStore(f"file://{tmp_path}/place")
    run = copy_to(store, Run(tmp_path / "run", 1))
    run.step()
    FolderFollower(store, tmp_path / "copy").follow()
    assert same(read(tmp_path / "copy"), run.models[2])
    assert not list((tmp_path / "place").rglob("*.tmp"))
    assert Chain.open(tmp_path / "place").verify() == []


class Failing:
    """A file system that fails now and then, and cuts files off."""

    def __init__(self, inner: Any, fails: Callable[[int], bool]) -> None:
        self.inner, self.fails, self.calls = inner, fails, 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        return partial(self._called, found) if callable(found) else found

    def _called(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        self.calls += 1
        if self.fails(self.calls):
            raise OSError(5, "the line is dead")
        return call(*args, **options)


@pytest.mark.parametrize("client", [*CLIENTS, "http"])
@pytest.mark.parametrize("size", [10, 4000])
def test_a_file_that_is_replaced_while_it_is_read_is_one_of_the_two(
    client: str, size: int, monkeypatch: pytest.MonkeyPatch
):
    """Shorter or longer: before each request that is not the first."""
    before, after = b"a" * 1000, b"b" * size
    with serving() as server:
        store = RemoteStore(f"{server.url}/bucket/run") if client == "http" else bucket(server, client, monkeypatch)
        server.files["bucket/run/chain.json"] = before

        def replaced(method: str, key: str, number: int) -> str:
            if number > 1:
                server.files["bucket/run/chain.json"] = after
            return ""

        server.faults = replaced
        assert store.read("chain.json", 5000) in (before, after)


def test_a_store_that_fails_sometimes_is_tried_again(memory: RemoteStore, tmp_path: Path):
    run = copy_to(memory, Run(tmp_path / "run", 2))
    memory._fs = Failing(memory._fs, lambda call: call % 3 != 0 if call < 20 else call % 3 == 0)
    FolderFollower(memory, tmp_path / "copy").follow()
    assert same(read(tmp_path / "copy"), run.models[2])
    run.step()
    assert Chain.open(memory).head == 3


def test_a_store_that_is_dead_is_said_and_nothing_has_changed(memory: RemoteStore, tmp_path: Path):
    run = copy_to(memory, Run(tmp_path / "run", 2))
    follower = FolderFollower(memory, tmp_path / "copy")
    follower.follow(1)
    fine = memory._fs
    memory._fs = dead = Failing(fine, lambda call: True)
    assert reason(follower.follow) == "store_failed"
    assert reason(lambda: Chain.open(memory)) == "store_failed"
    assert reason(lambda: run.step()) == "store_failed"
    assert dead.calls < 40
    memory._fs = fine
    assert Chain.open(memory).head == 2
    follower.follow()
    assert same(read(tmp_path / "copy"), run.models[2])


def test_a_download_goes_on_where_it_was_interrupted(
    memory: RemoteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = os.urandom(3000)
    digest = hashlib.sha256(data).hexdigest()
    with memory.writing("steps/x.shd") as stream:
        stream.write(data)
    monkeypatch.setattr(remote, "_CHUNK", 1000)
    starts: list[int] = []
    fine = memory._fs

    class Cut(io.BytesIO):
        """Gives 1,000 bytes, and then the line is dead."""

        given = False

        def read(self, size: int | None = -1, /) -> bytes:
            if self.given:
                raise OSError("the line is dead")
            self.given = True
            starts.append(self.tell())
            return super().read(size)

    class CutFiles:
        def open(self, *args: Any, **options: Any) -> Any:
            return Cut(data)

    memory._fs = CutFiles()
    found = memory.fetched("steps/x.shd", 3000, digest)
    assert found.read_bytes() == data
    assert starts == [0, 1000, 2000]
    memory._fs = None  # it is in the cache
    assert memory.fetched("steps/x.shd", 3000, digest) == found
    found.write_bytes(data[:-1] + b"!")  # the cache is not believed
    memory._fs = fine
    assert memory.fetched("steps/x.shd", 3000, digest).read_bytes() == data
    found.unlink()
    found.with_name(f"{digest}.part").write_bytes(b"something else")
    assert memory.fetched("steps/x.shd", 3000, digest).read_bytes() == data
    assert reason(lambda: memory.fetched("steps/x.shd", 3000, "0" * 64)) == "wrong_bytes"
    assert reason(lambda: memory.fetched("steps/x.shd", 3001, "1" * 64)) == "wrong_bytes"
    assert reason(lambda: memory.fetched("steps/y.shd", 1, "2" * 64)) == "missing_file"


def test_what_cannot_be_published_to_or_is_unknown_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(sd.ArgumentError, match="fsspec does not know such a store"):
        Chain.open("nothing://of/this/name")
    store = RemoteStore("memory://somewhere")
    store._protocols = ("carrier pigeon",)
    with pytest.raises(sd.TargetError, match="not published over carrier pigeon"), store.writing("x"):
        pass
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(sd.MissingDependencyError, match=re.escape("shiradelta[stores]")):
        Chain.open("memory://x")


@pytest.fixture
def server() -> Iterator[ObjectServer]:
    with serving() as objects:
        yield objects


needs_http = pytest.mark.skipif(find_spec("aiohttp") is None, reason="fsspec reads HTTP with aiohttp")


def served(run: Run, server: ObjectServer) -> str:
    """The URL of a run's chain on a plain server."""
    root = run.folder / "chain"
    for file in root.rglob("*"):
        if file.is_file():
            server.files[f"chain/{file.relative_to(root).as_posix()}"] = file.read_bytes()
    return f"{server.url}/chain"


@needs_http
@pytest.mark.filterwarnings("ignore")
def test_a_plain_http_server_is_followed(server: ObjectServer, tmp_path: Path):
    run = Run(tmp_path / "run", 2)
    url = served(run, server)
    FolderFollower(url, tmp_path / "copy").follow()
    assert same(read(tmp_path / "copy"), run.models[2])
    with pytest.raises(sd.TargetError, match="not published over http"):
        Chain.open(url).publish(run.step(publish=False))
    assert reason(lambda: Chain.open(url + "/nothing")) == "no_chain"
    # What was read is in the cache: another follower asks for the manifest only.
    before = len(server.log)
    FolderFollower(url, tmp_path / "other").follow()
    assert {key for _, key, _ in server.log[before:]} == {"chain/chain.json"}


@needs_http
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(3))
def test_a_server_that_fails_at_random_is_followed_in_bounded_tries(server: ObjectServer, tmp_path: Path, seed: int):
    run = Run(tmp_path / "run", 4)
    url, rng = served(run, server), random.Random(seed)
    server.faults = lambda method, key, number: rng.choice(["503", "lost", "cut", "", "", "", ""])
    FolderFollower(url, tmp_path / "copy").follow()
    assert same(read(tmp_path / "copy"), run.models[4])
    for fault in ("503", "lost", "cut"):
        server.faults = lambda method, key, number, fault=fault: fault  # type: ignore[misc]
        before = len(server.log)
        assert reason(lambda: Chain.open(url)) == "store_failed"
        assert len(server.log) - before < 50


@needs_http
@pytest.mark.filterwarnings("ignore")
def test_a_download_over_http_goes_on_in_the_next_process(
    server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(remote, "_CHUNK", 1 << 16)
    data = os.urandom(10 << 16)
    server.files["x.bin"] = data
    sent: list[int] = []

    def dies(method: str, key: str, number: int) -> str:
        sent.append(number)
        return "503" if len(sent) > 5 else ""

    server.faults = dies
    place = server.url, "x.bin", len(data), hashlib.sha256(data).hexdigest()
    assert reason(lambda: RemoteStore(place[0]).fetched(*place[1:])) == "store_failed"
    (part,) = (tmp_path / "cache").rglob("*.part")
    there = part.stat().st_size
    assert 0 < there < len(data)
    assert part.read_bytes() == data[:there]
    server.faults, before = lambda method, key, number: "", len(server.log)
    assert RemoteStore(place[0]).fetched(*place[1:]).read_bytes() == data
    starts = [int(span.partition("=")[2].partition("-")[0]) for _, _, span in server.log[before:] if span]
    assert min(starts) >= there


@needs_http
@pytest.mark.filterwarnings("ignore")
def test_what_a_server_damages_is_refused(server: ObjectServer, tmp_path: Path):
    run = Run(tmp_path / "run", 1)
    url = served(run, server)
    server.faults = lambda method, key, number: "damaged" if key.endswith(".shd") else ""
    assert reason(FolderFollower(url, tmp_path / "copy").follow) == "wrong_bytes"
    server.faults = lambda method, key, number: "damaged"
    assert reason(lambda: Chain.open(url)) == "bad_manifest"
    server.faults = lambda method, key, number: ""
    FolderFollower(url, tmp_path / "copy").follow()
    assert same(read(tmp_path / "copy"), run.models[1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("client", CLIENTS)
def test_a_large_file_goes_to_a_bucket_in_parts(server: ObjectServer, monkeypatch: pytest.MonkeyPatch, client: str):
    store, data = bucket(server, client, monkeypatch), os.urandom(6 << 20)
    with store.writing("anchors/x") as stream:
        stream.write(data)
    assert server.files["bucket/run/anchors/x"] == data
    assert store.fetched("anchors/x", len(data), hashlib.sha256(data).hexdigest()).read_bytes() == data


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("client", CLIENTS)
def test_a_stand_in_of_s3_is_published_to_and_followed(
    server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: str
):
    store, rng = bucket(server, client, monkeypatch), random.Random(0)
    run = copy_to(store, Run(tmp_path / "run", 2))
    server.faults = lambda method, key, number: rng.choice(["503", "lost", "", "", "", "", ""])
    run.step(adds=True)
    FolderFollower(store, tmp_path / "copy").follow()
    assert same(read(tmp_path / "copy"), run.models[3])
    run.chain.fold(0, 2)
    server.faults = lambda method, key, number: ""
    assert run.chain.verify() == []
    assert run.chain.collect().files == 0


def test_verification_reads_the_store_and_not_what_is_on_this_machine(tmp_path: Path):
    """Two anchors may have the same file: one of them tells nothing of the other."""
    run, url = tmp_path / "model", f"memory://{tmp_path.name}/anew"
    chain = Chain.create(RemoteStore(url, cache=tmp_path / "cache"), write(run, small()))
    assert chain.verify() == []
    files = fsspec.filesystem("memory")
    path = f"/{tmp_path.name}/anew/" + next(each for each in chain.store.files() if each.endswith("config.json"))
    files.pipe_file(path, files.cat_file(path)[:-1] + b" ")
    assert "config.json" in chain.verify()[0]
