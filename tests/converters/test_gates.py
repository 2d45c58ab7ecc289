"""A gate beside a sparse change, as RIGSA has them: refused where they are apart, read as their product."""

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
    with pytest.raises(SourceError, match="multiply each change by its gate"):
        shiradelta.convert(file, tmp_path / "x.shd", 1.0, base if with_base else None, "f32")
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
