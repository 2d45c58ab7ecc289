"""Adapters of LyCORIS whose change depends on the base's weights, against their formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import shiradelta
from shiradelta.errors import SourceError
from tests.conftest import write_model

LINEAR, CONV = "up", "conv"
SHAPES = {f"{LINEAR}.weight": (16, 8), f"{CONV}.weight": (6, 4, 3, 3)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", weights())


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def changes(tensors: dict[str, Tensor], base: Path | None, folder: Path) -> dict[str, Tensor]:
    """What the parts of modules change; part names begin with the module's."""
    held = {f"lycoris_{key}": tensor.contiguous() for key, tensor in tensors.items()}
    save_file(held, folder / "x.safetensors")
    shiradelta.convert(folder / "x.safetensors", folder / "x.shd", 1.0, base, "f32")
    with shiradelta.open_delta(folder / "x.shd") as delta:
        return {name: torch.from_numpy(delta[name].to_dense()) for name in delta}


def rotation(blocks: Tensor, bound: float = 0.0) -> Tensor:
    q = blocks - blocks.mT
    q = q * min(1.0, bound / q.norm()) if bound else q
    one = torch.eye(q.shape[-1])
    return (one + q) @ torch.linalg.inv(one - q)


def test_glora(base: Path, tmp_path: Path):
    shapes = {
        "up": {"a1": (8, 2), "a2": (2, 8), "b1": (16, 2), "b2": (2, 8)},
        "conv": {"a1": (4, 2, 1, 1), "a2": (2, 4, 1, 1), "b1": (6, 2, 1, 1), "b2": (2, 4, 3, 3)},
    }
    parts = {m: {part: torch.randn(shape) for part, shape in held.items()} for m, held in shapes.items()}
    file = {f"{m}.{part}.weight": tensor for m, held in parts.items() for part, tensor in held.items()}
    found = changes({**file, "up.alpha": torch.tensor(3.0), "conv.alpha": torch.tensor(2.0)}, base, tmp_path)
    a, b, before = parts["up"], parts["conv"], weights()
    wanted = 1.5 * (a["b1"] @ a["b2"] + before["up.weight"] @ a["a1"] @ a["a2"])
    torch.testing.assert_close(found["up.weight"], wanted)
    through = torch.einsum("oikl,ij,jr->orkl", before["conv.weight"], b["a1"][:, :, 0, 0], b["a2"][:, :, 0, 0])
    torch.testing.assert_close(
        found["conv.weight"], through + torch.einsum("or,rikl->oikl", b["b1"][:, :, 0, 0], b["b2"])
    )


def test_diagonal_blocks_of_rotations(base: Path, tmp_path: Path):
    blocks, small, lengths = torch.randn(4, 4, 4) * 0.1, torch.randn(2, 3, 3) * 0.1, torch.rand(6, 1, 1, 1)
    file = {"up.oft_blocks": blocks, "up.alpha": torch.tensor(0.01), "conv.oft_blocks": small, "conv.rescale": lengths}
    found, before = changes(file, base, tmp_path), weights()
    turned = torch.block_diag(*rotation(blocks, 0.16)).T @ before["up.weight"]
    torch.testing.assert_close(found["up.weight"], turned - before["up.weight"])
    turned = lengths * torch.einsum("no,nikl->oikl", torch.block_diag(*rotation(small)), before["conv.weight"])
    torch.testing.assert_close(found["conv.weight"], turned - before["conv.weight"])


def test_a_butterfly_of_rotations(base: Path, tmp_path: Path):
    blocks = torch.randn(3, 4, 4, 4) * 0.1
    found, before = changes({"up.oft_blocks": blocks}, base, tmp_path), weights()["up.weight"]
    turned = before
    for stage in range(3):
        apart = 2**stage * 2
        # Position (c, pair, inner) of the outputs stands at (c, inner, pair) while the blocks turn them.
        order = torch.arange(16).reshape(-1, 2, apart).transpose(1, 2).reshape(-1)
        moved = torch.block_diag(*rotation(blocks[stage])) @ turned[order]
        turned = torch.empty_like(moved)
        turned[order] = moved
    torch.testing.assert_close(found["up.weight"], turned - before)


def test_lengths_of_inputs_and_outputs(base: Path, tmp_path: Path):
    inputs, outputs = torch.randn(8), torch.randn(1, 6, 1, 1)
    file = {
        "up.weight": inputs,
        "up.on_input": torch.tensor(1),
        "conv.weight": outputs,
        "conv.on_input": torch.tensor(0),
    }
    found, before = changes(file, base, tmp_path), weights()
    torch.testing.assert_close(found["up.weight"], before["up.weight"] * inputs)
    torch.testing.assert_close(found["conv.weight"], before["conv.weight"] * outputs.reshape(6, 1, 1, 1))


def test_what_began_as_a_part_of_the_base(base: Path, tmp_path: Path):
    """T-LoRA."""
    p, q, lengths = torch.randn(16, 2), torch.randn(2, 8), torch.randn(1, 2)
    file = {"up.p_layer.weight": p, "up.q_layer.weight": q, "up.lambda_layer": lengths, "up.alpha": torch.tensor(1.0)}
    found, before = changes(file, base, tmp_path), weights()["up.weight"]
    u, s, v = torch.linalg.svd(before, full_matrices=False)
    wanted = 0.5 * ((p * lengths) @ q - (u[:, :2] * s[:2]) @ v[:2])
    torch.testing.assert_close(found["up.weight"], wanted, atol=1e-5, rtol=1e-4)


def test_what_a_file_does_not_say_is_a_warning(base: Path, tmp_path: Path):
    parts = {"p_layer.weight": torch.randn(16, 2), "q_layer.weight": torch.randn(2, 8), "lambda_layer": torch.ones(2)}
    save_file({f"up.{part}": tensor for part, tensor in parts.items()}, tmp_path / "t.safetensors")
    save_file({"up.oft_blocks": torch.randn(4, 4, 4)}, tmp_path / "oft.safetensors")
    said = shiradelta.convert(tmp_path / "t.safetensors", tmp_path / "x.shd", 1.0, base).warnings
    assert any("1 module of T-LoRA: the file does not store what the factors were before" in line for line in said)
    assert not shiradelta.convert(tmp_path / "oft.safetensors", tmp_path / "x.shd", 1.0, base).warnings


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"oft_blocks": torch.randn(4, 4, 5)}, r"oft_blocks \[4, 4, 5\]\) fit no OFT of 'up.weight' \[16, 8\]"),
        ({"oft_blocks": torch.randn(4, 3, 3)}, "fit no OFT"),
        ({"oft_blocks": torch.randn(4, 4, 4, 4)}, "fit no OFT"),  # a stage more than there are outputs to mix
        ({"oft_blocks": torch.randn(4, 4, 4), "rescale": torch.randn(8, 1)}, "fit no OFT"),
        ({"oft_blocks": torch.randn(4, 4, 4), "lora_up.weight": torch.randn(16, 2)}, "are of several methods"),
        ({"weight": torch.randn(7), "on_input": torch.tensor(1)}, r"fit no \(IA\)\^3"),
        ({"weight": torch.randn(16), "on_input": torch.tensor(1)}, "has 16 lengths for 8 inputs"),
        ({"a1.weight": torch.randn(8, 2), "a2.weight": torch.randn(3, 8), "b1.weight": torch.randn(16, 2),
          "b2.weight": torch.randn(2, 8)}, "fit no GLoRA"),
        ({"p_layer.weight": torch.randn(16, 2), "q_layer.weight": torch.randn(3, 8), "lambda_layer": torch.randn(1, 2)},
         "fit no T-LoRA"),
        ({"oft_blocks": torch.zeros(4, 4, 4, dtype=torch.int32)}, "is int32; factors are float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_does_not_fit_together(held: dict[str, Tensor], message: str, base: Path, tmp_path: Path):
    with pytest.raises(SourceError, match=message) as caught:
        changes({f"up.{part}": tensor for part, tensor in held.items()}, base, tmp_path)
    assert "\n" not in str(caught.value)


def test_the_base_is_needed(tmp_path: Path):
    with pytest.raises(SourceError, match="is of OFT, whose change depends on the base's weights; give --base MODEL"):
        changes({"up.oft_blocks": torch.randn(4, 4, 4)}, None, tmp_path)


def test_a_part_of_glora_is_no_glora(base: Path, tmp_path: Path):
    file = {
        "up.a1.weight": torch.randn(8, 2),
        "up.lora_up.weight": torch.randn(16, 2),
        "up.lora_down.weight": torch.randn(2, 8),
    }
    with pytest.raises(SourceError, match=r"up\.a1\.weight: the base has no such tensor"):
        changes(file, base, tmp_path)
