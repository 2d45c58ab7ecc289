"""A conversion says whether its file gives the fine-tune bit for bit; the folder that it is applied to tells."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from shiradelta.converters.exactness import Inexact
from shiradelta.converters.item import Item
from torch import Tensor

import shiradelta
from shiradelta.cli import main
from shiradelta.converters import ConversionReport
from tests.conftest import write_lora, write_model

#: More than one block of elements.
SHAPE = (300, 1000)


def draw(dtype: torch.dtype, seed: int, size: float = 1.0) -> Tensor:
    return (torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)


def differing(folder: Path, wanted: dict[str, Tensor]) -> int:
    """Elements of a folder that are not the wanted ones: by bits, or as numbers where the dtype is another."""
    found = load_file(folder / "model.safetensors")
    assert found.keys() == wanted.keys()
    count = 0
    for name, tensor in wanted.items():
        one, other = found[name], tensor
        if one.dtype != other.dtype:
            one, other = one.float(), other.float()
        size = one.element_size()
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
        count += int((one.view(bits) != other.view(bits)).sum())
    return count


def check(tmp_path: Path, base: dict[str, Tensor], tuned: dict[str, Tensor], **options: object) -> ConversionReport:
    """Converts, applies, and compares what the report says with what the folder has."""
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", tuned)
    report = shiradelta.convert(tmp_path / "tuned", tmp_path / "a.shd", base=tmp_path / "base", **options)  # type: ignore[arg-type]
    shiradelta.apply(tmp_path / "base", tmp_path / "a.shd")
    inexact = differing(tmp_path / "base", tuned)
    assert report.inexact == inexact
    assert report.exact is (inexact == 0)
    said = f"not exact: {inexact:,} elements differ" if inexact else "exact"
    assert report.summary.endswith(f"; {said}")
    with shiradelta.open_delta(tmp_path / "a.shd") as delta:
        assert delta.metadata["exactness"] == said
    return report


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize(
    ("base", "tuned"),
    [
        pytest.param(base, tuned, marks=() if (base, tuned) == (torch.bfloat16, torch.float32) else pytest.mark.slow)
        for base, tuned in product(DTYPES, DTYPES)
    ],
)
@pytest.mark.parametrize(("sparsity", "values"), [(1.0, "f32"), (1.0, "int8"), (0.1, "f32"), (0.02, "int4")])
def test_the_report_counts_what_differs(
    tmp_path: Path, base: torch.dtype, tuned: torch.dtype, sparsity: float, values: str
):
    before = draw(base, 0)
    after = torch.where(draw(torch.float32, 1) > 0, before.float() + draw(torch.float32, 2, 0.01), before).to(tuned)
    check(
        tmp_path,
        {"w": before, "v": before[:3].clone()},
        {"w": after, "v": before[:3].clone().to(tuned)},
        sparsity=sparsity,
        values=values,
    )


def test_a_lossless_file_is_exact(tmp_path: Path):
    base = draw(torch.bfloat16, 0)
    tuned = (base.float() * 1.25).bfloat16()
    assert check(tmp_path, {"w": base}, {"w": tuned}, sparsity=1.0, values="f32").exact


def test_all_of_the_energy_is_not_all_of_the_bits(tmp_path: Path):
    """A weight that the fine-tune moved far away is not base + fl32(tuned - base)."""
    base, tuned = draw(torch.float32, 0), draw(torch.float32, 1)
    tuned[0, :100] *= 1e-9
    report = check(tmp_path, {"w": base}, {"w": tuned}, sparsity=1.0, values="f32")
    assert f"{report.energy_kept:.1%}" == "100.0%"
    assert report.inexact


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.int32])
@pytest.mark.parametrize("sparsity", [1.0, 0.01])
def test_what_is_set_is_exact_if_all_of_it_is(tmp_path: Path, dtype: torch.dtype, sparsity: float):
    base, tuned = (draw(torch.float32, seed, 100).to(dtype) for seed in (0, 1))
    report = check(tmp_path, {"w": base}, {"w": tuned}, sparsity=sparsity)
    assert report.exact is (sparsity == 1 or not dtype.is_floating_point)


def test_signs_of_zeros_and_new_tensors_count(tmp_path: Path):
    base, new = draw(torch.float32, 0), draw(torch.float32, 3)
    base[0] = 0
    tuned = base.clone()
    tuned[0, :7] = -0.0
    report = check(
        tmp_path, {"w": base, "z": base.clone()}, {"w": tuned, "z": base + 1, "new": new}, sparsity=1.0, values="f32"
    )
    assert report.skipped["w"] == "nothing changes that can be added"
    assert {tensor.name: tensor.inexact for tensor in report.tensors}["new"] == 0
    assert (report.inexact or 0) >= 7


def test_what_is_skipped_is_not_exact(tmp_path: Path):
    base = {"w": draw(torch.float32, 0), "v": draw(torch.float32, 1)}
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", {"w": base["w"] + 1, "v": base["v"][:9].clone()})
    report = shiradelta.convert(tmp_path / "tuned", tmp_path / "a.shd", 1.0, tmp_path / "base", "f32", skip="v")
    assert report.exact is False
    assert "; not exact: " in report.summary
    assert report.summary.endswith("1 tensor is skipped")


def test_a_lora_does_not_say_what_the_fine_tune_is(tmp_path: Path, made: Path):
    module = "model.layers.0.mlp.up_proj"
    lora = write_lora(tmp_path / "lora", {module: (96, 32)}, {"lora_alpha": 4})
    report = shiradelta.convert(lora, tmp_path / "a.shd", 1.0, made / "bf16", "f32")
    assert report.exact is None and report.inexact is None  # noqa: PT018
    assert report.summary.endswith("; exactness unknown, as the source says how weights change, not what they become")
    assert report.as_dict()["exactness"].startswith("exactness unknown")
    assert "inexact" not in report.rows[0]
    norm = torch.ones(32)
    save_file(
        {**load_file(lora / "adapter_model.safetensors"), "base_model.model.model.layers.0.norm.weight": norm},
        lora / "adapter_model.safetensors",
    )
    report = shiradelta.convert(lora, tmp_path / "a.shd", 1.0, made / "bf16", "f32")
    assert {tensor.name: tensor.inexact for tensor in report.tensors} == {
        f"{module}.weight": None,
        "model.layers.0.norm.weight": 0,
    }
    assert report.exact is None


def test_the_command_says_so(tmp_path: Path, made: Path):
    def run(*options: str) -> str:
        out = str(tmp_path / "a.shd")
        arguments = ["convert", str(made / "tuned_a"), "--base", str(made / "bf16"), "-o", out, *options]
        return CliRunner().invoke(main, arguments, catch_exceptions=False).stdout

    found = json.loads(run("--sparsity", "0.05", "--json"))
    assert found["exact"] is False
    assert found["inexact"] == sum(tensor["inexact"] for tensor in found["tensors"])
    table = run("--sparsity", "0.05")
    assert table.splitlines()[0].split()[-1] == "inexact"
    assert f"not exact: {found['inexact']:,} elements differ" in table


def test_a_change_where_the_fine_tune_has_none_counts():
    """A fit may change any element."""
    base, changed = np.zeros(6, np.uint16), np.array([0, 0, 0, 0, 0, 7], np.uint16)

    def unused(start: int, stop: int) -> NDArray[np.float32]:
        raise AssertionError

    def item(tuned: NDArray[np.uint16]) -> Item:
        return Item("w", (6,), "bfloat16", lambda: unused, tuned=lambda: tuned)

    for tuned, before in ((base, 0), (changed, 1)):
        inexact = Inexact(item(tuned), base)
        assert inexact.count == before
        inexact.see(np.array([1, 5]), base[[1, 5]], np.array([9, 7], np.uint16))
        assert inexact.count == 2 - before
