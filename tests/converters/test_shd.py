"""A `.shd` file as the source of another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import shiradelta
from shiradelta import TensorDelta
from shiradelta.errors import BaseMismatchError, SourceError
from tests.conftest import SHAPES, random_tensors, write_model

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", random_tensors(torch.bfloat16))


@pytest.fixture
def tuned(tmp_path: Path, base: Path) -> Path:
    generator = torch.Generator().manual_seed(5)
    made = {
        name: (tensor.float() + torch.randn(tensor.shape, generator=generator) * 0.1).to(tensor.dtype)
        for name, tensor in random_tensors(torch.bfloat16).items()
    }
    return write_model(tmp_path / "tuned", made)


def contents(file: Path) -> dict[str, tuple[str, bytes, bytes, int | None]]:
    with shiradelta.open_delta(file) as delta:
        return {
            name: (tensor.op, tensor.positions().tobytes(), tensor.bits().tobytes(), tensor.base_fingerprint)
            for name, tensor in delta.items()
        }


def test_fewer_nonzeros_are_those_of_the_fine_tune(tmp_path: Path, base: Path, tuned: Path):
    large, small, direct = (tmp_path / f"{name}.shd" for name in ("large", "small", "direct"))
    shiradelta.convert(tuned, large, 0.3, base, "f32")
    shiradelta.convert(large, small, 0.05, base, "f32")
    shiradelta.convert(tuned, direct, 0.05, base, "f32")
    assert contents(small) == contents(direct)
    report = shiradelta.convert(large, small, 0.05, base, "int4")
    assert 0 < report.energy_kept < 1
    shiradelta.apply(base, small)


def test_all_of_it_in_another_form(tmp_path: Path, base: Path, tuned: Path):
    shiradelta.convert(tuned, tmp_path / "a.shd", 0.1, base, "f32")
    report = shiradelta.convert(tmp_path / "a.shd", tmp_path / "b.shd", 1.0, base, "f32")
    assert contents(tmp_path / "a.shd") == contents(tmp_path / "b.shd")
    assert not report.warnings
    report = shiradelta.convert(tmp_path / "a.shd", tmp_path / "b.shd", 1.0, values="int8")
    assert "lose their fingerprints of the base" in report.warnings[-1]
    found = contents(tmp_path / "b.shd")
    assert {name: part[1] for name, part in found.items()} == {n: p[1] for n, p in contents(tmp_path / "a.shd").items()}
    assert all(part[3] is None for part in found.values())


def test_fingerprints_that_a_file_lacked(tmp_path: Path, base: Path):
    shiradelta.save_delta(tmp_path / "a.shd", {UP: TensorDelta(SHAPES[UP], [1, 5], [1.0, 2.0])}, values="f32")
    shiradelta.convert(tmp_path / "a.shd", tmp_path / "b.shd", 1.0, base, "f32")
    ((op, positions, _, fingerprint),) = contents(tmp_path / "b.shd").values()
    assert (op, positions) == ("add", np.array([1, 5]).tobytes())
    assert fingerprint is not None


@pytest.mark.parametrize("with_base", [False, True])
def test_other_operations_are_taken_over(tmp_path: Path, base: Path, with_base: bool):
    old = random_tensors(torch.bfloat16)[UP].view(torch.int16).numpy().view(np.uint16).reshape(-1)
    tensors = {
        UP: TensorDelta(SHAPES[UP], [3], np.array([7], np.uint16), "bfloat16", "set", base_bits=old[[3]]),
        "new.weight": TensorDelta((2,), None, np.array([1, 2], np.float32), "float32", "new"),
        "model.embed_tokens.weight": TensorDelta(SHAPES["model.embed_tokens.weight"], None, None, "bfloat16", "drop"),
    }
    shiradelta.save_delta(tmp_path / "a.shd", tensors)
    shiradelta.convert(tmp_path / "a.shd", tmp_path / "b.shd", 0.01, base if with_base else None)
    assert contents(tmp_path / "a.shd") == contents(tmp_path / "b.shd")


def test_what_does_not_fit(tmp_path: Path, base: Path, tuned: Path):
    file, out = tmp_path / "a.shd", tmp_path / "b.shd"
    shiradelta.convert(tuned, file, 0.1, base)
    with pytest.raises(BaseMismatchError, match=r"was made for other weights than those of .*tuned; give the base"):
        shiradelta.convert(file, out, 0.05, tuned)
    with pytest.raises(SourceError, match=r"give -o FILE \(out=\) to make another of it"):
        shiradelta.convert(file)
    with pytest.raises(SourceError, match="is the file to write, too"):
        shiradelta.convert(file, file)
    shiradelta.save_delta(file, {UP: TensorDelta((4, 4), [1], [1.0]), "other": TensorDelta((2,), [0], [1.0])})
    with pytest.raises(SourceError, match=r"for a tensor of shape \[4, 4\], .*other: the base has no such tensor"):
        shiradelta.convert(file, out, 1.0, base)
    shiradelta.save_delta(file, {UP: TensorDelta(SHAPES[UP], [1], np.zeros(1, np.float16), "float16", "set")})
    with pytest.raises(SourceError, match="is for float16, the base's tensor is bfloat16"):
        shiradelta.convert(file, out, 1.0, base)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(shiradelta.ShiraDeltaError):
        shiradelta.convert(file, out, 1.0, base)
