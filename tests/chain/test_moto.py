"""The server of moto, which speaks S3 by AWS's own descriptions of it, where it is installed (300 MB)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from shiradelta.chain import Chain, FolderFollower
from tests.chain.models import read, same, write
from tests.chain.servers import CLIENTS, bucket, moto_server
from tests.chain.test_chain import Run, reason

pytest.importorskip("moto.server")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("client", CLIENTS)
def test_a_chain_in_the_server_of_moto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: str):
    run = Run(tmp_path)
    with moto_server() as url:
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
