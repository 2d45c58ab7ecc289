"""Files that cannot be mapped into memory."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest

import shiradelta
from shiradelta.cli import main


@pytest.fixture
def no_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(mmap, "mmap", refuse)
    monkeypatch.setattr("shiradelta.models.checkpoint._SMALL", 0)  # small tensors are read


@pytest.mark.usefixtures("no_maps")
def test_what_cannot_be_mapped_is_named_in_a_line(
    made: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    weights, delta, why = model / "model.safetensors", made / "a.shd", os.strerror(errno.ENOMEM)
    for arguments, file in (
        (["convert", str(model), "--base", str(model), "-o", str(tmp_path / "out.shd")], weights),
        (["apply", str(model), str(delta)], delta),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        said = capsys.readouterr().err
        assert (ended.value.code, said.count("\n")) == (1, 1), said
        assert said.startswith(f"error: {file}: cannot be"), said
        assert why in said
    assert not (tmp_path / "out.shd").exists()


def test_a_weight_file_that_cannot_be_mapped_to_be_patched_is_as_before(
    made: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    real, before = mmap.mmap, (model / "model.safetensors").read_bytes()

    def refuse(descriptor: int, size: int, **options: object) -> mmap.mmap:
        if "access" not in options:  # to be written
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return real(descriptor, size, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(shiradelta.TargetError, match="nothing was changed"):
        shiradelta.apply(model, made / "a.shd")
    assert (model / "model.safetensors").read_bytes() == before
    assert not shiradelta.verify(model).interrupted
