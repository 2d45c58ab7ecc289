"""The server of moto, which speaks S3 by AWS's own descriptions of it, where it is installed (300 MB)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import Request, urlopen

import pytest

from shiradelta.chain import Chain, FolderFollower
from tests.chain.models import read, same, write
from tests.chain.servers import CLIENTS, bucket
from tests.chain.test_chain import Run, reason

moto = pytest.importorskip("moto.server")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("client", CLIENTS)
def test_a_chain_in_the_server_of_moto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: str):
    run = Run(tmp_path)
    server: Any = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        url = "http://{}:{}".format(*server.get_host_and_port())
        for method, path in (("POST", "moto-api/reset"), ("PUT", "bucket")):  # it keeps its buckets in the process
            urlopen(Request(f"{url}/{path}", method=method)).close()
        monkeypatch.setenv("SHIRADELTA_CACHE", str(tmp_path / "cache"))
        place = SimpleNamespace(url=url)
        chain, late = (
            make(bucket(place, client, monkeypatch))
            for make in (lambda store: Chain.create(store, tmp_path / "model"), Chain.open)
        )
        for _ in range(3):
            chain.publish(run.step(publish=False))
        monkeypatch.setattr(late, "refresh", lambda: late.manifest)  # it has read before the other has written
        assert reason(lambda: late.publish(run.files[0])) == "busy"
        assert reason(lambda: Chain.create(bucket(place, client, monkeypatch), tmp_path / "model")) == "exists"
        chain.fold(0, 2)
        FolderFollower(chain, tmp_path / "copy").follow()
        assert same(read(tmp_path / "copy"), run.models[3])
        chain.publish_anchor(write(tmp_path / "third", run.models[3]))
        chain.collect(3)
        assert chain.verify() == []
        assert sorted(chain.store.files()) == sorted(chain.manifest.files())
    finally:
        server.stop()
