"""Wires: what another project writes is read bit for bit, and written as it does; anything else is refused."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import shiradelta as sd
from shiradelta.chain.wires import read_wire, write_wire
from shiradelta.cli import main
from tests.chain.models import Model, add_step, change, replayed, same, set_step, small, write

SUMS = ["adler32", *(name for name, package in (("xxh3-128", "xxhash"), ("blake3", "blake3")) if find_spec(package))]


def as_slime(folder: Path, before: Model, after: Model, encoding: str = "xor") -> Path:
    """A step as slime's trainer writes it, by its own layout: plain code, nothing of the package."""
    tensors, sums = {}, {}
    for name, (_, _, bits) in after.items():
        old, new = before[name][2].view(np.uint8), bits.view(np.uint8)
        if np.array_equal(old, new):
            continue
        at = np.flatnonzero(old != new)
        plain = (old ^ new).tobytes()
        if encoding == "overwrite":
            plain = struct.pack("<I", at.size) + at.astype("<u4").tobytes() + new[at].tobytes()
        tensors[name] = zstandard.ZstdCompressor(level=1).compress(plain)
        sums[name] = f"{zlib.adler32(new.tobytes()):08x}"
    folder.mkdir()
    file = "model-00000-of-00001.safetensors"
    header: dict[str, Any] = {"__metadata__": sums}
    end = 0
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [end, end := end + len(data)]}
    raw = json.dumps(header).encode()
    (folder / file).write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(tensors.values()))
    about = {
        "version": "000007",
        "base_version": "000006",
        "delta_encoding": encoding,
        "compression_format": "zstd",
        "checksum_format": "adler32",
    }
    index = {"metadata": about, "weight_map": dict.fromkeys(tensors, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def models(tmp_path: Path) -> tuple[Model, Model, Path]:
    before = small()
    return before, change(before, np.random.default_rng(0)), write(tmp_path / "base", before)


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_a_folder_of_slime_is_read(models: tuple[Model, Model, Path], tmp_path: Path, encoding: str):
    before, after, base = models
    source, out = as_slime(tmp_path / "weight_v000007", before, after, encoding), tmp_path / "step.shd"
    assert read_wire("slime", source, base, out) == sum(np.count_nonzero(before[n][2] != after[n][2]) for n in before)
    assert same(replayed(before, out), after)
    assert sd.verify(base, out).state == "base"  # it has fingerprints


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
@pytest.mark.parametrize("checksum", SUMS)
@pytest.mark.parametrize("adds", [False, True])
def test_what_is_written_comes_back_and_is_what_slime_writes(
    models: tuple[Model, Model, Path], tmp_path: Path, encoding: str, checksum: str, adds: bool
):
    before, after, base = models
    step = tmp_path / "step.shd"
    sd.save_delta(step, add_step(before, np.random.default_rng(1)) if adds else set_step(before, after), values="f32")
    after = replayed(before, step)
    folder = tmp_path / "weight_v000007"
    write_wire("slime", step, base, folder, encoding=encoding, checksum=checksum, version="7", base_version="6")
    if checksum == "adler32":
        theirs = as_slime(tmp_path / "theirs", before, after, encoding)
        ours = json.loads((folder / "model.safetensors.index.json").read_text())
        assert ours == json.loads((theirs / "model.safetensors.index.json").read_text())
        assert tensors_of(folder) == tensors_of(theirs)
    read_wire("slime", folder, base, tmp_path / "again.shd")
    assert same(replayed(before, tmp_path / "again.shd"), after)


def tensors_of(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The metadata and the tensors of a folder's only file."""
    (file,) = folder.glob("*.safetensors")
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    start = 8 + size
    spans = {name: one["data_offsets"] for name, one in header.items() if name != "__metadata__"}
    return header["__metadata__"], {name: raw[start + first : start + last] for name, (first, last) in spans.items()}


def index(folder: Path, edit: Callable[[Any], object]) -> None:
    path = folder / "model.safetensors.index.json"
    about = json.loads(path.read_text())
    edit(about)
    path.write_text(json.dumps(about))


@pytest.mark.parametrize(
    "edit",
    [
        lambda about: about["metadata"].update(delta_encoding="add"),
        lambda about: about["metadata"].update(delta_encoding="overwrite"),
        lambda about: about["metadata"].update(compression_format="lz4"),
        lambda about: about["metadata"].update(checksum_format="md5"),
        lambda about: about["metadata"].pop("checksum_format"),
        lambda about: about.pop("metadata"),
        lambda about: about.update(metadata=[]),
        lambda about: about.pop("weight_map"),
        lambda about: about["weight_map"].pop("mask"),
        lambda about: about["weight_map"].update(more="model-00000-of-00001.safetensors"),
        lambda about: about["weight_map"].update(mask="../x.safetensors"),
        lambda about: about["weight_map"].update(mask="gone.safetensors"),
    ],
)
def test_an_index_that_says_something_else_is_refused(
    models: tuple[Model, Model, Path], tmp_path: Path, edit: Callable[[Any], object]
):
    before, after, base = models
    source = as_slime(tmp_path / "step", before, {**after, "mask": small(4)["mask"]})
    index(source, edit)
    with pytest.raises(sd.ShiraDeltaError, match="; "):
        read_wire("slime", source, base, tmp_path / "step.shd")
    assert not (tmp_path / "step.shd").exists()


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_a_step_for_another_model_is_refused(models: tuple[Model, Model, Path], tmp_path: Path, encoding: str):
    """XOR that is applied to the wrong base, or twice, gives neither: the checksum tells."""
    before, after, _ = models
    other = write(tmp_path / "other", small(3))
    patched = write(tmp_path / "patched", after)
    source = as_slime(tmp_path / "step", before, after, encoding)
    with pytest.raises(sd.SourceError, match="give the model before the step"):
        read_wire("slime", source, other, tmp_path / "step.shd")
    if encoding == "xor":
        with pytest.raises(sd.SourceError, match="give the model before the step"):
            read_wire("slime", source, patched, tmp_path / "step.shd")
    step = tmp_path / "set.shd"
    sd.save_delta(step, set_step(before, after))
    with pytest.raises(sd.ChainError, match="wrong_base"):
        write_wire("slime", step, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    del before["mask"]
    with pytest.raises(sd.SourceError, match="give the model before the step"):
        read_wire("slime", source, write(tmp_path / "smaller", before), tmp_path / "step.shd")


def test_what_a_wire_cannot_hold_and_wrong_names_are_refused(models: tuple[Model, Model, Path], tmp_path: Path):
    before, _, base = models
    sd.save_delta(tmp_path / "new.shd", {"new": sd.TensorDelta((2,), None, np.zeros(2, "u1"), "uint8", "new")})
    with pytest.raises(sd.DeltaError, match="has no form for"):
        write_wire("slime", tmp_path / "new.shd", base, tmp_path / "out")
    sd.save_delta(tmp_path / "set.shd", set_step(before, change(before, np.random.default_rng(0))))
    for options, known in (({"level": "1"}, "encoding, checksum"), ({"encoding": "add"}, "xor, overwrite")):
        with pytest.raises(sd.DeltaError, match=known):
            write_wire("slime", tmp_path / "set.shd", base, tmp_path / "out", **options)
    with pytest.raises(sd.ArgumentError, match="slime"):
        read_wire("torch", tmp_path, base, tmp_path / "out.shd")
    assert not (tmp_path / "out").exists()


@given(st.randoms(use_true_random=False), st.sampled_from(["xor", "overwrite"]))
def test_a_damaged_file_is_refused_or_gives_the_step(
    tmp_path_factory: pytest.TempPathFactory, rng: random.Random, encoding: str
):
    root = tmp_path_factory.mktemp("wire")
    before = small()
    after = change(before, np.random.default_rng(0))
    base, source = write(root / "base", before), as_slime(root / "step", before, after, encoding)
    (file,) = source.glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(raw))
        raw[at : at + rng.randint(0, 4)] = rng.randbytes(rng.choice([1, 4]))
    file.write_bytes(raw[: rng.choice([len(raw), rng.randrange(len(raw))])])
    try:
        read_wire("slime", source, base, root / "step.shd")
    except sd.ShiraDeltaError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    assert same(replayed(before, root / "step.shd"), after)


def test_a_difference_that_would_fill_the_memory_is_refused(models: tuple[Model, Model, Path], tmp_path: Path):
    before, after, base = models
    source = as_slime(tmp_path / "step", before, after)
    (file,) = source.glob("*.safetensors")
    raw = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    header = {"mask": {"dtype": "U8", "shape": [len(raw)], "data_offsets": [0, len(raw)]}, "__metadata__": {"mask": ""}}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw)
    index(source, lambda about: about.update(weight_map={"mask": file.name}))
    with pytest.raises(sd.SourceError, match="268,435,456 bytes for at most 9"):
        read_wire("slime", source, base, tmp_path / "step.shd")


def test_the_commands_read_and_write_wires(
    models: tuple[Model, Model, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    before, after, _ = models
    monkeypatch.chdir(tmp_path)
    as_slime(Path("weight_v000007"), before, after)
    for words in (
        "chain import slime weight_v000007 --base base -o step.shd",
        "chain export slime step.shd --base base -o out --set version=7 --set base_version=6",
    ):
        result = CliRunner().invoke(main, words.split())
        assert result.exit_code == 0, result.output
    assert tensors_of(Path("out")) == tensors_of(Path("weight_v000007"))
