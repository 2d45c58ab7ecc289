"""Regular files are read at places, whatever the system offers for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shiradelta.util.regular_file import open_regular, read_at


@pytest.mark.parametrize("system", ["its own", "without preadv"])
def test_bytes_are_read_at_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str):
    if system == "without preadv":
        monkeypatch.delattr(os, "preadv", raising=False)
    (tmp_path / "a").write_bytes(bytes(range(100)))
    room = bytearray(10)
    with open_regular(tmp_path / "a") as stream:
        for start, count in ((50, 10), (0, 10), (95, 5), (100, 0)):
            room[:] = b"\xff" * 10
            assert read_at(stream.fileno(), memoryview(room), start) == count
            assert bytes(room) == bytes(range(start, start + count)) + b"\xff" * (10 - count)
