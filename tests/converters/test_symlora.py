"""SymLoRA: Q diag(Lambda) Q^T of square weights, and the project of the same name that changes the base."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import shiradelta
from shiradelta.errors import SourceError
from tests.conftest import write_lora, write_model

ATTENTION, SIDE, RANK = "model.layers.0.self_attn", 24, 5
Q, V, UP = f"{ATTENTION}.q_proj", f"{ATTENTION}.v_proj", "model.layers.0.mlp.up_proj"
SHAPES = {f"{Q}.weight": (SIDE, SIDE), f"{V}.weight": (SIDE, SIDE), f"{UP}.weight": (40, SIDE)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", {name: draw(*shape) for name, shape in SHAPES.items()})


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(module: str, q: str = "Q", values: str = "Lambda", seed: int = 1, side: int = SIDE) -> dict[str, Tensor]:
    return {f"{module}.{q}": draw(side, RANK, seed=seed), f"{module}.{values}": draw(RANK, seed=seed + 100)}


def converted(tensors: dict[str, Tensor], folder: Path, base: Path | None, **options: object) -> dict[str, np.ndarray]:
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / "adapter.safetensors")
    shiradelta.convert(folder / "adapter.safetensors", folder / "x.shd", 1.0, base, "f32", **options)  # type: ignore[arg-type]
    with shiradelta.open_delta(folder / "x.shd") as delta:
        return {name: delta[name].to_dense() for name in delta}


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize(
    ("q", "values"),
    [
        ("Q", "Lambda"),
        ("q", "lambda"),
        ("lora_Q.default.weight", "lora_Lambda.default"),
        ("symlora_Q", "sym_lora_lambda"),
    ],
)
def test_the_change_is_exact_at_sparsity_1(base: Path, tmp_path: Path, with_base: bool, q: str, values: str):
    held = pair(Q, q, values) | pair(f"base_model.model.{V}", q, values, seed=2)
    found = converted(held, tmp_path, base if with_base else None)
    assert found.keys() == {f"{Q}.weight", f"{V}.weight"}
    for module, seed in ((Q, 1), (V, 2)):
        one = pair(module, seed=seed)
        vectors, numbers = one[f"{module}.Q"].numpy(), one[f"{module}.Lambda"].numpy()
        wanted = (vectors * numbers) @ np.ascontiguousarray(vectors.T)
        np.testing.assert_array_equal(found[f"{module}.weight"], wanted)


def test_the_folder_has_the_base_plus_the_change(base: Path, tmp_path: Path):
    change = converted(pair(Q), tmp_path, base)[f"{Q}.weight"]
    before = {name: one.clone() for name, one in load_file(base / "model.safetensors").items()}
    shiradelta.apply(base, tmp_path / "x.shd")
    after = load_file(base / "model.safetensors")
    assert torch.equal(after[f"{Q}.weight"], before[f"{Q}.weight"] + torch.from_numpy(change))
    assert torch.equal(after[f"{UP}.weight"], before[f"{UP}.weight"])


def test_a_q_that_is_square_is_read_as_the_paper_writes_it(base: Path, tmp_path: Path):
    vectors, numbers = draw(SIDE, SIDE, seed=5), draw(SIDE, seed=6)
    found = converted({f"{Q}.Q": vectors, f"{Q}.Lambda": numbers}, tmp_path, base)[f"{Q}.weight"]
    np.testing.assert_array_equal(found, (vectors * numbers).numpy() @ np.ascontiguousarray(vectors.T.numpy()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_in_half_precision(base: Path, tmp_path: Path, dtype: torch.dtype):
    held = {key: one.to(dtype) for key, one in pair(Q).items()}
    vectors, numbers = (held[f"{Q}.{part}"].float().numpy() for part in ("Q", "Lambda"))
    found = converted(held, tmp_path, base)[f"{Q}.weight"]
    np.testing.assert_array_equal(found, (vectors * numbers) @ np.ascontiguousarray(vectors.T))


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({f"{Q}.Q": draw(SIDE, RANK)}, "only Q of Q and Lambda is there"),
        ({f"{Q}.Q": draw(RANK, SIDE), f"{Q}.Lambda": draw(RANK)}, r"Q of shape \[5, 24\] and Lambda of \[5\] are not"),
        ({f"{Q}.Q": draw(SIDE, RANK), f"{Q}.Lambda": draw(RANK + 1)}, "are not"),
        ({f"{Q}.Q": draw(SIDE, RANK), f"{Q}.Lambda": torch.ones(RANK, dtype=torch.int32)}, "is int32; factors are"),
        (pair(UP), r"it changes a weight of shape \[24, 24\], the base's .* has \[40, 24\]"),
        (pair("model.layers.7.self_attn.q_proj"), "the base has no such tensor"),
        ({**pair(Q), f"{Q}.bias_change": draw(3)}, "is neither Q nor Lambda of a SymLoRA"),
        ({**pair(Q), f"{Q}.Q": torch.full((SIDE, RANK), torch.nan)}, "NaN"),
        ({**pair(Q), f"{Q}.q": draw(SIDE, RANK)}, "are the same part; remove one"),
    ],
    ids=range(9),
)  # fmt: skip
def test_what_does_not_fit_is_refused(base: Path, tmp_path: Path, held: dict[str, Tensor], message: str):
    with pytest.raises(SourceError, match=message) as caught:
        converted(held, tmp_path, base, kind="symlora")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x.shd").exists()


@pytest.mark.parametrize("values", ["Lambda", "symlora_Lambda.default"])
@pytest.mark.parametrize("shape", [(RANK, SIDE), (SIDE, RANK + 1)])
def test_shapes_that_do_not_fit_are_named_without_a_kind(
    base: Path, tmp_path: Path, values: str, shape: tuple[int, int]
):
    with pytest.raises(SourceError, match=rf"Q of shape \[{shape[0]}, {shape[1]}\] and Lambda of \[5\] are not"):
        converted({f"{Q}.Q": draw(*shape), f"{Q}.{values}": draw(RANK)}, tmp_path, base)


def test_a_module_may_be_left_out_by_name(base: Path, tmp_path: Path):
    found = converted({**pair(Q), **pair(UP, seed=3)}, tmp_path, base, skip=f"{UP}*")
    assert list(found) == [f"{Q}.weight"]


@pytest.mark.parametrize(
    ("about", "message"),
    [({"lora_alpha": 16}, "lora_alpha 16, which may multiply"), ({"peft_type": "LORA"}, "says LORA"), ([], "is not a")],
)
def test_a_configuration_that_says_more_is_refused(base: Path, tmp_path: Path, about: object, message: str):
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    with pytest.raises(SourceError, match=message):
        converted(pair(Q), tmp_path, base)


def test_other_letters_are_no_symlora(base: Path, tmp_path: Path):
    """A model's own tensors may end in q; without Lambda they are a model's."""
    with pytest.raises(SourceError, match="its layout is none of"):
        converted({f"{ATTENTION}.q": draw(SIDE, SIDE)}, tmp_path, None)


@pytest.mark.parametrize("kind", ["auto", "lora"])
@pytest.mark.parametrize(
    ("file", "message"),
    [("init_weights", "fit a changed base only; subtract"), ("residual_R", "connections among the adapter's layers")],
)
def test_the_other_project_of_that_name_is_refused(base: Path, tmp_path: Path, kind: str, file: str, message: str):
    """Its factors are PEFT's; what else it saves tells it from a plain LoRA."""
    lora = write_lora(tmp_path / "lora", {UP: (40, SIDE)}, {"lora_alpha": 4})
    save_file({f"{UP}.lora_A.weight": draw(4, SIDE)}, lora / f"{file}.safetensors")
    for path in (lora, lora / "adapter_model.safetensors"):
        with pytest.raises(SourceError, match=f"{file}.safetensors.*{message}"):
            shiradelta.convert(path, tmp_path / "x.shd", 1.0, base, kind=kind)
