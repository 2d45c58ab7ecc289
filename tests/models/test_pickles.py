"""Pickles of PyTorch: what `convert` reads of them, and what hostile ones cannot do."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import shiradelta
from shiradelta.errors import MissingDependencyError, ShiraDeltaError, SourceError
from shiradelta.io.recognise import Wanted
from shiradelta.models.checkpoint import Checkpoint, open_checkpoint
from shiradelta.models.pickles import read_pickle
from tests.conftest import write_model


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(6, 4, generator=generator).bfloat16(),
        "b.weight": torch.randn(5, 3, generator=generator),
        "b.bias": torch.randn(5, generator=generator).half(),
        "steps": torch.tensor(7),
    }


def contents(checkpoint: Checkpoint) -> dict[str, tuple[object, ...]]:
    return {name: (slot.shape, slot.dtype.name, checkpoint.bits(name).tobytes()) for name, slot in checkpoint.items()}


def same_as_safetensors(path: Path, held: dict[str, torch.Tensor]) -> None:
    plain = path.with_name("plain.safetensors")
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in held.items()}, plain)
    assert contents(open_checkpoint(path, Wanted.SOURCE)) == contents(open_checkpoint(plain))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_the_bits_are_those_of_safetensors(tmp_path: Path, suffix: str, zipped: bool):
    path, held = tmp_path / f"x{suffix}", tensors()
    torch.save(held, path, _use_new_zipfile_serialization=zipped)
    same_as_safetensors(path, held)


@pytest.mark.parametrize(
    "dtype",
    [
        "float64",
        "int8",
        "uint8",
        "int16",
        "uint16",
        "int32",
        "int64",
        "bool",
        "complex64",
        "float8_e4m3fn",
        "float8_e5m2",
    ],
)
def test_every_dtype(tmp_path: Path, dtype: str):
    held = {"w": torch.arange(6).reshape(2, 3).to(getattr(torch, dtype))}
    torch.save(held, tmp_path / "x.pt")
    same_as_safetensors(tmp_path / "x.pt", held)


def test_shared_storages_and_views_are_read_as_what_they_show(tmp_path: Path):
    whole = torch.arange(24.0).reshape(4, 6)
    held = {"w": whole, "tied": whole, "t": whole.t(), "rows": whole[1:3], "steps": whole[:, ::2], "empty": whole[4:]}
    held["wide"] = torch.arange(4.0).expand(3, 4)
    held["p"] = torch.nn.Parameter(whole[2])
    torch.save(held, tmp_path / "x.bin")
    same_as_safetensors(tmp_path / "x.bin", held)


def test_a_models_own_state(tmp_path: Path):
    """An OrderedDict with an attribute, and Lightning's nesting."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(model.state_dict(), tmp_path / "x.pt")
    same_as_safetensors(tmp_path / "x.pt", model.state_dict())
    torch.save({"state_dict": model.state_dict(), "epoch": 3, "by": "me"}, tmp_path / "x.ckpt")
    same_as_safetensors(tmp_path / "x.ckpt", model.state_dict())


def test_adapters_and_models_convert_as_their_safetensors_do(tmp_path: Path):
    base = write_model(tmp_path / "base", {"q.weight": torch.ones(8, 8)})
    factors = {
        "base_model.model.q.lora_A.weight": torch.ones(2, 8),
        "base_model.model.q.lora_B.weight": torch.ones(8, 2),
    }
    for name, save in (("adapter_model.safetensors", save_file), ("adapter_model.bin", torch.save)):
        folder = tmp_path / name.rpartition(".")[2] / "lora"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
        save(factors, folder / name)
        shiradelta.convert(folder, sparsity=1, base=base, values="f32")
    assert (tmp_path / "bin/lora.shd").read_bytes() == (tmp_path / "safetensors/lora.shd").read_bytes()

    pickled, tuned = tmp_path / "pickled", tmp_path / "tuned"
    for folder, factor in ((pickled, 1), (tuned, 2)):
        folder.mkdir()
        torch.save({"q.weight": torch.full((8, 8), float(factor))}, folder / "pytorch_model-00001-of-00002.bin")
        torch.save({"k.weight": torch.full((4, 8), float(factor))}, folder / "pytorch_model-00002-of-00002.bin")
        torch.save({"lr": 1}, folder / "training_args.bin")
        names = {"q.weight": "pytorch_model-00001-of-00002.bin", "k.weight": "pytorch_model-00002-of-00002.bin"}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    report = shiradelta.convert(tuned, tmp_path / "full.shd", sparsity=1, base=pickled, values="f32")
    assert {tensor.name: tensor.nnz for tensor in report.tensors} == {"q.weight": 64, "k.weight": 32}
    (tuned / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(SourceError, match="several weight files"):
        shiradelta.convert(tuned, base=pickled)


def test_nothing_but_convert_reads_them(tmp_path: Path):
    torch.save({"w": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    delta = tmp_path / "x.shd"
    shiradelta.save_delta(delta, {"w": shiradelta.TensorDelta((3,), [0], [1.0], "float32")})
    for call in (shiradelta.apply, shiradelta.verify):
        with pytest.raises(ShiraDeltaError, match=r"has its weights in a pickle of PyTorch .*; save it as"):
            call(tmp_path, delta)


# ------------------------------------------------------------------------------------------------ hostile


class Command:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self.command,)


class Huge:
    """Allocates where it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return bytearray, (1 << 45,)


class Hidden(dict):  # type: ignore[type-arg]
    """A class of the file's own."""


def rezipped(path: Path, change: Callable[[str, bytes], bytes], how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, data in held.items():
            archive.writestr(name, change(name, data))
    return path


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["alone", "beside", "name"])
def test_code_in_a_pickle_never_runs(tmp_path: Path, where: str, zipped: bool):
    ran, path = tmp_path / "ran", tmp_path / "x.bin"
    harm = Command(f"touch {ran}")
    held = {"alone": harm, "beside": {**tensors(), "x": harm}, "name": {("a", harm): torch.ones(2)}}[where]
    torch.save(held, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(SourceError, match=r"is a pickle of more than tensors \((posix|nt)\.system\)"):
        shiradelta.convert(path)
    path.write_bytes(pickle.dumps(held, protocol=4))
    with pytest.raises(SourceError, match=r"is not a file of torch\.save"):
        shiradelta.convert(path)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"w": Huge()}, r"more than tensors \((__builtin__|builtins)\.bytearray\)"),
        (torch.nn.Linear(2, 2), r"more than tensors \(.*torch\.nn\.modules\.linear\.Linear"),
        (Hidden(w=torch.ones(2)), r"more than tensors \(.*Hidden\)"),
        ({"w": torch.ones(2), "step": 3}, r"1 entry that is no tensor \('step'\)"),
        ({"w": {"x": torch.ones(2)}}, r"1 entry that is no tensor \('w'\)"),
        ({3: torch.ones(2)}, r"1 entry that is no tensor \('?3'?\)"),
        ({"state_dict": {"w": torch.ones(2)}, "ema": {"w": torch.ones(2)}}, "holds 'ema' beside 'state_dict'"),
        ([torch.ones(2)], "holds a list, not tensors by name"),
        ({}, "holds no tensors"),
        ({"w": torch.ones(2, 2).to_sparse()}, "is sparse"),
        ({"w": torch.ones(2, 2, device="meta")}, "more than tensors"),
        ({"w": torch.ones(1).expand(1 << 40)}, "has shape .*, and the file has only"),
        ({"w": torch.ones(2, dtype=torch.complex64).conj()}, "more than tensors|a view that torch computes"),
        ({"": torch.ones(2)}, "has a name that"),
        ({"w": torch.ones(2, dtype=torch.complex128)}, "has dtype torch.complex128, which .shd files do not know"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # the same in every process of a run
)
def test_what_is_more_than_tensors_is_refused_in_a_line(tmp_path: Path, held: object, message: str):
    torch.save(held, tmp_path / "x.pt")
    with pytest.raises(SourceError, match=message) as caught:
        read_pickle(tmp_path / "x.pt")
    assert str(caught.value).startswith(str(tmp_path / "x.pt"))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_bombs_are_refused_before_they_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.save(tensors(), tmp_path / "x.pt")
    bomb = rezipped(tmp_path / "x.pt", lambda name, data: data + b"N0" * (1 << 22), zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(SourceError, match="is compressed"):
        read_pickle(bomb)
    torch.save(tensors(), tmp_path / "y.pt")
    with zipfile.ZipFile(tmp_path / "y.pt", "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("y/data.pkl", b"N.")
    with pytest.raises(SourceError, match="twice"):
        read_pickle(tmp_path / "y.pt")
    monkeypatch.setattr("shiradelta.models.pickles._MOST_OPCODES", 500)
    torch.save(tensors(), tmp_path / "z.pt")
    with pytest.raises(SourceError, match="its program is huge"):
        read_pickle(rezipped(tmp_path / "z.pt", lambda name, data: b"N" * 502 + b"." if "pkl" in name else data))


def test_storages_that_claim_too_much_are_refused(tmp_path: Path):
    for zipped in (True, False):
        path = tmp_path / "x.pt"
        torch.save({"w": torch.ones(4)}, path, _use_new_zipfile_serialization=zipped)
        data = path.read_bytes()
        assert data.count(b"K\x04") >= 1  # the number 4: of elements, and the shape
        path.write_bytes(data.replace(b"K\x04", b"K\xff"))
        with pytest.raises(SourceError):
            read_pickle(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_are_read_or_refused(tmp_path: Path, zipped: bool):
    path = tmp_path / "x.bin"
    torch.save(tensors(), path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    generator = torch.Generator().manual_seed(1)
    damaged = [data[: len(data) * part // 8] for part in range(8)]
    for _ in range(40):
        at = int(torch.randint(len(data), (1,), generator=generator))
        damaged.append(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
    for each in damaged:
        path.write_bytes(each)
        with suppress(SourceError):
            contents(open_checkpoint(path, Wanted.SOURCE))


def test_torch_is_needed_and_without_known_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.save(tensors(), tmp_path / "x.pt")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(MissingDependencyError, match=r"x\.pt: .* needs torch 2\.10 or newer") as caught:
        shiradelta.convert(tmp_path / "x.pt")
    assert caught.value.name == "torch"
    with monkeypatch.context() as context:
        context.setitem(__import__("sys").modules, "torch", None)
        with pytest.raises(MissingDependencyError, match="needs torch, which is not installed"):
            read_pickle(tmp_path / "x.pt")
