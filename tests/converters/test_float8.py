"""float8 bases: elements are set where fine-tune and base have the same scales; nothing is added to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import shiradelta
from converters.float8 import WIDEN, _blocks
from shiradelta.errors import BaseMismatchError, SourceError
from tests.conftest import read, write_lora, write_model
from tests.scenes import contents

LAYER = "model.layers.0.mlp.up_proj.weight"
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
#: The scale's name -> its shape, for a weight of 256 x 300.
SCALES: dict[str, tuple[int, ...]] = {
    f"{LAYER}_scale": (1,),
    f"{LAYER.removesuffix('.weight')}.scale_weight": (),
    f"{LAYER}_scale_inv": (2, 3),
    f"{LAYER}_scale ": (256, 1),
}


def quantised(weight: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
    return (weight / spread(scale, weight)).to(dtype)


def spread(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A scale for each element."""
    shape = (*scale.shape, *[1] * (weight.dim() - scale.dim()))
    at = [
        torch.arange(size) // (128 if count in (2, 3) else size // count)
        for size, count in zip(weight.shape, shape, strict=True)
    ]
    return scale.reshape(shape)[at[0]][:, at[1]]


def model(folder: Path, weight: torch.Tensor, dtype: torch.dtype, name: str, scale: torch.Tensor) -> Path:
    return write_model(folder, {LAYER: quantised(weight, dtype, scale), name.strip(): scale, "norm": torch.ones(4)})


@pytest.fixture
def weights() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(256, 300, generator=generator)
    return base, base + 0.3 * torch.randn(256, 300, generator=generator)


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("name", SCALES)
def test_elements_with_the_same_scales_are_set(
    tmp_path: Path, weights: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype, name: str
):
    scale = 0.01 + torch.rand(SCALES[name], generator=torch.Generator().manual_seed(1))
    base, tuned = (model(tmp_path / str(i), weight, dtype, name, scale) for i, weight in enumerate(weights))
    report = shiradelta.convert(tuned, tmp_path / "x.shd", 0.05, base)
    with shiradelta.open_delta(tmp_path / "x.shd") as delta:
        assert list(delta) == [LAYER]
        assert delta[LAYER].op == "set"
        positions = delta[LAYER].positions()
    change = torch.stack([quantised(weight, dtype, scale).double() * spread(scale, weight) for weight in weights])
    squares = np.square((change[1] - change[0]).numpy().reshape(-1))
    assert report.energy_kept == pytest.approx(squares[positions].sum() / squares.sum(), rel=1e-4)
    assert report.energy_kept == pytest.approx(np.sort(squares)[-positions.size :].sum() / squares.sum(), rel=1e-4)
    before = contents(base / "model.safetensors")
    shiradelta.apply(base, tmp_path / "x.shd")
    assert np.array_equal(read(base, LAYER)[positions], read(tuned, LAYER)[positions])
    shiradelta.revert(base)
    assert contents(base / "model.safetensors") == before


@pytest.mark.parametrize("scales", [(3,), (3, 2, 1), (3, 4, 8)])
def test_stacks_have_scales_too(tmp_path: Path, scales: tuple[int, ...]):
    generator = torch.Generator().manual_seed(0)
    name, scale = "experts.gate_up_proj", 0.1 + torch.rand(scales, generator=generator)
    full = scale.reshape(*scales, *[1] * (3 - len(scales)))
    for dim, size in enumerate((3, 4, 8)):
        full = full.repeat_interleave(size // full.shape[dim], dim)
    base, tuned = (torch.randn(3, 4, 8, generator=generator).to(FLOAT8[0]) for _ in range(2))
    for folder, weight in (("base", base), ("tuned", tuned)):
        write_model(tmp_path / folder, {name: weight, f"{name}_scale_inv": scale})
    report = shiradelta.convert(tmp_path / "tuned", tmp_path / "x.shd", 0.1, tmp_path / "base")
    squares = np.square(((tuned.double() - base.double()) * full).numpy().reshape(-1))
    assert report.energy_kept == pytest.approx(np.sort(squares)[-10:].sum() / squares.sum(), rel=1e-4)


@pytest.mark.parametrize("name", SCALES)
def test_other_scales_are_refused(tmp_path: Path, weights: tuple[torch.Tensor, torch.Tensor], name: str):
    scale = torch.ones(SCALES[name])
    base = model(tmp_path / "base", weights[0], FLOAT8[0], name, scale)
    tuned = model(tmp_path / "tuned", weights[1], FLOAT8[0], name, scale * 1.01)
    with pytest.raises(SourceError, match="is not the base's, so equal elements are other weights") as caught:
        shiradelta.convert(tuned, tmp_path / "x.shd", base=base)
    assert "2 tensors cannot be converted" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_not_stored_as_the_base_is_refused(tmp_path: Path, weights: tuple[torch.Tensor, torch.Tensor]):
    name, scale = f"{LAYER}_scale", torch.ones(1)
    scaled = model(tmp_path / "scaled", weights[0], FLOAT8[0], name, scale)
    bare = write_model(tmp_path / "bare", {LAYER: weights[1].to(FLOAT8[0]), "norm": torch.ones(4)})
    plain = write_model(tmp_path / "plain", {LAYER: weights[1].bfloat16(), "norm": torch.ones(4)})
    odd, strange = (
        [
            write_model(
                tmp_path / f"{scale.dtype}{i}", {LAYER: weight.to(FLOAT8[0]), name: scale, "norm": torch.ones(4)}
            )
            for i, weight in enumerate(weights)
        ]
        for scale in (torch.ones(7, 11), torch.ones(1).byte())
    )
    for tuned, base, message in (
        (bare, scaled, "the base has it divided by .*, the other has no scale; store both alike"),
        (scaled, bare, "the fine-tune has it divided by .*, the other has no scale; store both alike"),
        (plain, scaled, "the base has it divided by"),
        (plain, bare, "it is bfloat16, the base's float8_e4m3fn; store one as the other is"),
        (bare, plain, "it is float8_e4m3fn, the base's bfloat16; store one as the other is"),
        (*odd, r"its scale .* has shape \[7, 11\], which fits no blocks of it"),
        (*strange, r"its scale .* is uint8, which is not read"),
    ):
        with pytest.raises(SourceError, match=message):
            shiradelta.convert(tuned, tmp_path / "x.shd", base=base)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_nothing_is_added_to_float8(tmp_path: Path, dtype: torch.dtype):
    base = write_model(tmp_path / "base", {LAYER: torch.ones(96, 32).to(dtype)})
    lora = write_lora(tmp_path / "lora", {LAYER.removesuffix(".weight"): (96, 32)}, {"lora_alpha": 4})
    with pytest.raises(
        SourceError, match=r"as float8_e\w+, to which nothing .*; give the unquantised model, and quantise"
    ):
        shiradelta.convert(lora, tmp_path / "x.shd", base=base)
    plain, at = {LAYER: torch.ones(96, 32)}, LAYER.removesuffix(".weight")
    listed = {f"{at}.positions": torch.tensor([3]), f"{at}.values": torch.ones(1)}
    for difference in (plain, listed):
        save_file(difference, tmp_path / "difference.safetensors")
        with pytest.raises(SourceError, match="to which nothing can be added exactly; give the unquantised model"):
            shiradelta.convert(tmp_path / "difference.safetensors", tmp_path / "x.shd", base=base, kind="diff")
    shiradelta.convert(lora, tmp_path / "x.shd")  # without a base: for any dtype that can be added to
    before = contents(base)
    with pytest.raises(
        BaseMismatchError, match="apply it to the unquantised model and quantise the result, or convert"
    ):
        shiradelta.apply(base, tmp_path / "x.shd", allow_dtype=True)
    assert contents(base) == before
    weights = {LAYER: torch.ones(96, 32).to(dtype)}
    with pytest.raises(BaseMismatchError, match="apply it to the unquantised model"):
        shiradelta.HotSwap(weights).load("x", tmp_path / "x.shd")


@pytest.mark.parametrize("dtype", FLOAT8)
def test_values_are_those_of_torch(dtype: torch.dtype):
    bits = np.arange(256, dtype=np.uint8)
    ours = WIDEN[str(dtype).removeprefix("torch.")](bits)
    assert np.array_equal(ours, torch.from_numpy(bits).view(dtype).float().numpy(), equal_nan=True)


@pytest.mark.parametrize(
    ("shape", "scales", "blocks"),
    [
        ((200, 300), (2, 3), (128, 128)),
        ((256, 64), (256, 1), (1, 64)),
        ((256, 64), (256, 2), (1, 32)),
        ((4, 256, 64), (4, 2, 1), (1, 128, 64)),
        ((4, 256, 64), (4,), (1, 256, 64)),
        ((4, 4), (), (4, 4)),
        ((4, 4), (3, 4), None),
        ((4, 4), (1, 2, 1), None),
        ((4, 4), (0, 4), None),
        ((256, 300), (7, 11), None),
    ],
)
def test_blocks_follow_from_the_shapes(shape: tuple[int, ...], scales: tuple[int, ...], blocks: tuple[int, ...] | None):
    assert _blocks(shape, scales) == blocks
