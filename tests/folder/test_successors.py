"""Deltas of consecutive steps: each is made against the one before, and applies on top of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import shiradelta
from shiradelta import TensorDelta
from shiradelta.errors import BaseMismatchError, DeltaError, TargetError
from shiradelta.folder.listing import recorded
from shiradelta.folder.revert import revert_all
from tests.conftest import random_tensors, write_model
from tests.scenes import contents, weights

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module", params=["sparse", "lossless"])
def chain(request: pytest.FixtureRequest, made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three deltas, each against the result of those before it: c0, c1, c2."""
    before, folder = made / "bf16", tmp_path_factory.mktemp("chain")
    for number in range(3):
        tensors = load_file(before / "model.safetensors")
        generator = torch.Generator().manual_seed(number)
        tuned = {
            name: (value.float() + 0.1 * torch.randn(value.shape, generator=generator)).bfloat16()
            for name, value in tensors.items()
        }
        target = write_model(folder / f"tuned{number}", tuned)
        delta = folder / f"c{number}.shd"
        if request.param == "sparse":
            shiradelta.convert(target, delta, base=before, sparsity=0.05, values="int8")
        else:
            changed = {
                name: TensorDelta(
                    tuple(value.shape),
                    None,
                    value.view(torch.int16).numpy().view("<u2"),
                    "bfloat16",
                    "set",
                    base_bits=tensors[name].view(torch.int16).numpy().view("<u2").ravel(),
                )
                for name, value in tuned.items()
            }
            shiradelta.save_delta(delta, changed)
        before = folder / f"step{number}"
        shiradelta.apply(made / "bf16" if number == 0 else folder / f"step{number - 1}", delta, out=before)
    return folder


@pytest.fixture
def steps(chain: Path, tmp_path: Path) -> list[Path]:
    """Its deltas, and beside them copies of the folders that they were made of and give."""
    shutil.copytree(chain, tmp_path, dirs_exist_ok=True)
    return [tmp_path / f"c{number}.shd" for number in range(3)]


def test_consecutive_steps_apply_in_turn_and_are_taken_out_in_turn(model: Path, steps: list[Path]):
    states = [weights(model)]
    for number, delta in enumerate(steps):
        shiradelta.apply(model, delta)
        states.append(weights(model))
        assert recorded(model).applied[-1].successor == (number > 0)
        for each in steps[: number + 1]:
            assert shiradelta.verify(model, each, full=True).state == "patched"
    for _ in steps:
        assert weights(model) == states.pop()
        shiradelta.revert(model)
    assert weights(model) == states.pop()


def test_a_step_on_the_result_equals_the_step_on_a_copy_of_it(model: Path, steps: list[Path], tmp_path: Path):
    """What is on the folder is rounded already, so it is as good a base as a copy of it."""
    shiradelta.apply(model, steps[0])
    shiradelta.apply(model, steps[1])
    assert weights(model) == weights(tmp_path / "step1")


def test_a_step_that_was_left_out_is_named(model: Path, steps: list[Path]):
    shiradelta.apply(model, steps[0])
    before = weights(model)
    with pytest.raises(
        BaseMismatchError, match=r"is not the base's, and tensor .* is not what the deltas on the folder"
    ):
        shiradelta.apply(model, steps[2])
    assert weights(model) == before
    shiradelta.apply(model, steps[1])
    shiradelta.apply(model, steps[2])
    revert_all(model)


@pytest.mark.parametrize("strength", [0.5, -1.0, 2.0])
def test_a_successor_has_strength_1(model: Path, steps: list[Path], strength: float):
    shiradelta.apply(model, steps[0])
    with pytest.raises(DeltaError, match="strength"):
        shiradelta.apply(model, steps[1], strength=strength)
    assert len(recorded(model).applied) == 1


def test_a_delta_of_the_base_is_no_successor(model: Path, made: Path):
    base = contents(model)
    shiradelta.apply(model, made / "a.shd")
    shiradelta.apply(model, made / "b.shd", strength=0.5)
    assert [entry.successor for entry in recorded(model).applied] == [False, False]
    assert [report.delta.file for report in revert_all(model)] == ["b.shd", "a.shd"]
    assert contents(model) == base
    with pytest.raises(TargetError, match="nothing to revert"):
        revert_all(model)


def test_tensors_that_fit_different_states_are_refused(model: Path, tmp_path: Path):
    """One tensor of the delta is of the base, the other of the present weights."""
    other = "model.layers.1.mlp.up_proj.weight"
    first = {UP: TensorDelta((96, 32), [1, 2], [1.0, -1.0]), other: TensorDelta((96, 32), [1, 2], [1.0, -1.0])}
    base = {
        name: value.view(torch.int16).numpy().view("<u2").ravel()
        for name, value in random_tensors(torch.bfloat16).items()
    }
    shiradelta.save_delta(tmp_path / "first.shd", first, values="f32")
    shiradelta.apply(model, tmp_path / "first.shd")
    now = load_file(model / "model.safetensors")[other].view(torch.int16).numpy().view("<u2").ravel()
    mixed = {
        UP: TensorDelta((96, 32), [1, 2], [0.5, 0.5], "bfloat16", base_bits=base[UP][[1, 2]]),
        other: TensorDelta((96, 32), [1, 2], [0.5, 0.5], "bfloat16", base_bits=now[[1, 2]]),
    }
    shiradelta.save_delta(tmp_path / "mixed.shd", mixed, values="f32")
    with pytest.raises(BaseMismatchError, match="was made for other weights"):
        shiradelta.apply(model, tmp_path / "mixed.shd")
    agreeing = {**mixed, UP: TensorDelta((96, 32), [50], [0.5], "bfloat16", base_bits=base[UP][[50]])}
    shiradelta.save_delta(tmp_path / "agreeing.shd", agreeing, values="f32")
    shiradelta.apply(model, tmp_path / "agreeing.shd")
    assert recorded(model).applied[-1].successor


def test_a_successor_without_what_is_beneath_it_does_not_verify(model: Path, steps: list[Path]):
    """The state says that the step before is there; the weights beneath are others."""
    shiradelta.apply(model, steps[0])
    shiradelta.apply(model, steps[1])
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors[UP] = random_tensors(torch.bfloat16)[UP]
    save_file(tensors, path, metadata={"format": "pt"})
    for delta in (None, *steps[:2]):
        assert shiradelta.verify(model, delta).state == "neither"


def test_states_without_the_field_are_read(model: Path, made: Path):
    shiradelta.apply(model, made / "a.shd")
    path = model / ".shiradelta" / "state.json"
    found = json.loads(path.read_bytes())
    del found["applied"][0]["successor"]
    path.write_text(json.dumps({"version": 1, "applied": found["applied"], "pending": None}))
    assert not recorded(model).applied[0].successor
