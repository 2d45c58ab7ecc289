"""Stores that are no folder: what they give is checked, what fails is tried again, what is interrupted goes on."""

from __future__ import annotations

import hashlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

import shiradelta as sd
from shiradelta.chain import Chain, FolderFollower, remote
from shiradelta.chain.remote import RemoteStore
from shiradelta.chain.stores import Store
from tests.chain.models import read, same, write
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


class Ranges(SimpleHTTPRequestHandler):
    """A plain server; `http.server` knows no ranges."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.skipif(find_spec("aiohttp") is None, reason="fsspec reads HTTP with aiohttp")
@pytest.mark.filterwarnings("ignore")
def test_a_plain_http_server_is_followed(tmp_path: Path):
    run = Run(tmp_path / "run", 2)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(run.folder)))
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/chain"
        folder = tmp_path / "copy"
        FolderFollower(url, folder).follow()
        assert same(read(folder), run.models[2])
        with pytest.raises(sd.TargetError, match="not published over http"):
            Chain.open(url).publish(run.step(publish=False))
        assert reason(lambda: Chain.open(url + "/nothing")) == "no_chain"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.skipif(find_spec("moto") is None or find_spec("s3fs") is None, reason="needs moto's server and s3fs")
@pytest.mark.filterwarnings("ignore")
def test_a_stand_in_of_s3_is_published_to_and_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from moto.server import ThreadedMotoServer

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        store = RemoteStore("s3://bucket/run", client_kwargs={"endpoint_url": f"http://{host}:{port}"})
        store._fs.mkdir("bucket")
        run = copy_to(store, Run(tmp_path / "run", 2))
        run.step(adds=True)
        FolderFollower(store, tmp_path / "copy").follow()
        assert same(read(tmp_path / "copy"), run.models[3])
        run.chain.fold(0, 2)
        assert run.chain.verify() == []
        assert run.chain.collect().files == 0
    finally:
        server.stop()
