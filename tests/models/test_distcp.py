"""Checkpoints of torch.distributed.checkpoint as what `convert` reads."""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import shiradelta as sd
from shiradelta.io.recognise import Wanted
from shiradelta.models.checkpoint import Checkpoint, open_checkpoint

STATE = {
    "a.weight": torch.arange(48.0).reshape(8, 6).bfloat16(),
    "b": torch.arange(5),
    "c": torch.tensor(3.5),
    "none": torch.zeros(0, 3),
}


def saved(folder: Path, state: dict[str, Any]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=str(folder))
    return folder


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(folder, Wanted.SOURCE)


def same(found: Checkpoint, state: dict[str, torch.Tensor]) -> bool:
    return found.keys() == state.keys() and all(
        (found[name].shape, found[name].dtype.name) == (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        and found.bits(name).tobytes() == tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for name, tensor in state.items()
    )


@pytest.mark.parametrize("under", ["", "model", "state_dict", "module"])
def test_the_models_tensors_are_read_and_the_optimizer_is_left(under: str, tmp_path: Path):
    others = {"optimizer": {"state": {"a.weight": {"exp_avg": torch.ones(8, 6)}}, "groups": [{"lr": 0.1}]}, "epoch": 4}
    assert same(opened(saved(tmp_path / "a", {under: STATE, **others} if under else STATE)), STATE)


def test_a_step_between_two_of_them_is_exact(tmp_path: Path):
    after = {name: tensor.clone() for name, tensor in STATE.items()}
    after["a.weight"][2, 3] += 1
    del after["b"]
    base, source = saved(tmp_path / "0", {"model": STATE}), saved(tmp_path / "1", {"model": after})
    assert sd.convert(source, tmp_path / "1.shd", base=base, lossless=True).exact
    weights = {name: tensor.clone() for name, tensor in STATE.items() if name == "a.weight"}
    with sd.open_delta(tmp_path / "1.shd") as delta:
        assert list(delta) == ["a.weight", "b"]
        assert delta["b"].op == "drop"
        bits = weights["a.weight"].view(torch.uint16).numpy().reshape(-1)
        delta["a.weight"].patch(bits, "bfloat16")
    assert torch.equal(weights["a.weight"], after["a.weight"])


def sharded(folder: Path, pieces: dict[int, torch.Tensor], **changed: Any) -> Path:
    """A tensor of 4 x 3 in files of its own, each from some row on."""
    folder.mkdir()
    chunks, places = [], {}
    for row, piece in pieces.items():
        torch.save(piece, folder / f"__{row}_0.distcp")
        offsets = torch.Size([row, 0])
        chunks.append(ChunkStorageMetadata(offsets, piece.shape))
        index = MetadataIndex("w", offsets, len(chunks) - 1)
        length = (folder / f"__{row}_0.distcp").stat().st_size
        places[index] = _StorageInfo(changed.get("path", f"__{row}_0.distcp"), 0, length)
    properties = TensorProperties(changed.get("dtype", torch.float32))
    about = Metadata({"w": TensorStorageMetadata(properties, torch.Size([4, 3]), chunks)}, None, places)
    (folder / ".metadata").write_bytes(pickle.dumps(about))
    return folder


def test_pieces_are_put_together(tmp_path: Path):
    whole = torch.randn(4, 3)
    assert same(opened(sharded(tmp_path / "a", {3: whole[3:], 0: whole[:1], 1: whole[1:3].clone()})), {"w": whole})


def _cut(folder: Path) -> None:
    data = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda at: sharded(at, {0: torch.ones(2, 3)}), "not there whole"),
        (lambda at: sharded(at, {0: torch.ones(2, 3), 3: torch.ones(2, 3)}), "a piece outside"),
        (lambda at: sharded(at, {0: torch.ones(3, 3), 2: torch.ones(1, 3)}), "overlap"),
        (lambda at: sharded(at, {0: torch.ones(4, 3)}, dtype=torch.float16), "another piece"),
        (lambda at: sharded(at, {0: torch.ones(4, 3)}, dtype=torch.quint8), "quint8"),
        (lambda at: sharded(at, {0: torch.ones(4, 3)}, path="../a"), "outside of the folder"),
        (lambda at: sharded(at, {0: torch.ones(4, 3)}, path="__9_0.distcp"), "cannot be read"),
        (lambda at: (sharded(at, {0: torch.ones(4, 3)}), _cut(at)), "cut off"),
        (lambda at: (sharded(at, {0: torch.ones(4, 3)}) / ".metadata").unlink(), "cannot be read"),
        (lambda at: saved(at, {"one": {"w": torch.ones(2)}, "two": {"w": torch.ones(2)}}), "'one', 'two'.* unclear"),
        (lambda at: saved(at, {"model": {"w": torch.ones(2)}, "module": {"w": torch.ones(2)}}), "unclear"),
    ],
)
def test_what_is_damaged_or_unclear_is_refused(make: Callable[[Path], object], why: str, tmp_path: Path):
    make(tmp_path / "a")
    with pytest.raises(sd.SourceError, match=f"^{tmp_path}.*{why}") as caught:
        opened(tmp_path / "a").bits("w")
    assert "\n" not in str(caught.value)


class _Program:
    def __reduce__(self) -> tuple[Any, ...]:
        return shutil.rmtree, ("/nothing/here",)


def test_a_program_in_the_metadata_is_not_run(tmp_path: Path):
    folder = sharded(tmp_path / "a", {0: torch.ones(4, 3)})
    (folder / ".metadata").write_bytes(pickle.dumps(_Program()))
    with pytest.raises(sd.SourceError, match=r"names shutil\.rmtree"):
        opened(folder)
    raw = (sharded(tmp_path / "b", {0: torch.ones(4, 3)}) / ".metadata").read_bytes()
    rng = np.random.default_rng(0)
    for number in range(200):
        other = bytearray(raw)
        other[rng.integers(len(raw))] ^= 1 << rng.integers(8)
        (folder / ".metadata").write_bytes(other[: len(raw) if number % 4 else rng.integers(len(raw))])
        try:
            found = opened(folder)
            [found.bits(name) for name in found]
        except sd.ShiraDeltaError:
            pass


def test_only_convert_reads_them(tmp_path: Path):
    with pytest.raises(sd.SourceError, match=r"safetensors"):
        open_checkpoint(saved(tmp_path / "a", STATE))
