"""GGUF, `.npz` and pickles from strangers: lengths that nothing has cost no memory.  See `test_hostile.py`."""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import write_model
from tests.converters.test_hostile import refusal
from tests.source_containers import Gguf, Npz
from tests.source_files import Made

UP = "model.layers.0.mlp.up_proj.weight"
F32 = np.ones(2, "<f4").tobytes()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = write_model(tmp_path / "base", {UP: torch.randn(16, 8)})
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    return folder


# ------------------------------------------------------------------------------------------ .npz


def csr(**parts: Made) -> dict[str, Made]:
    index, ends = np.zeros(2, "<i8").tobytes(), np.array([0] + [2] * 16, "<i8").tobytes()
    held: dict[str, Made] = {"data": ("F32", [2], F32), "indices": ("I64", [2], index), "indptr": ("I64", [17], ends)}
    shape = np.array([16, 8], "<i8").tobytes()
    return {**held, "format": ("|S3", [], b"csr"), "shape": ("I64", [2], shape), **parts}


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ([1 << 28], "F32", r"'data.npy' has 8 bytes for shape \[268435456\]"),
        ([1 << 62, 1 << 62], "F32", "'data.npy' has 8 bytes for shape"),
        ([1 << 40], "|S0", "'data.npy' holds"),
        ([1 << 40], "|V0", "'data.npy' holds"),
        ([-2], "F32", "damaged"),
        ([1], "|O", "'data.npy' holds object"),
    ],
)
def test_an_array_of_more_elements_than_it_has(
    tmp_path: Path, base: Path, shape: list[int], dtype: str, message: str, monkeypatch: pytest.MonkeyPatch
):
    """Nothing is read as an array, which would be allocated first."""
    monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("it was read"))
    file = tmp_path / f"{UP}.npz"
    held = csr(data=(dtype, shape, F32))
    file.write_bytes(Npz(held).bytes())
    line = refusal(file, base=base)
    assert "damaged" in line
    assert re.search(message, line)


@pytest.mark.parametrize("compressed", [True, False])
def test_an_archive_that_unpacks_to_gigabytes(tmp_path: Path, base: Path, compressed: bool):
    made = bytearray(Npz(csr(), compressed).bytes())
    for mark, at in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        where = made.find(mark) + at
        made[where : where + 4] = struct.pack("<I", 3 << 30)
    (tmp_path / f"{UP}.npz").write_bytes(made)
    assert "unpacks to 3,221,22" in refusal(tmp_path / f"{UP}.npz", base=base)


def test_a_header_that_numpy_mends_with_a_warning(tmp_path: Path, base: Path):
    made = Npz(csr(), damage=[lambda header: header]).bytes()
    held = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(made)) as old, zipfile.ZipFile(held, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"(2,)}", b"(2L)}"))
    (tmp_path / f"{UP}.npz").write_bytes(held.getvalue())
    assert "damaged" in refusal(tmp_path / f"{UP}.npz", base=base)


# ------------------------------------------------------------------------------------------ stacks, heads


@pytest.mark.parametrize("shape", [(1 << 40, 0, 8), (1 << 40, 2, 0)])
def test_a_stack_of_experts_without_elements(tmp_path: Path, base: Path, shape: tuple[int, ...]):
    stack = "model.layers.1.mlp.switch_mlp.up_proj"
    tensors = {f"{stack}.lora_a": torch.empty(shape), f"{stack}.lora_b": torch.empty(1 << 40, 0, 2)}
    (tmp_path / "mlx").mkdir()
    save_file(tensors, tmp_path / "mlx/adapters.safetensors")
    (tmp_path / "mlx/adapter_config.json").write_text(json.dumps({"lora_parameters": {"scale": 1}}))
    assert "has no elements" in refusal(tmp_path / "mlx", base=base)


def gguf(path: Path, tensors: dict[str, Made], damage: list[tuple[float, bytes]] | None = None) -> Path:
    about = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": "qwen2"}
    path.write_bytes(Gguf(tensors, about, damage=damage or []).bytes())
    return path


def test_a_stack_of_experts_of_llama_cpp_without_elements(tmp_path: Path, base: Path):
    empty: dict[str, Made] = {f"blk.0.ffn_up_exps.weight.lora_{part}": ("F32", [1 << 40, 0, 8], b"") for part in "ab"}
    assert "has no elements" in refusal(gguf(tmp_path / "x.gguf", empty), base=base)


@pytest.mark.parametrize("number", [1 << 31, 1 << 40, (1 << 64) - 1])
def test_counts_and_lengths_of_gguf_that_nothing_has(tmp_path: Path, base: Path, number: int):
    tensors: dict[str, Made] = {f"blk.0.ffn_up.weight.lora_{part}": ("F32", [2], F32) for part in "ab"}
    for field in range(1, 26):
        share = (field + 0.5) / 27
        refusal(gguf(tmp_path / f"{field}.gguf", tensors, [(share, struct.pack("<Q", number))]), base=base)


@pytest.mark.parametrize("heads", [10**4000, 1 << 40])
def test_heads_that_no_model_has(tmp_path: Path, base: Path, heads: Any):
    (base / "config.json").write_text(json.dumps({"num_attention_heads": heads}))
    tensors: dict[str, Made] = {f"blk.0.attn_q.weight.lora_{part}": ("F32", [1, 2], F32) for part in "ab"}
    assert "num_attention_heads" in refusal(gguf(tmp_path / "x.gguf", tensors), base=base)


def test_heads_of_a_base_without_tensors(tmp_path: Path):
    save_file({}, tmp_path / "empty.safetensors")
    tensors: dict[str, Made] = {f"blk.0.attn_q.weight.lora_{part}": ("F32", [1, 2], F32) for part in "ab"}
    assert "num_attention_heads" in refusal(gguf(tmp_path / "x.gguf", tensors), base=tmp_path / "empty.safetensors")


def test_megatrons_queries_without_elements(tmp_path: Path, base: Path):
    shapes = {"linear_in": (2, 8), "linear_out": (12, 0)}
    name = "decoder.layers.0.self_attention.linear_qkv.adapter"
    save_file(
        {f"{name}.{side}.weight": torch.ones(shape) for side, shape in shapes.items()}, tmp_path / "x.safetensors"
    )
    assert "has no elements" in refusal(tmp_path / "x.safetensors", base=base, alpha=1)


# ------------------------------------------------------------------------------------------ pickles


def test_a_sparse_tensor_that_repeats_one_element(tmp_path: Path):
    """Of stride 0: 2^40 elements of a storage of one."""
    where, values = torch.zeros(2, 1, dtype=torch.int64).expand(2, 1 << 40), torch.ones(1).expand(1 << 40)
    torch.save({UP: torch.sparse_coo_tensor(where, values, (16, 8), check_invariants=False)}, tmp_path / "x.pt")
    assert "has more elements than its file" in refusal(tmp_path / "x.pt")
