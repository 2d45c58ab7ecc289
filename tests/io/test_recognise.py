"""What a user gives by mistake is called by its name, with what to do."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import shiradelta
from shiradelta.errors import FormatError, ShiraDeltaError
from shiradelta.folder.verification import existing
from shiradelta.io.recognise import THINGS, Wanted, explain
from shiradelta.models.checkpoint import open_checkpoint
from shiradelta.text.read import read_file

#: How something is opened that should have been this.
OPENED: dict[Wanted, Callable[[Path], object]] = {
    Wanted.DELTA: shiradelta.open_delta,
    Wanted.FOLDER: lambda path: open_checkpoint(existing(path)),
    Wanted.WEIGHTS: open_checkpoint,
    Wanted.BASE: lambda path: open_checkpoint(path, Wanted.BASE),
    Wanted.SOURCE: shiradelta.convert,
    Wanted.TEXTS: lambda path: read_file(path),
}


def lfs(path: Path) -> Path:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    return path


def gguf(path: Path) -> Path:
    path.write_bytes(b"GGUF\3\0\0\0" + bytes(200))
    return path


def arrays(path: Path) -> Path:
    np.savez(path, w=np.ones(3))
    return path


def pickle(path: Path) -> Path:
    torch.save({"w": torch.ones(3)}, path)
    return path


def delta(path: Path) -> Path:
    shiradelta.save_delta(path, {"w": shiradelta.TensorDelta((2,), [0], [1.0], "float32")})
    return path


def weights(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"w": np.ones(3, np.float32)}, path)
    return path


def adapter(folder: Path) -> Path:
    weights(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    return folder


def as_json(path: Path) -> Path:
    path.write_text("{}")
    return path


def quantised(folder: Path, method: str) -> Path:
    weights(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    return folder


#: (name in THINGS, makes it in a folder).
CASES: list[tuple[str, Callable[[Path], Path]]] = [
    ("stdin", lambda at: Path("-")),
    ("page of the Hub", lambda at: Path("https://huggingface.co/user/repo/blob/main/a.shd")),
    ("page of the Hub", lambda at: Path("http://hf.co/user/repo")),
    ("URL", lambda at: Path("https://example.org/model")),
    ("URL", lambda at: Path("https://huggingface.community/model")),
    ("hub id", lambda at: Path("some-user/model-7B")),
    ("Git LFS pointer", lambda at: lfs(at / "x.safetensors")),
    ("Git LFS pointer", lambda at: lfs(at / "x.shd")),
    ("GGUF", lambda at: gguf(at / "x.gguf")),
    ("GGUF", lambda at: gguf(at / "x.gguf").parent),
    ("NumPy file", lambda at: arrays(at / "x.npz")),
    ("pickle", lambda at: pickle(at / "x.bin")),
    ("pickle", lambda at: pickle(at / "weights")),
    ("pickle", lambda at: pickle(at / "pytorch_model.bin").parent),
    ("delta", lambda at: delta(at / "x.shd")),
    ("adapter", lambda at: adapter(at / "adapter")),
    ("adapter", lambda at: adapter(at / "adapter") / "adapter_model.safetensors"),
    ("delta", lambda at: delta(at / "renamed.bin")),
    ("JSON file", lambda at: as_json(at / "config.json")),
    ("JSON file", lambda at: as_json(at / "texts.jsonl")),
    ("quantised model", lambda at: quantised(at / "m", "bitsandbytes")),
    ("quantised model", lambda at: quantised(at / "m", "awq")),
    ("quantised model", lambda at: quantised(at / "m", "gptq")),
    ("safetensors file", lambda at: weights(at / "x.safetensors")),
    ("folder", lambda at: weights(at / "model" / "model.safetensors").parent),
]


def test_each_thing_has_a_case():
    assert {name for name, _ in CASES} == set(THINGS)


@pytest.mark.parametrize(("name", "make"), CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def test_things_are_called_by_their_name(tmp_path: Path, name: str, make: Callable[[Path], Path]):
    path, thing = make(tmp_path), THINGS[name]
    for one in thing.remedies:
        if (name, one) == ("delta", Wanted.SOURCE) and path.suffix != ".shd":
            continue  # it is converted into another, whose file has the suffix
        with pytest.raises(ShiraDeltaError) as caught:
            OPENED[one](path)
        message = str(caught.value)
        assert message.startswith(str(path).replace(":/", "://"))  # a URL that is a path lacks a slash
        assert thing.what in message
        assert message.endswith("; " + thing.remedies[one].replace("{path}", str(path)))
        assert "\n" not in message


@pytest.mark.parametrize("method", ["bitsandbytes", "awq", "gptq"])
def test_a_quantised_component_is_called_so(tmp_path: Path, method: str):
    weights(tmp_path / "vae" / "model.safetensors")
    quantised(tmp_path / "unet", method)
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet"], "vae": ["diffusers", "Vae"]}))
    with pytest.raises(ShiraDeltaError, match=r"/unet: belongs to a quantised model .* give the unquantised model"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("make", "file"), [(gguf, "unet.gguf"), (pickle, "diffusion_pytorch_model.bin")])
def test_a_component_in_another_format_is_called_so(tmp_path: Path, make: Callable[[Path], Path], file: str):
    weights(tmp_path / "vae" / "model.safetensors")
    (tmp_path / "unet").mkdir()
    make(tmp_path / "unet" / file)
    assert list(open_checkpoint(tmp_path)) == ["vae/w"]  # nothing says that it is a component
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet"], "vae": ["diffusers", "Vae"]}))
    with pytest.raises(ShiraDeltaError, match=r"/unet: has its weights in a (GGUF|pickle)"):
        open_checkpoint(tmp_path)


def test_a_quantised_folder_is_called_so_where_it_would_be_patched(tmp_path: Path):
    folder = quantised(tmp_path / "m", "awq")
    for change in (shiradelta.apply, shiradelta.verify):
        with pytest.raises(ShiraDeltaError, match="belongs to a quantised model"):
            change(folder, delta(tmp_path / "x.shd"))
    assert not (folder / ".shiradelta").exists()


@pytest.mark.skipif(os.name == "nt", reason="its files have no holes")
def test_a_configuration_of_gigabytes_is_not_read(tmp_path: Path):
    weights(tmp_path / "model.safetensors")
    with open(tmp_path / "config.json", "wb") as stream:
        stream.truncate(1 << 40)
    assert explain(tmp_path, Wanted.FOLDER) is None


@pytest.mark.parametrize(
    "name", ["model.safetensors.index.json", "modules.json", "adapter_config.json", "model_index.json"]
)
def test_a_pointer_in_place_of_json_is_called_so(tmp_path: Path, name: str):
    weights(tmp_path / ("adapter_model.safetensors" if name == "adapter_config.json" else "model-00001.safetensors"))
    lfs(tmp_path / name)
    with pytest.raises(ShiraDeltaError, match=rf"{re.escape(name)}: is a Git LFS pointer.*git lfs pull"):
        shiradelta.convert(tmp_path, tmp_path / "x.shd")


@pytest.mark.parametrize("names", [("checkpoint-10", "checkpoint-20"), ("checkpoint-10",), ("one", "other")])
def test_folders_of_states_are_refused_by_every_command(tmp_path: Path, names: tuple[str, ...]):
    for name in names:
        weights(tmp_path / "out" / name / "model.safetensors")
    file = delta(tmp_path / "x.shd")
    for call in (
        lambda: shiradelta.apply(tmp_path / "out", file),
        lambda: shiradelta.verify(tmp_path / "out"),
        lambda: shiradelta.verify(tmp_path / "out", file),
        lambda: shiradelta.revert(tmp_path / "out"),
        lambda: shiradelta.convert(tmp_path / "out", base=tmp_path / "out" / names[0]),
        lambda: shiradelta.convert(tmp_path / "out" / names[0], base=tmp_path / "out"),
    ):
        with pytest.raises(ShiraDeltaError, match=rf"out: holds .* give the one that is meant: .*/out/{names[-1]}"):
            call()


def test_a_path_that_is_not_there_comes_before_the_file_beside_it(tmp_path: Path):
    with pytest.raises(ShiraDeltaError, match=r"nothing/tuned: no such file or folder"):
        shiradelta.convert(tmp_path / "nothing" / "tuned")


def test_a_pointer_among_the_shards_is_called_so(tmp_path: Path):
    lfs(tmp_path / "model.safetensors")
    with pytest.raises(ShiraDeltaError, match=r"model\.safetensors: is a Git LFS pointer.*git lfs pull"):
        open_checkpoint(tmp_path)


def test_a_refused_delta_keeps_its_reason(tmp_path: Path):
    for read in (shiradelta.open_delta, lambda path: shiradelta.HotSwap({}).load("a", path)):
        with pytest.raises(
            FormatError, match=r"it has its weights in a GGUF.*\[bad_magic\]; give a \.shd file$"
        ) as caught:
            read(gguf(tmp_path / "x.shd"))
        assert caught.value.reason == "bad_magic"


def test_what_is_as_wanted_is_taken(tmp_path: Path):
    """A pipeline's folder with a pickle of the training's settings, a safetensors file that
    starts as a pickle does, and an adapter's file beside its base's config.
    """
    weights(tmp_path / "unet" / "model.safetensors")
    pickle(tmp_path / "training_args.bin")
    assert list(open_checkpoint(tmp_path)) == ["unet/w"]
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).ljust(0x280).encode()
    (tmp_path / "x.bin").write_bytes(len(header).to_bytes(8, "little") + header + b"0")  # starts as a pickle does
    assert list(open_checkpoint(tmp_path / "x.bin")) == ["w"]
    quantised(tmp_path / "out", "bitsandbytes")
    adapter(tmp_path / "out")
    assert list(open_checkpoint(tmp_path / "out" / "adapter_model.safetensors", Wanted.SOURCE)) == ["w"]
