"""The example service's adapters: from one folder only, the least recently used goes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import shiradelta as sd
from examples.serve.adapters import Adapters
from examples.serve.batches import UnknownAdapterError
from examples.serve.limits import Limits
from tests.examples.serve.conftest import adding
from tests.signing.conftest import write_keys
from tests.swapping import adapter

Session = tuple[sd.HotSwap, torch.Tensor]


def test_adapters_are_loaded_and_evicted(session: Session, folder: Path):
    swap, weight = session
    adapters = Adapters(swap, folder)
    assert adapters.available() == ["add3", "add4", "add5"]
    assert adapters.load("add3").nonzeros == adapters.load("add3").nonzeros == 1
    swap.switch("add3")
    adapters.evict("add3")
    assert not weight.any()
    assert "add3" not in swap.loaded
    with pytest.raises(UnknownAdapterError):
        adapters.evict("add3")


def test_the_least_recently_used_makes_room(session: Session, folder: Path):
    swap, _ = session
    adapters = Adapters(swap, folder, Limits(adapters=3))
    adapters.load("add3")
    adapters.use("add1")
    adapters.load("add4")
    assert set(swap.loaded) == {"add1", "add3", "add4"}
    adapters.load("add3")
    adapters.load("add5")
    assert set(swap.loaded) == {"add3", "add4", "add5"}


def test_memory_is_limited(session: Session, folder: Path):
    swap = sd.HotSwap({"w": session[1], "v": torch.zeros(1000)})
    for i in (1, 2):
        swap.load(f"add{i}", adding(i))
    one = swap.loaded["add1"].nbytes
    adapters = Adapters(swap, folder, Limits(adapter_bytes=2 * one))
    adapters.load("add3")
    assert set(swap.loaded) == {"add2", "add3"}
    large = sd.TensorDelta((1000,), range(1000), [1.0] * 1000, "float32")
    (folder / "large.shd").write_bytes(adapter({"v": large}, "f32"))
    with pytest.raises(MemoryError, match="bytes of"):
        adapters.load("large")
    assert set(swap.loaded) == {"add2", "add3"}


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../secret",
        "/etc/passwd",
        "sub/inner",
        "add3.shd",
        "secret",
        "linked",
        "ä",
        "a\0",
        "a" * 300,
        "-x",
        "*",
    ],
)
def test_nothing_outside_the_folder_is_read(session: Session, folder: Path, name: str):
    (folder.parent / "secret.shd").write_bytes(adding(1))
    (folder / "linked.shd").symlink_to(folder.parent / "secret.shd")
    (folder / "sub").mkdir()
    (folder / "sub" / "inner.shd").write_bytes(adding(1))
    with pytest.raises(UnknownAdapterError):
        Adapters(session[0], folder).load(name)
    with pytest.raises(UnknownAdapterError):
        Adapters(session[0], None).load("add3")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_no_adapter(session: Session, folder: Path):
    os.mkfifo(folder / "pipe.shd")
    with pytest.raises(UnknownAdapterError):
        Adapters(session[0], folder).load("pipe")


def test_a_damaged_file_leaves_all_as_it_was(session: Session, folder: Path):
    swap, _ = session
    (folder / "add3.shd").write_bytes((folder / "add3.shd").read_bytes()[:-1])
    with pytest.raises(sd.FormatError):
        Adapters(swap, folder, Limits(adapters=2)).load("add3")
    assert set(swap.loaded) == {"add1", "add2"}


def test_only_signed_adapters_are_loaded(session: Session, folder: Path, tmp_path: Path):
    pytest.importorskip("cryptography")
    keys = write_keys(tmp_path)
    sd.sign(folder / "add3.shd", keys / "private.pem")
    sd.sign(folder / "add4.shd", keys / "other_private.pem")
    adapters = Adapters(session[0], folder, keys=[keys / "public.pem"])
    for name in ("add4", "add5"):
        with pytest.raises(sd.SignatureError):
            adapters.load(name)
    adapters.load("add3")
    assert set(session[0].loaded) == {"add1", "add2", "add3"}
