"""Deltas on a model's weights: the same numbers, however the model is loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from shiradelta.errors import SourceError
from shiradelta.fit.fitted import FitTarget
from shiradelta.fit.refit.skeleton import Skeleton
from shiradelta.fit.tuned_weights import TunedWeights, can_write_exact, write_exact
from shiradelta.format.delta import TensorDelta
from tests.fit.test_fit import write_pair


def added_once(weights: Tensor, values: Tensor) -> Tensor:
    return (weights.double() + values.double()).to(weights.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_an_exact_sum_is_rounded_once(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(4096, generator=generator).to(dtype)
    values = 0.01 * torch.randn(4096, generator=generator)
    expected, twice = added_once(weights, values), weights + values.to(dtype)
    name = str(dtype).removeprefix("torch.")
    write_exact(weights, TensorDelta((64, 64), None, values.numpy(), name))
    assert torch.equal(weights, expected)
    assert torch.equal(twice, expected) is (dtype == torch.float32)


def test_set_and_new_replace():
    weights = torch.zeros(6)
    write_exact(weights, TensorDelta((2, 3), [1, 4], np.float32([7, 8]), "float32", "set"))
    assert weights.tolist() == [0, 7, 0, 0, 8, 0]
    write_exact(weights, TensorDelta((2, 3), None, np.arange(6, dtype=np.float32), "float32", "new"))
    assert weights.tolist() == [0, 1, 2, 3, 4, 5]


def test_what_has_no_values_for_a_weight_is_not_written():
    delta = TensorDelta((2, 3), [1], np.float32([7]), "float32")
    assert can_write_exact("w", (2, 3), delta)
    assert not can_write_exact("w", (2, 3), TensorDelta((2, 3), None, [], "float32", "drop"))


def test_an_exact_change_of_another_shape_is_refused_by_name():
    delta = TensorDelta((2, 3), [1], np.float32([7]), "float32")
    with pytest.raises(SourceError, match=r"'w' has shape \[3, 2\] in the model, but its change has \[2, 3\]"):
        can_write_exact("w", (3, 2), delta)


def test_a_model_filled_layer_by_layer_has_the_same_exact_changes(tmp_path: Path):
    base, tuned = write_pair("encoder", tmp_path)
    name, values = "encoder.layer.0.output.dense.weight", 0.01 * np.random.default_rng(0).standard_normal((32, 64))
    delta = TensorDelta((32, 64), None, values.reshape(-1).astype(np.float32), "float32")
    skeleton = Skeleton(base, tuned, {name: delta}, torch.device("cpu"), torch.bfloat16)
    plain = Skeleton(base, tuned, {}, torch.device("cpu"), torch.bfloat16)
    weights, before = (each.fill(each.of_block(0))[name].data for each in (skeleton, plain))
    change = torch.from_numpy(delta.values().copy()).view(32, 64)
    assert torch.equal(weights, added_once(before, change))
    assert not torch.equal(weights, before + change.bfloat16())


def test_only_what_the_fine_tune_changed_is_fitted():
    tuned = TunedWeights()
    for name, delta in (("a", [0.0, 3, -4, 1]), ("b", [0.0] * 4)):
        rows = torch.tensor([delta]).numpy()
        weight = torch.nn.Parameter(torch.ones(4))
        tuned.add(FitTarget(name, "float32", (1, 4), lambda rows=rows: lambda a, b: rows[a:b], 2), weight)
    assert ([target.name for target in tuned.targets], tuned.changed, tuned.energy) == (["a"], [3], [26])
    (selection,) = tuned.selections(tuned.topk()).values()
    assert selection.positions.tolist() == [1, 2]
    assert selection.values.tolist() == [3, -4]
    assert tuned.tuned[tuned.weights[0]].tolist() == [1, 4, -3, 2]
