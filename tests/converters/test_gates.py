"""A gate beside a sparse change, as RIGSA has them: their product where the user says so, and refused else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import shiradelta
from shiradelta.errors import SourceError
from tests.conftest import write_model

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", {f"{Q}.weight": torch.ones(8, 16)})


def change() -> Tensor:
    made = torch.zeros(8, 16)
    made[1, 2], made[3, 4] = 1.5, -2
    return made


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize(
    ("weight", "gate"),
    [
        (".weight", ".alpha"),
        (".weight", ".weight.gate"),
        (".weight", ".weight_gate"),
        (".delta", ".alpha"),
        (".weight.delta", ".weight.alpha"),
        (".diff", ".gate"),
    ],
)
def test_a_gate_beside_its_change_is_refused(
    base: Path, tmp_path: Path, weight: str, gate: str, prefix: str, with_base: bool
):
    """Read as a fine-tuned model, the change would replace the weight."""
    file = tmp_path / "rigsa.safetensors"
    save_file({f"{prefix}{Q}{weight}": change(), f"{prefix}{Q}{gate}": torch.tensor([0.01])}, file)
    with pytest.raises(SourceError, match="give --kind rigsa to add their product"):
        shiradelta.convert(file, tmp_path / "x.shd", 1.0, base if with_base else None, "f32")
    assert not (tmp_path / "x.shd").exists()


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("change_key", "gate"),
    [(f"{Q}.weight", f"{Q}.gate"), (f"base_model.model.{Q}.delta", f"base_model.model.{Q}.alpha")],
)
def test_gate_and_change_are_read_where_the_user_says_so(
    base: Path, tmp_path: Path, with_base: bool, dtype: torch.dtype, change_key: str, gate: str
):
    file, factor = tmp_path / "rigsa.safetensors", torch.tensor([0.01], dtype=dtype)
    save_file({change_key: change().to(dtype), gate: factor}, file)
    shiradelta.convert(file, tmp_path / "x.shd", 1.0, base if with_base else None, "f32", kind="rigsa")
    with shiradelta.open_delta(tmp_path / "x.shd") as delta:
        assert list(delta) == [f"{Q}.weight"]
        assert torch.equal(torch.from_numpy(delta[f"{Q}.weight"].to_dense()), change() * factor.float())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{Q}.delta": change(), f"{Q}.weight": change()}, "may be the gate of .* or of .*remove one"),
        ({f"{Q}.delta": change(), f"{Q}.alpha": torch.ones(1)}, "are gates of .*; remove one"),
        ({f"{Q}.delta": change(), "other.weight": change()}, "other.weight: is neither a gate nor the one change"),
        ({f"{Q}.delta": change().T.contiguous()}, r"changes a weight of shape \[16, 8\], the base's .* has \[8, 16\]"),
        ({f"{Q}.delta": change().int()}, "is int32; gates and changes are"),
        ({f"{Q}.delta": change() * float("nan")}, "NaN"),
        ({}, "is neither a gate nor the one change beside it"),
    ],
    ids=["two changes", "two gates", "no gate", "shape", "int", "NaN", "no change"],
)
def test_pairs_that_are_unclear_are_refused(base: Path, tmp_path: Path, tensors: dict[str, Tensor], message: str):
    file = tmp_path / "rigsa.safetensors"
    save_file({f"{Q}.gate": torch.tensor([0.01]), **tensors}, file)
    with pytest.raises(SourceError, match=message):
        shiradelta.convert(file, tmp_path / "x.shd", 1.0, base, "f32", kind="rigsa")
    assert not (tmp_path / "x.shd").exists()


def test_the_product_is_exact(base: Path, tmp_path: Path):
    file, product = tmp_path / "product.safetensors", change() * 0.01
    save_file({f"{Q}.diff": product}, file)
    shiradelta.convert(file, tmp_path / "x.shd", 1.0, base, "f32")
    with shiradelta.open_delta(tmp_path / "x.shd") as delta:
        assert torch.equal(torch.from_numpy(delta[f"{Q}.weight"].to_dense()), product)


def test_a_number_of_the_model_itself_is_no_gate(tmp_path: Path):
    tensors = {f"{Q}.weight": torch.ones(8, 16), f"{Q}.alpha": torch.ones(1)}
    base = write_model(tmp_path / "base", tensors)
    tuned = write_model(tmp_path / "tuned", {name: one + change().sum() for name, one in tensors.items()})
    assert shiradelta.convert(tuned, tmp_path / "x.shd", 1.0, base, "f32").nnz == 129


def test_a_new_number_is_taken_as_one_by_kind_full(base: Path, tmp_path: Path):
    tuned = write_model(tmp_path / "tuned", {f"{Q}.weight": torch.ones(8, 16) + change(), f"{Q}.alpha": torch.ones(1)})
    shiradelta.convert(tuned, tmp_path / "x.shd", 1.0, base, "f32", kind="full")
    with shiradelta.open_delta(tmp_path / "x.shd") as delta:
        assert set(delta) == {f"{Q}.weight", f"{Q}.alpha"}
