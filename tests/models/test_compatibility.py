"""Whether a delta fits a tensor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import shiradelta
from shiradelta import TensorDelta
from shiradelta.errors import BaseMismatchError, DeltaError
from shiradelta.format.operations import OPERATIONS
from shiradelta.models.compatibility import (
    Misfit,
    TensorSpec,
    check_fit,
    check_strength,
    check_tied,
    difference,
    misfit,
)
from tests.conftest import write_model

ADD = TensorDelta((3, 4), [1, 5], [1.0, 2.0], "bfloat16")
ANY = TensorDelta((3, 4), [1, 5], [1.0, 2.0], "unspecified")
NEW = TensorDelta((2,), None, np.ones(2, np.float32), "float32", op="new")
SET = TensorDelta((3, 4), [1], np.array([7], np.int32), "int32", op="set")


@pytest.mark.parametrize(
    ("tensor", "target", "expected"),
    [
        (ADD, TensorSpec((3, 4), "bfloat16"), None),
        (ADD, TensorSpec((4, 3), "bfloat16"), Misfit.SHAPE),
        (ADD, TensorSpec((4, 3), "int8"), Misfit.SHAPE),
        (ADD, TensorSpec((3, 4), "float32"), Misfit.DTYPE),
        (ADD, TensorSpec((3, 4), "int8"), Misfit.NOT_ADDABLE),
        (ADD, TensorSpec((3, 4), "?"), Misfit.NOT_ADDABLE),
        (ANY, TensorSpec((3, 4), "float32"), None),
        (ANY, TensorSpec((3, 4), "int8"), Misfit.NOT_ADDABLE),
        (SET, TensorSpec((3, 4), "int32"), None),
        (SET, TensorSpec((3, 4), "int64"), Misfit.DTYPE),
        (SET, TensorSpec((3, 4), "?"), Misfit.NOT_ADDABLE),
    ],
)
def test_misfits(tensor: TensorDelta, target: TensorSpec, expected: Misfit | None):
    assert misfit(tensor, target) is expected
    options = {"allow_dtype": False, "option": "--allow-dtype"}
    if expected is None:
        check_fit("x", tensor, target, "model", **options)
        return
    words = {Misfit.SHAPE: "has shape", Misfit.DTYPE: "cannot be checked", Misfit.NOT_ADDABLE: "nothing can be added"}
    with pytest.raises(BaseMismatchError, match=words[expected]):
        check_fit("x", tensor, target, "model", **options)


def test_another_dtype_is_allowed_for_adds_alone():
    options = {"allow_dtype": True, "option": "--allow-dtype"}
    check_fit("x", ADD, TensorSpec((3, 4), "float32"), "model", **options)
    with pytest.raises(BaseMismatchError, match=r"cannot be checked$"):
        check_fit("x", SET, TensorSpec((3, 4), "int64"), "model", **options)


def test_differences():
    assert difference(ADD, None) is Misfit.MISSING
    assert difference(ADD, ANY) is None
    assert difference(ADD, SET) is Misfit.DTYPE


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_strengths(operation):
    check_strength("x", 1.0, [operation])
    if operation.has_strength:
        check_strength("x", 0.5, [operation])
    else:
        with pytest.raises(DeltaError, match="strength 1 only"):
            check_strength("x", 0.5, [operation])
    with pytest.raises(DeltaError, match="finite"):
        check_strength("x", float("nan"), [operation])


def test_tied_tensors_have_the_same_delta():
    check_tied("x", ADD, TensorDelta((3, 4), [1, 5], [1.0, 2.0], "bfloat16"), "untie them")
    with pytest.raises(BaseMismatchError, match=r"x is tied to another, .* differently; untie them"):
        check_tied("x", ADD, TensorDelta((3, 4), [1, 5], [1.0, 3.0], "bfloat16"), "untie them")


def test_a_delta_made_without_a_base_says_so_where_it_does_not_fit(tmp_path: Path):
    model = write_model(tmp_path / "model", {"v": torch.zeros(3, 4), "w": torch.zeros(4, 3)})
    for tensor, remedy in ((ANY, "it was made without a base, .*--base"), (ADD, "give the model it was made for")):
        for name, what in (("w", r"has shape \[4, 3\]"), ("elsewhere", "found in")):
            shiradelta.save_delta(tmp_path / "x.shd", {name: tensor, "new": NEW})
            with pytest.raises(BaseMismatchError, match=f"{what} .*; {remedy}"):
                shiradelta.apply(model, tmp_path / "x.shd")
            shiradelta.save_delta(tmp_path / "x.shd", {name: tensor})
            with pytest.raises(BaseMismatchError, match=f"{what} .*; {remedy}"):
                shiradelta.HotSwap({"w": torch.zeros(4, 3)}).load("x", tmp_path / "x.shd")
